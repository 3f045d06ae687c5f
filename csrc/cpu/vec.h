// Vector types of the instruction set that this translation unit is compiled for: `Float` and
// `Double`. A type gives its lanes, the shape of the register tile (sources x targets), how many
// registers there are, the few operations that the loops need and `sums`: horizontal sums in one
// fixed order, whatever their number, padded to 4. `stream` stores to an aligned address without
// reading its line into the caches first, where the machine can; `fence` ends a run of such stores.
//
// Included inside the namespace of the capability, so that nothing here is shared between them.

static void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

#if defined(__AVX2__)

struct Float8 {
  using Scalar = float;
  using Register = __m256;
  static constexpr int lanes = 8;
  // 6 sums, 6 time steps, z, v and the difference in 16 registers; two FMA pipes need 8 sums in
  // flight.
  static constexpr int tile_sources = 1;
  static constexpr int tile_targets = 6;
  static constexpr int registers = 16;

  static Register zero() { return _mm256_setzero_ps(); }
  static Register broadcast(float a) { return _mm256_set1_ps(a); }
  static Register load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Register a) { _mm256_storeu_ps(p, a); }
  static void stream(float* p, Register a) { _mm256_stream_ps(p, a); }
  static Register fma(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
  static Register mul(Register a, Register b) { return _mm256_mul_ps(a, b); }
  static Register sub(Register a, Register b) { return _mm256_sub_ps(a, b); }

  // to[t] - from for a tile of targets, rounded once.
  static void steps(const double* to, double from, float* out) {
    static_assert(tile_targets <= 8);
    const __m256d origin = _mm256_set1_pd(from);
    _mm_storeu_ps(out, _mm256_cvtpd_ps(_mm256_sub_pd(_mm256_loadu_pd(to), origin)));
    _mm_storeu_ps(out + 4, _mm256_cvtpd_ps(_mm256_sub_pd(_mm256_loadu_pd(to + 4), origin)));
  }

  // [a0+a2, b0+b2, a1+a3, b1+b3] in both halves.
  static Register fold2(Register a, Register b) {
    return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  template <int count>
  static void sums(const Register* a, float* out) {
    static_assert(count % 2 == 0 || count == 1);
    for (int i = 0; i < count; i += 4) {
      const Register ab = fold2(a[i], a[i + 1 < count ? i + 1 : i]);
      const Register cd = i + 2 < count ? fold2(a[i + 2], a[i + 3]) : ab;
      const __m256d lo = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
      const __m256d hi = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
      const Register s = _mm256_add_ps(_mm256_castpd_ps(lo), _mm256_castpd_ps(hi));
      const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
      _mm_storeu_ps(out + i, sum);
    }
  }
};

struct Double4 {
  using Scalar = double;
  using Register = __m256d;
  static constexpr int lanes = 4;
  static constexpr int tile_sources = 1;
  static constexpr int tile_targets = 6;
  static constexpr int registers = 16;

  static Register zero() { return _mm256_setzero_pd(); }
  static Register broadcast(double a) { return _mm256_set1_pd(a); }
  static Register load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Register a) { _mm256_storeu_pd(p, a); }
  static void stream(double* p, Register a) { _mm256_stream_pd(p, a); }
  static Register fma(Register a, Register b, Register c) { return _mm256_fmadd_pd(a, b, c); }
  static Register mul(Register a, Register b) { return _mm256_mul_pd(a, b); }
  static Register sub(Register a, Register b) { return _mm256_sub_pd(a, b); }

  static void steps(const double* to, double from, double* out) {
    for (int t = 0; t < tile_targets; ++t) out[t] = to[t] - from;
  }

  template <int count>
  static void sums(const Register* a, double* out) {
    static_assert(count % 2 == 0 || count == 1);
    for (int i = 0; i < count; i += 2) {
      const Register b = a[i + 1 < count ? i + 1 : i];
      const Register s = _mm256_add_pd(_mm256_unpacklo_pd(a[i], b), _mm256_unpackhi_pd(a[i], b));
      _mm_storeu_pd(out + i, _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1)));
    }
  }
};

#endif

#if defined(__AVX512F__)

// 32 registers: two sources share the loads of each target.
struct Float16 {
  using Scalar = float;
  using Register = __m512;
  static constexpr int lanes = 16;
  static constexpr int tile_sources = 2;
  static constexpr int tile_targets = 6;
  static constexpr int registers = 32;

