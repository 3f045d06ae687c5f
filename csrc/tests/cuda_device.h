// What the launches of csrc/cuda/step.h need of a device, on the host.
#pragma once

#include <type_traits>

#include "cuda/step.h"

namespace oss::cuda {

// A100, H200, B200, laptop.
inline const Device devices[] = {
    {108, 163 << 10}, {132, 227 << 10}, {148, 227 << 10}, {20, 99 << 10}};

// A device whose memory is the host's; workspaces start as NaN.
class Host {
 public:
  explicit Host(const Device& device) : device_(device) {}

  const Device& device() const { return device_; }

  void* allocate(int64_t bytes) {
    workspace_bytes += bytes;
    memory_.emplace_back(bytes + 16, static_cast<char>(0xff));
    const auto address = reinterpret_cast<uintptr_t>(memory_.back().data());
    return reinterpret_cast<void*>((address + 15) / 16 * 16);
  }

  template <class Args>
  void launch(void (*kernel)(Args), const Grid& grid, int threads, int64_t shared_bytes,
              const std::common_type_t<Args>& args) {
    host::Block block;
    block.body = [&] { kernel(args); };
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          host::run_block(block, threads, shared_bytes);
        }
  }

  int64_t workspace_bytes = 0;

 private:
  const Device device_;
  std::vector<std::vector<char>> memory_;
};

}  // namespace oss::cuda
