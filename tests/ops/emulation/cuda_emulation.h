// Runs the CUDA kernels and their operators on the CPU, compiled by an ordinary compiler.
//
// Threads of a block are coroutines: they take turns where they wait for each other, one after the
// other, in an order that turns around from block to block and from launch to launch. A kernel that
// forgets to wait, or depends on the order of blocks, gives different results in the two orders; one
// whose threads wait in different places is reported. Races inside of what hardware does at once, and
// the speed of anything, are not seen.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <stdexcept>
#include <vector>

#define DEEPOPT_CUDA_LIBRARY STABLE_TORCH_LIBRARY_IMPL(deepopt_emulated, CPU, m)

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim(1), gridDim(1);

namespace emulation {

inline int64_t launches = 0;
inline std::set<const void*> on_host;  // tensors that are not on the device

class Block {
 public:
  void run(unsigned threads, bool backwards, std::function<void()> thread) {
    thread_ = std::move(thread);
    if (fibers_.size() < threads) fibers_.resize(threads);
    alive_ = threads;
    arrived_.assign(1 + (threads + 31) / 32, 0);
    passed_ = arrived_;
    threads_ = threads;
    for (unsigned t = 0; t < threads; ++t) start(t);
    while (alive_) {
      const int64_t before = progress_;
      for (unsigned i = 0; i < threads; ++i) {
        current_ = backwards ? threads - 1 - i : i;
        if (fibers_[current_].done) continue;
        threadIdx = {current_ % blockDim.x, current_ / blockDim.x % blockDim.y, 0};
        swapcontext(&scheduler_, &fibers_[current_].context);
      }
      if (progress_ == before) throw std::runtime_error("threads of a block wait in different places");
    }
  }

  void wait(bool warp) {
    const unsigned which = warp ? 1 + current_ / 32 : 0;
    const unsigned expected = warp ? std::min(32u, threads_ - current_ / 32 * 32) : threads_;
    const int64_t mine = passed_[which];
    if (++arrived_[which] == expected) {
      arrived_[which] = 0;
      ++passed_[which];
      ++progress_;
    }
    while (passed_[which] == mine) yield();
  }

  template <class T>
  T exchange(T x, unsigned other) {
    const unsigned me = current_;
    memcpy(&fibers_[me].slot, &x, sizeof x);
    wait(true);
    T result = x;
    if (other < threads_) memcpy(&result, &fibers_[other].slot, sizeof result);
    wait(true);
    return result;
  }

  unsigned current() const { return current_; }

 private:
  static constexpr size_t kStack = 1 << 16;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    uint64_t slot;
    bool done;
  };

  static void enter() { instance().live(); }
  void live() {
    thread_();
    fibers_[current_].done = true;
    --alive_;
    ++progress_;
    yield();
  }
  void start(unsigned t) {
    Fiber& fiber = fibers_[t];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Block::enter, 0);
  }
  void yield() {
    const unsigned me = current_;
    const uint3 index = threadIdx;
    swapcontext(&fibers_[me].context, &scheduler_);
    threadIdx = index;
  }

 public:
  static Block& instance() {
    static Block block;
    return block;
  }

 private:
  std::function<void()> thread_;
  std::vector<Fiber> fibers_;
  std::vector<unsigned> arrived_;
  std::vector<unsigned> passed_;
  ucontext_t scheduler_;
  unsigned threads_ = 0, current_ = 0, alive_ = 0;
  int64_t progress_ = 0;
};

}  // namespace emulation

inline void __syncthreads() { emulation::Block::instance().wait(false); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int away) {
  auto& block = emulation::Block::instance();
  return block.exchange(x, block.current() ^ unsigned(away));
}

inline float __bfloat162float(torch::headeronly::BFloat16 x) { return float(x); }
inline float __half2float(torch::headeronly::Half x) { return float(x); }
inline torch::headeronly::BFloat16 __float2bfloat16_rn(float x) { return x; }
inline torch::headeronly::Half __float2half_rn(float x) { return x; }

namespace deepopt {

using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;

template <class Kernel, class... Args>
void launch(Kernel kernel, int64_t blocks, dim3 threads, void*, const Args&... args) {
  const bool backwards = emulation::launches++ % 2;
  gridDim = dim3(unsigned(blocks));
  blockDim = threads;
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx = {unsigned(backwards ? blocks - 1 - b : b), 0, 0};
    emulation::Block::instance().run(threads.x * threads.y, (b + backwards) % 2,
                                     [&] { kernel(args...); });
  }
}

namespace cuda {

struct __attribute__((visibility("hidden"))) Device {
  explicit Device(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
  bool has(const torch::stable::Tensor& tensor) const {
    return !emulation::on_host.count(tensor.const_data_ptr());
  }
  void check_launch() const {}
};

}  // namespace cuda
}  // namespace deepopt

extern "C" inline __attribute__((used, visibility("default"))) int64_t deepopt_launches() {
  return emulation::launches;
}

// The next launches run in the other order than they would have.
extern "C" inline __attribute__((used, visibility("default"))) void deepopt_turn_around() {
  ++emulation::launches;
}

// The tensor at this address is on the host; null: none is any more.
extern "C" inline __attribute__((used, visibility("default"))) void deepopt_on_host(void* data) {
  if (!data) return emulation::on_host.clear();
  emulation::on_host.insert(data);
}
