// Prints how many billion float32 multiply-adds per second a CUDA device does:
//
//     nvcc -O3 -arch=native fma_peak.cu -o fma_peak && ./fma_peak
//
// Sixteen independent chains per thread keep every pipe full.

#include <cstdio>

constexpr int chains = 16, rounds = 4096, threads = 256, blocks_per_multiprocessor = 8;

__global__ void work(float* out, float a, float b) {
  float sum[chains];
  for (int c = 0; c < chains; ++c) sum[c] = threadIdx.x + c;
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int c = 0; c < chains; ++c) sum[c] = fmaf(sum[c], a, b);
  }
  float total = 0;
  for (int c = 0; c < chains; ++c) total += sum[c];
  if (total == 12345.0f) *out = total;  // so that the work is not dropped
}

int main() {
  cudaDeviceProp device;
  cudaGetDeviceProperties(&device, 0);
  const int blocks = blocks_per_multiprocessor * device.multiProcessorCount;
  float* out;
  cudaMalloc(&out, sizeof(float));
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  float best = 0;
  for (int repeat = 0; repeat < 20; ++repeat) {
    cudaEventRecord(begin);
    work<<<blocks, threads>>>(out, 0.999f, 0.001f);
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    const float rate = 1e-6f * blocks * threads * chains * rounds / ms;
    if (rate > best) best = rate;
  }
  if (cudaGetLastError() != cudaSuccess) return 1;
  std::printf("%.3f\n", best);
}