  static Register zero() { return _mm512_setzero_ps(); }
  static Register broadcast(float a) { return _mm512_set1_ps(a); }
  static Register load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Register a) { _mm512_storeu_ps(p, a); }
  static void stream(float* p, Register a) { _mm512_stream_ps(p, a); }
  static Register fma(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
  static Register mul(Register a, Register b) { return _mm512_mul_ps(a, b); }
  static Register sub(Register a, Register b) { return _mm512_sub_ps(a, b); }
  // The unmasked form makes GCC 12 warn about its own header.
  template <int index>
  static Float8::Register half(Register a) {
    return _mm512_maskz_extractf32x8_ps(0xff, a, index);
  }

  static void steps(const double* to, double from, float* out) { Float8::steps(to, from, out); }

  template <int count>
  static void sums(const Register* a, float* out) {
    Float8::Register halves[count];
    for (int i = 0; i < count; ++i) halves[i] = _mm256_add_ps(half<0>(a[i]), half<1>(a[i]));
    Float8::sums<count>(halves, out);
  }
};

struct Double8 {
  using Scalar = double;
  using Register = __m512d;
  static constexpr int lanes = 8;
  static constexpr int tile_sources = 2;
  static constexpr int tile_targets = 6;
  static constexpr int registers = 32;

  static Register zero() { return _mm512_setzero_pd(); }
  static Register broadcast(double a) { return _mm512_set1_pd(a); }
  static Register load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Register a) { _mm512_storeu_pd(p, a); }
  static void stream(double* p, Register a) { _mm512_stream_pd(p, a); }
  static Register fma(Register a, Register b, Register c) { return _mm512_fmadd_pd(a, b, c); }
  static Register mul(Register a, Register b) { return _mm512_mul_pd(a, b); }
  static Register sub(Register a, Register b) { return _mm512_sub_pd(a, b); }
  template <int index>
  static Double4::Register half(Register a) {
    return _mm512_maskz_extractf64x4_pd(0xf, a, index);
  }

  static void steps(const double* to, double from, double* out) { Double4::steps(to, from, out); }

  template <int count>
  static void sums(const Register* a, double* out) {
    Double4::Register halves[count];
    for (int i = 0; i < count; ++i) halves[i] = _mm256_add_pd(half<0>(a[i]), half<1>(a[i]));
    Double4::sums<count>(halves, out);
  }
};

using Float = Float16;
using Double = Double8;

#elif defined(__AVX2__)

using Float = Float8;
using Double = Double4;

#else

// 16-byte vectors of the compiler: SSE2 (no fused multiply-add), NEON, or whatever the machine has.
template <class T, int sources, int targets>
struct Vector16 {
  using Scalar = T;
  typedef T Register __attribute__((vector_size(16)));
  static constexpr int lanes = 16 / sizeof(T);
  static constexpr int tile_sources = sources;
  static constexpr int tile_targets = targets;
#if defined(__aarch64__)
  static constexpr int registers = 32;
#else
  static constexpr int registers = 16;
#endif

  static Register zero() { return Register{}; }
  static Register broadcast(T a) { return Register{} + a; }
  static Register load(const T* p) {
    Register a;
    __builtin_memcpy(&a, p, sizeof(a));
    return a;
  }
  static void store(T* p, Register a) { __builtin_memcpy(p, &a, sizeof(a)); }
  static void stream(T* p, Register a) { store(p, a); }
  static Register mul(Register a, Register b) { return a * b; }
  static Register sub(Register a, Register b) { return a - b; }
#if defined(__aarch64__)
  static Register fma(Register a, Register b, Register c) {
    if constexpr (sizeof(T) == 4)
      return vfmaq_f32(c, a, b);
    else
      return vfmaq_f64(c, a, b);
  }
#else
  static Register fma(Register a, Register b, Register c) { return a * b + c; }
#endif

  static void steps(const double* to, double from, T* out) {
    for (int t = 0; t < tile_targets; ++t) out[t] = static_cast<T>(to[t] - from);
  }

  template <int count>
  static void sums(const Register* a, T* out) {
    for (int i = 0; i < count; ++i) {
      if constexpr (lanes == 4)
        out[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
      else
        out[i] = a[i][0] + a[i][1];
    }
  }
};

#if defined(__aarch64__)
using Float = Vector16<float, 2, 6>;
using Double = Vector16<double, 2, 6>;
#else
using Float = Vector16<float, 1, 6>;
using Double = Vector16<double, 1, 6>;
#endif

#endif
