// Runs CUDA C++ kernels on the host, for tests: the machines that build this package have nvcc and no GPU.
//
// Fibers (default): one fiber per CUDA thread, all in one thread of the operating system. A seed decides how many blocks are
//   resident, in which order blocks start and who runs next. Reported as errors: barriers and shuffles that not all threads
//   reach at the same place, deadlock, loads and stores that are misaligned or outside every allocation, memory read through
//   the read-only path and written in the same launch. Shared memory starts out poisoned.
// Threads (-DSIMT_OS_THREADS): one thread of the operating system per CUDA thread, under -fsanitize=thread, which then sees
//   every pair of accesses that no barrier or fence orders. Block barriers order memory; shuffles and relaxed atomics do not.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

using Site = std::source_location;

[[noreturn]] inline void fail(const char* what, const Site& a = {}, const Site& b = {}) {
  std::fprintf(stderr, "simt: %s", what);
  for (const Site& site : {a, b}) {
    if (site.line() != 0) {
      std::fprintf(stderr, " [%s:%u]", site.file_name(), static_cast<unsigned>(site.line()));
    }
  }
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::_Exit(70);
}

struct Config {
  uint64_t seed = 1;
  unsigned max_resident = 4;  // blocks alive at once, as SMs would hold them; at least 1 is drawn
  double yield_probability = 0.002;  // at every access to global memory
  // What the launch code is told of the device.
  unsigned num_sms = 2;
  unsigned blocks_per_sm = 4;
  unsigned l2_bytes = 32U << 20;
  bool launches_cooperatively = true;
};
inline Config& config() {
  static Config instance;
  return instance;
}
inline unsigned num_sms() { return config().num_sms; }

struct Counters {
  uint64_t launches = 0, barriers = 0, shuffles = 0, fences = 0, atomics = 0;
};
inline Counters& counters() {
  static Counters instance;
  return instance;
}

// ---- guarded memory --------------------------------------------------------------------------------------------------

// One arena with a flag byte per byte. Between allocations lie red zones of known content; every access through an intrinsic is
// checked against the flags, and check_red_zones() finds what plain stores did.
class Arena {
 public:
  static constexpr size_t kBytes = size_t{64} << 20;
  static constexpr size_t kRedZone = 64;
  static constexpr uint8_t kAllocated = 1, kReadOnlyLoaded = 2, kWritten = 4;
  static constexpr uint8_t kRedZoneByte = 0xa5;

  static Arena& instance() {
    static Arena arena;
    return arena;
  }

  // `misalignment` bytes past a multiple of 256.
  void* allocate(size_t bytes, size_t misalignment = 0) {
    size_t begin = (used_ + kRedZone + 255) / 256 * 256 + misalignment;
    if (begin + bytes + kRedZone > kBytes) {
      fail("the arena is full");
    }
    std::memset(memory_.get() + used_, kRedZoneByte, begin - used_);
    std::memset(memory_.get() + begin, 0xff, bytes);  // NaN: nothing may rely on fresh memory
    std::memset(memory_.get() + begin + bytes, kRedZoneByte, kRedZone);
    std::memset(flags_.get() + begin, kAllocated, bytes);
    used_ = begin + bytes;
    return memory_.get() + begin;
  }
  void clear() {
    std::memset(flags_.get(), 0, used_ + kRedZone);
    used_ = 0;
  }
  void start_launch() {
    for (size_t k = 0; k < used_; ++k) {
      flags_[k] &= kAllocated;
    }
  }
  void check_red_zones() const {
    for (size_t k = 0; k < used_; ++k) {
      if (flags_[k] == 0 && memory_[k] != kRedZoneByte) {
        fail("a store outside every allocation");
      }
    }
  }

  void check(const void* address, size_t bytes, size_t alignment, bool is_store, bool is_read_only,
             const Site& site) {
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
      fail("misaligned access", site);
    }
    const auto at = static_cast<size_t>(static_cast<const uint8_t*>(address) - memory_.get());
    if (at >= kBytes) {
      return;  // memory of the host program: tensors of the operator tests
    }
    for (size_t k = at; k < at + bytes; ++k) {
      if ((flags_[k] & kAllocated) == 0) {
        fail(is_store ? "store outside every allocation" : "load outside every allocation", site);
      }
#if !defined(SIMT_OS_THREADS)
      if ((is_store && (flags_[k] & kReadOnlyLoaded) != 0) ||
          (is_read_only && (flags_[k] & kWritten) != 0)) {
        fail("memory is read through the read-only path and written in the same launch", site);
      }
      flags_[k] |= is_store ? kWritten : is_read_only ? kReadOnlyLoaded : 0;
#else
      (void)is_read_only;
#endif
    }
  }

 private:
  Arena() : memory_(new uint8_t[kBytes + 256]), flags_(new uint8_t[kBytes + 256]()) {}
  std::unique_ptr<uint8_t[]> memory_;
  std::unique_ptr<uint8_t[]> flags_;
  size_t used_ = 0;
};

// ---- what both backends offer ----------------------------------------------------------------------------------------

enum class Wait : uint8_t { kNone, kBlock, kWarp, kGrid };

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned lane();
void* shared_memory(size_t bytes);
uint64_t block_barrier_or(uint64_t value, const Site& site);
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, const Site& site);
void grid_barrier(const Site& site);
void fence();
void maybe_yield();
unsigned atomic_inc(unsigned* address, unsigned limit);
unsigned atomic_or(unsigned* address, unsigned bits);
void run_grid(dim3 grid, dim3 block, bool cooperative, const std::function<void()>& kernel);

template <typename Shared>
Shared& block_shared() {
  return *static_cast<Shared*>(shared_memory(sizeof(Shared)));
}

inline unsigned count(const dim3& d) { return d.x * d.y * d.z; }
inline uint3 unravel(unsigned rank, const dim3& d) {
  return {rank % d.x, rank / d.x % d.y, rank / d.x / d.y};
}

}  // namespace simt

#if defined(SIMT_OS_THREADS)
#include "os_threads.h"
#else
#include "fibers.h"
#endif
