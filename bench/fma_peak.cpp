// Prints how many billion float32 multiply-adds per second the machine does on so many threads:
//
//     g++ -O3 -march=native -pthread fma_peak.cpp -o fma_peak && ./fma_peak 2
//
// Twelve independent chains per thread keep two pipes of up to six cycles' latency full.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#ifdef __AVX512F__
constexpr int bytes = 64;
#elif defined(__AVX__)
constexpr int bytes = 32;
#else
constexpr int bytes = 16;
#endif
typedef float Vector __attribute__((vector_size(bytes)));
constexpr int lanes = bytes / 4;
constexpr int chains = 12;
constexpr long rounds = 100'000'000;

static void work(float* out) {
  Vector sum[chains];
  for (int c = 0; c < chains; ++c) sum[c] = Vector{} + static_cast<float>(c);
  Vector a = Vector{} + 0.999f, b = Vector{} + 0.001f;
  asm volatile("" : "+x"(a), "+x"(b));  // not constants to the compiler
  for (long r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) sum[c] = sum[c] * a + b;
  }
  for (int c = 0; c < chains; ++c) *out += sum[c][0];
}

int main(int, char** argv) {
  const int threads = std::atoi(argv[1]);
  std::vector<float> out(threads * 64);  // a cache line and more for each
  std::vector<std::thread> pool;
  const auto start = std::chrono::steady_clock::now();
  for (int t = 0; t < threads; ++t) pool.emplace_back(work, &out[t * 64]);
  for (auto& thread : pool) thread.join();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const double fmas = 1.0 * threads * rounds * chains * lanes;
  std::printf("%.3f\n", fmas / seconds.count() * 1e-9);
  return out[0] == 12345;  // so that the work is not dropped
}
