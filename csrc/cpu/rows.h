// Reads and writes blocks of rows: any strides, any storage type, to and from the compute type.
//
// Included inside the namespace of the capability, so that nothing here is shared between them.

static int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// --- bfloat16: the upper half of a float32; rounded to nearest even, NaN stays NaN ---

static void from_bfloat16(float* to, const uint16_t* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, 4);
  }
}

static void to_bfloat16(uint16_t* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, from + i, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i] = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : rounded);
  }
}

// --- float16: hardware where there is any, else by the scale 2^-112 between the exponents' ranges
// ---

#if !defined(__F16C__) && !defined(__aarch64__)

static float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {  // inf, NaN
    bits = 0x7f800000 | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000 : 0);
  } else {
    bits = rest << 13;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    value *= 0x1p112f;  // exact, subnormals too
    __builtin_memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

static uint16_t float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 rounds to inf
  uint32_t rest;
  if (bits < 0x38800000) {  // subnormal: the addition rounds to a multiple of 2^-24
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&rest, &magnitude, 4);
    rest -= 0x3f000000;
  } else {
    rest = (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13;
  }
  return static_cast<uint16_t>(sign | rest);
}

#endif

static void from_float16(float* to, const uint16_t* from, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i]);
#elif defined(__aarch64__)
  for (; i < n; ++i) {
    __fp16 half;
    __builtin_memcpy(&half, from + i, 2);
    to[i] = half;
  }
#else
  for (; i < n; ++i) to[i] = half_to_float(from[i]);
#endif
}

static void to_float16(uint16_t* to, const float* from, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  for (; i < n; ++i) to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  for (; i < n; ++i) {
    const __fp16 half = from[i];
    __builtin_memcpy(to + i, &half, 2);
  }
#else
  for (; i < n; ++i) to[i] = float_to_half(from[i]);
#endif
}

// --- Blocks ---

template <class T>
static void decode(T* to, const void* from, DType dtype, int64_t n) {
  if constexpr (sizeof(T) == 8) {
    __builtin_memcpy(to, from, n * sizeof(T));
  } else {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    if (dtype == DType::float32)
      __builtin_memcpy(to, from, n * sizeof(T));
    else if (dtype == DType::bfloat16)
      from_bfloat16(to, half, n);
    else
      from_float16(to, half, n);
  }
}

template <class T>
static void encode(void* to, const T* from, DType dtype, int64_t n) {
  if constexpr (sizeof(T) == 8) {
    __builtin_memcpy(to, from, n * sizeof(T));
  } else {
    uint16_t* half = static_cast<uint16_t*>(to);
    if (dtype == DType::float32)
      __builtin_memcpy(to, from, n * sizeof(T));
    else if (dtype == DType::bfloat16)
      to_bfloat16(half, from, n);
    else
      to_float16(half, from, n);
  }
}

template <class Word>
static void gather_run(void* to, const char* from, int64_t stride, int64_t n) {
  Word* words = static_cast<Word*>(to);
  for (int64_t i = 0; i < n; ++i) __builtin_memcpy(words + i, from + i * stride, sizeof(Word));
}

// Elements [first, first + n) of a row, in logical order, n <= a block, as they are stored.
static void gather(void* to, const Rows& rows, const char* row, int64_t first, int64_t n) {
  const int64_t size = size_of(rows.dtype);
  const int inner = rows.ndim - 1;
  char* out = static_cast<char*>(to);
  for (int64_t done = 0; done < n;) {
    int64_t rest = first + done;
    const char* at = row;
    int64_t run = 0;
    for (int d = inner; d >= 0; --d) {
      const int64_t index = rest % rows.sizes[d];
      if (d == inner) run = rows.sizes[d] - index;
      rest /= rows.sizes[d];
      at += index * rows.strides[d];
    }
    if (run > n - done) run = n - done;
    if (size == 8)
      gather_run<uint64_t>(out, at, rows.strides[inner], run);
    else if (size == 4)
      gather_run<uint32_t>(out, at, rows.strides[inner], run);
    else
      gather_run<uint16_t>(out, at, rows.strides[inner], run);
    out += run * size;
    done += run;
  }
}

// Elements [first, first + n) of a row in the compute type, then zeros up to `padded`.
template <class T>
static void pack(T* to, const Rows& rows, int64_t index, int64_t first, int64_t n, int64_t padded) {
  const char* row = rows.data + index * rows.row_stride;
  if (rows.dense) {
    decode(to, row + first * size_of(rows.dtype), rows.dtype, n);
  } else {
    alignas(64) char stored[kBlockBytes];
    gather(stored, rows, row, first, n);
    decode(to, stored, rows.dtype, n);
  }
  for (int64_t i = n; i < padded; ++i) to[i] = 0;
}

// The same without a copy where the row can be read in place.
template <class T>
static const T* view(T* scratch, const Rows& rows, int64_t index, int64_t first, int64_t n,
                     int64_t padded) {
  const bool stored_as_computed = size_of(rows.dtype) == static_cast<int64_t>(sizeof(T));
  if (rows.dense && stored_as_computed && n == padded)
    return reinterpret_cast<const T*>(rows.data + index * rows.row_stride) + first;
  pack(scratch, rows, index, first, n, padded);
  return scratch;
}

// Rows to come, asked from memory a few at a time while others are computed with: a short run of
// each of many rows is more than the hardware's prefetcher can follow.
class Prefetch {
 public:
  void start() { count_ = next_ = 0; }

  void add(const Rows& rows, int64_t index, int64_t first, int64_t n) {
    if (!rows.dense || count_ == capacity) return;
    const int64_t size = size_of(rows.dtype);
    lines_[count_] = rows.data + index * rows.row_stride + first * size;
    bytes_[count_++] = static_cast<int32_t>(n * size);
  }

  // An equal share of what is left in each of `steps` steps.
  void step(int64_t steps) {
    for (int64_t share = (count_ - next_ + steps - 1) / steps; share > 0; --share, ++next_) {
      // The next row's page first: its translation takes longer than the rest.
      if (next_ + 1 < count_) __builtin_prefetch(lines_[next_ + 1], 0, 2);
      for (int32_t at = 0; at < bytes_[next_]; at += 64)
        __builtin_prefetch(lines_[next_] + at, 0, 2);
    }
  }

 private:
  static constexpr int64_t capacity = 64;
  const char* lines_[capacity];
  int32_t bytes_[capacity];
  int64_t count_ = 0, next_ = 0;
};
