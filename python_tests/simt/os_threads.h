// The backend of simt.h with one thread of the operating system per CUDA thread, for ThreadSanitizer.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <thread>

namespace simt {

constexpr size_t kSharedBytes = size_t{48} << 10;
constexpr unsigned kLanes = 32;

// Waits in the kernel of the operating system by bare system calls: std::barrier and std::mutex are known to ThreadSanitizer as
// synchronisation of their own, and would hide what the CUDA barrier does not order. kOrders: whether passing it orders memory.
template <bool kOrders>
class Barrier {
 public:
  explicit Barrier(unsigned count) : left_(count), count_(count) {}

  void wait() {
    constexpr auto kJoin = kOrders ? std::memory_order_acq_rel : std::memory_order_relaxed;
    constexpr auto kRead = kOrders ? std::memory_order_acquire : std::memory_order_relaxed;
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (left_.fetch_sub(1, kJoin) == 1) {
      left_.store(count_, std::memory_order_relaxed);
      phase_.fetch_add(1, kJoin);
      syscall(SYS_futex, reinterpret_cast<unsigned*>(&phase_), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
              nullptr, 0);
      return;
    }
    while (phase_.load(kRead) == phase) {
      syscall(SYS_futex, reinterpret_cast<unsigned*>(&phase_), FUTEX_WAIT_PRIVATE, phase, nullptr,
              nullptr, 0);
    }
  }

 private:
  std::atomic<unsigned> left_;
  std::atomic<unsigned> phase_{0};
  unsigned count_;
};

struct Block {
  uint3 index{};
  std::unique_ptr<Barrier<true>> barrier;
  std::vector<std::unique_ptr<Barrier<false>>> warp_barriers;
  std::unique_ptr<std::atomic<uint64_t>[]> lane_values;
  std::atomic<uint64_t> any[3] = {0, 0, 0};
  std::vector<uint8_t> shared;
};

struct Grid {
  dim3 grid, block;
  std::unique_ptr<Barrier<true>> barrier;
};

struct Thread {
  Block* block;
  unsigned rank;
  unsigned num_block_barriers = 0;
  bool has_fenced = false;  // since its latest atomic operation
  std::atomic<unsigned>* latest_atomic = nullptr;
};

inline Grid* active_grid = nullptr;
inline thread_local Thread* active_thread = nullptr;

inline uint3 thread_index() { return unravel(active_thread->rank, active_grid->block); }
inline uint3 block_index() { return active_thread->block->index; }
inline dim3 block_size() { return active_grid->block; }
inline dim3 grid_size() { return active_grid->grid; }
inline unsigned lane() { return active_thread->rank % kLanes; }
inline void* shared_memory(size_t bytes) {
  if (bytes > kSharedBytes) {
    fail("more static shared memory than a block has");
  }
  return active_thread->block->shared.data();
}

inline uint64_t block_barrier_or(uint64_t value, const Site&) {
  Block& block = *active_thread->block;
  const unsigned number = active_thread->num_block_barriers++;
  if (value != 0) {
    block.any[number % 3].store(1, std::memory_order_relaxed);
  }
  block.barrier->wait();
  // Everybody is here, so everybody has read the word of the barrier before; it serves again at the next but one.
  block.any[(number + 2) % 3].store(0, std::memory_order_relaxed);
  return block.any[number % 3].load(std::memory_order_relaxed);
}

inline uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, const Site& site) {
  if (mask != ~0U || source >= kLanes) {
    fail("this backend knows shuffles of full warps only", site);
  }
  Block& block = *active_thread->block;
  const unsigned warp = active_thread->rank / kLanes;
  block.lane_values[active_thread->rank].store(value, std::memory_order_relaxed);
  block.warp_barriers[warp]->wait();
  const uint64_t result = block.lane_values[warp * kLanes + source].load(std::memory_order_relaxed);
  block.warp_barriers[warp]->wait();
  return result;
}

inline void grid_barrier(const Site&) { active_grid->barrier->wait(); }

// ThreadSanitizer has no fences of its own. A fence makes the thread's next atomic operation a release, and acquires what was
// released through its latest one: what a fence before and after a ticket means.
inline void fence() {
  active_thread->has_fenced = true;
  if (active_thread->latest_atomic != nullptr) {
    (void)active_thread->latest_atomic->load(std::memory_order_acquire);
  }
}
inline void maybe_yield() {}
inline unsigned atomic_or(unsigned* address, unsigned bits) {
  auto* word = reinterpret_cast<std::atomic<unsigned>*>(address);
  return word->fetch_or(bits, std::memory_order_relaxed);
}
inline unsigned atomic_inc(unsigned* address, unsigned limit) {
  auto* word = reinterpret_cast<std::atomic<unsigned>*>(address);
  const auto order =
      active_thread->has_fenced ? std::memory_order_release : std::memory_order_relaxed;
  unsigned old = word->load(std::memory_order_relaxed);
  while (!word->compare_exchange_weak(old, old >= limit ? 0 : old + 1, order,
                                      std::memory_order_relaxed)) {
  }
  active_thread->has_fenced = false;
  active_thread->latest_atomic = word;
  return old;
}

inline void run_grid(dim3 grid_dim, dim3 block_dim, bool cooperative,
                     const std::function<void()>& kernel) {
  const unsigned num_blocks = count(grid_dim);
  const unsigned num_threads = count(block_dim);
  Grid grid;
  grid.grid = grid_dim;
  grid.block = block_dim;
  grid.barrier = std::make_unique<Barrier<true>>(num_blocks * num_threads);
  active_grid = &grid;
  counters().launches++;
  std::mt19937_64 random(config().seed++);
  std::vector<unsigned> order(num_blocks);
  for (unsigned k = 0; k < num_blocks; ++k) {
    order[k] = k;
  }
  std::shuffle(order.begin(), order.end(), random);
  const unsigned resident = cooperative ? num_blocks : std::min(num_blocks, config().max_resident);
  for (unsigned first = 0; first < num_blocks; first += resident) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::thread> threads;
    for (unsigned k = first; k < std::min(num_blocks, first + resident); ++k) {
      auto block = std::make_unique<Block>();
      block->index = unravel(order[k], grid_dim);
      block->barrier = std::make_unique<Barrier<true>>(num_threads);
      for (unsigned warp = 0; warp * kLanes < num_threads; ++warp) {
        block->warp_barriers.push_back(
            std::make_unique<Barrier<false>>(std::min(kLanes, num_threads - warp * kLanes)));
      }
      block->lane_values = std::make_unique<std::atomic<uint64_t>[]>(num_threads + kLanes);
      block->shared.assign(kSharedBytes, 0xff);
      blocks.push_back(std::move(block));
    }
    for (auto& block : blocks) {
      for (unsigned rank = 0; rank < num_threads; ++rank) {
        threads.emplace_back([&kernel, owner = block.get(), rank] {
          Thread self{owner, rank};
          active_thread = &self;
          kernel();
        });
      }
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  }
  active_grid = nullptr;
  Arena::instance().check_red_zones();
}

}  // namespace simt
