// A CUDA device in plain C++, for the kernels of csrc/cuda: blocks run one after the other, the
// threads of a block as fibers that take turns at barriers and shuffles. It is strict where a GPU
// is lenient: shared memory starts as NaN, threads run in an order that is drawn again for every
// turn, and an asynchronous copy arrives either at once or only when it is waited for. The draws are
// the same in every run. Stands in for the CUDA part of cuda/platform.h.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define OSS_KERNEL static
#define OSS_DEVICE inline
#define OSS_EITHER inline
#define __launch_bounds__(...)

using std::fma;
using std::isfinite;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx;

namespace oss::cuda::host {

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  int size, valid;
};

struct Fiber {
  ucontext_t context;
  bool done = false;
  std::vector<std::vector<Copy>> groups{1};  // the last one is still open
};

// The block that is running.
struct Block {
  std::vector<Fiber> fibers;
  std::function<void()> body;
  std::vector<char> shared;
  std::vector<double> exchange;  // two slots per thread, used in turn
  std::vector<Barrier> warps;
  Barrier all;
  int running = 0, current = 0;
  ucontext_t scheduler;
};
inline Block* block = nullptr;
inline std::minstd_rand draws;
constexpr size_t kStack = 128 << 10;

// The stack of the thread with this number; kept, because making them takes longer than most
// blocks.
inline char* stack_of(int thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (static_cast<int>(stacks.size()) <= thread) stacks.emplace_back(new char[kStack]);
  return stacks[thread].get();
}

// Runs `to` until it gives way; tells the address sanitizer whose stack is in use.
inline void switch_context(ucontext_t* from, ucontext_t* to, const void* stack, size_t size,
                           bool last) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, stack, size);
  swapcontext(from, to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)stack, (void)size, (void)last;
  swapcontext(from, to);
#endif
}

inline const void* scheduler_stack = nullptr;
inline size_t scheduler_size = 0;

inline void give_way(bool last = false) {
  Fiber& me = block->fibers[block->current];
  switch_context(&me.context, &block->scheduler, scheduler_stack, scheduler_size, last);
}

inline void wait_at(Barrier& barrier, int count) {
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) give_way();
}

inline void start_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  block->body();
  block->fibers[block->current].done = true;
  --block->running;
  give_way(true);
}

inline void arrive(const Copy& copy) {
  std::memset(copy.to, 0, copy.size);
  std::memcpy(copy.to, copy.from, copy.valid);
}

// Runs body() as every thread of a block.
inline void run_block(Block& b, int threads, size_t shared_bytes) {
  block = &b;
  b.shared.assign(shared_bytes + 128, static_cast<char>(0xff));  // NaN in every type
  b.fibers.clear();
  b.fibers.resize(threads);
  b.exchange.assign(2 * threads, 0);
  b.warps.assign((threads + 31) / 32, {});
  b.all = {};
  b.running = threads;
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = b.fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack_of(t);
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start_fiber, 0);
  }
  const auto progress = [&] {
    int64_t sum = b.all.generation - b.running;
    for (const Barrier& warp : b.warps) sum += warp.generation;
    return sum;
  };
  std::vector<int> turns(threads);
  std::iota(turns.begin(), turns.end(), 0);
  while (b.running > 0) {
    const int64_t before = progress();
    std::shuffle(turns.begin(), turns.end(), draws);
    for (const int t : turns) {
      Fiber& fiber = b.fibers[t];
      if (fiber.done) continue;
      b.current = t;
      threadIdx = {static_cast<unsigned>(t), 0, 0};
      switch_context(&b.scheduler, &fiber.context, stack_of(t), kStack, false);
    }
    if (progress() == before) {
      std::printf("block (%u, %u, %u): threads wait for others that never come\n", blockIdx.x,
                  blockIdx.y, blockIdx.z);
      std::abort();
    }
  }
}

}  // namespace oss::cuda::host

// All threads that have not ended, as on a GPU from compute capability 7.0 on.
inline void __syncthreads() {
  auto& block = *oss::cuda::host::block;
  oss::cuda::host::wait_at(block.all, block.running);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  using namespace oss::cuda::host;
  Block& b = *block;
  const int me = b.current;
  Barrier& warp = b.warps[me / 32];
  // Who writes this slot next has passed another barrier, which all reach after reading.
  double* const slots = &b.exchange[warp.generation % 2 * b.fibers.size()];
  std::memcpy(&slots[me], &value, sizeof(T));
  wait_at(warp, 32);
  T other;
  std::memcpy(&other, &slots[me ^ mask], sizeof(T));
  return other;
}

namespace oss::cuda {

inline char* dynamic_shared() {
  const auto address = reinterpret_cast<uintptr_t>(host::block->shared.data());
  return reinterpret_cast<char*>((address + 127) / 128 * 128);
}

inline void copy_async(void* to, const void* from, int valid = kCopyBytes) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (bits % kCopyBytes != 0) {
    std::printf("an asynchronous copy is not aligned\n");
    std::abort();
  }
  host::Fiber& me = host::block->fibers[host::block->current];
  const host::Copy copy{to, from, kCopyBytes, valid};
  if (host::draws() % 2 == 0)
    host::arrive(copy);
  else
    me.groups.back().push_back(copy);
}

inline void end_copies() { host::block->fibers[host::block->current].groups.emplace_back(); }

template <int pending>
void wait_copies() {
  auto& groups = host::block->fibers[host::block->current].groups;
  while (groups.size() > pending + 1) {  // and the open one
    for (const host::Copy& copy : groups.front()) host::arrive(copy);
    groups.erase(groups.begin());
  }
}

inline unsigned in_one_register(unsigned bits) { return bits; }
inline void hold_loads() {}

inline float multiply(float a, float b) { return a * b; }
inline double multiply(double a, double b) { return a * b; }

inline float half_to_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

inline uint16_t float_to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

}  // namespace oss::cuda
