// The shapes of AVX-512 (lanes, tile) on plain arrays, so that they run on any machine. Stands in
// for cpu/vec.h, and is included the same way, inside a namespace.

static void fence() {}

template <class T, int width>
struct Emulated {
  using Scalar = T;
  struct Register {
    T lane[width];
  };
  static constexpr int lanes = width;
  static constexpr int tile_sources = 2;
  static constexpr int tile_targets = 6;
  static constexpr int registers = 32;

  static Register zero() { return broadcast(0); }
  static Register broadcast(T a) {
    Register out;
    for (T& lane : out.lane) lane = a;
    return out;
  }
  static Register load(const T* p) {
    Register out;
    for (int i = 0; i < width; ++i) out.lane[i] = p[i];
    return out;
  }
  static void store(T* p, Register a) {
    for (int i = 0; i < width; ++i) p[i] = a.lane[i];
  }
  static void stream(T* p, Register a) { store(p, a); }
  static Register fma(Register a, Register b, Register c) {
    for (int i = 0; i < width; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static Register mul(Register a, Register b) {
    for (int i = 0; i < width; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static Register sub(Register a, Register b) {
    for (int i = 0; i < width; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static void steps(const double* to, double from, T* out) {
    for (int t = 0; t < tile_targets; ++t) out[t] = static_cast<T>(to[t] - from);
  }
  template <int count>
  static void sums(const Register* a, T* out) {
    for (int i = 0; i < count; ++i) {
      Register folded = a[i];
      for (int n = width / 2; n > 0; n /= 2)
        for (int k = 0; k < n; ++k) folded.lane[k] += folded.lane[k + n];
      out[i] = folded.lane[0];
    }
  }
};

using Float = Emulated<float, 16>;
using Double = Emulated<double, 8>;
