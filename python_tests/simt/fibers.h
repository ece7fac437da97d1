// The fiber backend of simt.h.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>

// AddressSanitizer is told on which stack the program is. Other builds tell nobody.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and goes on on another stack.
extern "C" void simt_switch(void** save, void* load);
asm(R"(.text
.weak simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
using Context = void*;
inline void switch_context(Context& from, Context& to) { simt_switch(&from, to); }
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct StackBounds {
  const void* bottom = nullptr;
  size_t bytes = 0;
};

// Goes on on another stack, and returns once somebody comes back to this one.
inline void switch_stack(Context& from, Context& to, const StackBounds& stack_of_to) {
#if defined(__SANITIZE_ADDRESS__)
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(&frames, stack_of_to.bottom, stack_of_to.bytes);
  switch_context(from, to);
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#else
  (void)stack_of_to;
  switch_context(from, to);
#endif
}
// To be called first on a new stack. Returns where the stack lies that it was entered from.
inline StackBounds enter_stack() {
  StackBounds entered_from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &entered_from.bottom, &entered_from.bytes);
#endif
  return entered_from;
}
// To be called before a stack is used again: its last function has not returned, and its guards are still up.
inline void clear_guards(const StackBounds& stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.bottom, stack.bytes);
#else
  (void)stack;
#endif
}

constexpr size_t kStackBytes =
    size_t{256} << 10;  // committed page by page; large argument tables are copied onto it
constexpr size_t kSharedBytes = size_t{48} << 10;
constexpr unsigned kLanes = 32;

struct Block;

struct Thread {
  Context context{};
  uint8_t* stack = nullptr;
  Block* block = nullptr;
  unsigned rank = 0;
  Wait waits_for = Wait::kNone;
  bool is_done = false;
  Site site{};
  uint64_t value = 0;
  unsigned source = 0;
  unsigned mask = 0;
};

struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<std::vector<unsigned>> ready;  // per warp: ranks that can run
  std::vector<uint64_t> priority;            // per warp
  unsigned num_ready = 0;
  unsigned num_done = 0;
  unsigned num_at_barrier = 0;
  size_t shared_used = 0;
  std::vector<uint8_t> shared;
};

struct Grid {
  dim3 grid, block;
  bool cooperative = false;
  const std::function<void()>* kernel = nullptr;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<unsigned> order;
  size_t next = 0;
  unsigned num_at_grid_barrier = 0;
  double yield_probability = 0.0;
  Context scheduler{};
  StackBounds scheduler_stack;
};

inline Grid* active_grid = nullptr;
inline Thread* active_thread = nullptr;
inline std::vector<uint8_t*>& free_stacks() {
  static std::vector<uint8_t*> stacks;
  return stacks;
}

inline uint3 thread_index() { return unravel(active_thread->rank, active_grid->block); }
inline uint3 block_index() { return active_thread->block->index; }
inline dim3 block_size() { return active_grid->block; }
inline dim3 grid_size() { return active_grid->grid; }
inline unsigned lane() { return active_thread->rank % kLanes; }

inline void make_ready(Thread& thread) {
  thread.waits_for = Wait::kNone;
  thread.block->ready[thread.rank / kLanes].push_back(thread.rank);
  thread.block->num_ready++;
}
inline void to_scheduler() {
  switch_stack(active_thread->context, active_grid->scheduler, active_grid->scheduler_stack);
}

inline void* shared_memory(size_t bytes) {
  Block& block = *active_thread->block;
  if (block.shared_used != 0 && block.shared_used != bytes) {
    fail("block_shared() of two types in one kernel");
  }
  if (bytes > block.shared.size()) {
    fail("more static shared memory than a block has");
  }
  block.shared_used = bytes;
  return block.shared.data();
}

inline uint64_t block_barrier_or(uint64_t value, const Site& site) {
  Thread& self = *active_thread;
  Block& block = *self.block;
  self.waits_for = Wait::kBlock;
  self.site = site;
  self.value = value;
  if (++block.num_at_barrier == block.threads.size()) {
    uint64_t any = 0;
    for (Thread& thread : block.threads) {
      if (thread.site.line() != site.line()) {
        fail("threads of a block wait at different barriers", site, thread.site);
      }
      any |= thread.value;
    }
    block.num_at_barrier = 0;
    counters().barriers++;
    for (Thread& thread : block.threads) {
      thread.value = any;
      make_ready(thread);
    }
  }
  to_scheduler();
  return self.value;
}

inline uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, const Site& site) {
  Thread& self = *active_thread;
  Block& block = *self.block;
  if ((mask >> lane() & 1U) == 0 || source >= kLanes || (mask >> source & 1U) == 0) {
    fail("shuffle: the caller or its source is not in the mask", site);
  }
  self.waits_for = Wait::kWarp;
  self.site = site;
  self.value = value;
  self.source = source;
  self.mask = mask;
  Thread* const warp = &block.threads[self.rank / kLanes * kLanes];
  bool is_complete = true;
  for (unsigned k = 0; k < kLanes && is_complete; ++k) {
    is_complete = (mask >> k & 1U) == 0 || warp[k].waits_for == Wait::kWarp;
  }
  if (is_complete) {
    uint64_t values[kLanes];
    for (unsigned k = 0; k < kLanes; ++k) {
      values[k] = warp[k].value;
    }
    counters().shuffles++;
    for (unsigned k = 0; k < kLanes; ++k) {
      if ((mask >> k & 1U) != 0) {
        if (warp[k].mask != mask || warp[k].site.line() != site.line()) {
          fail("shuffle: lanes disagree on the mask or the place", site, warp[k].site);
        }
        warp[k].value = values[warp[k].source];
        make_ready(warp[k]);
      }
    }
  }
  to_scheduler();
  return self.value;
}

inline void grid_barrier(const Site& site) {
  Grid& grid = *active_grid;
  if (!grid.cooperative) {
    fail("a grid barrier in a launch that is not cooperative", site);
  }
  active_thread->waits_for = Wait::kGrid;
  active_thread->site = site;
  if (++grid.num_at_grid_barrier == count(grid.grid) * count(grid.block)) {
    grid.num_at_grid_barrier = 0;
    for (auto& block : grid.resident) {
      for (Thread& thread : block->threads) {
        make_ready(thread);
      }
    }
  }
  to_scheduler();
}

inline void yield() {
  make_ready(*active_thread);
  to_scheduler();
}
inline void maybe_yield() {
  if (active_grid->yield_probability > 0.0 &&
      static_cast<double>(active_grid->random() >> 11) * 0x1p-53 < active_grid->yield_probability) {
    yield();
  }
}
inline void fence() {
  counters().fences++;
  yield();
}
inline unsigned atomic_or(unsigned* address, unsigned bits) {
  counters().atomics++;
  yield();
  const unsigned old = *address;
  *address = old | bits;
  yield();
  return old;
}
inline unsigned atomic_inc(unsigned* address, unsigned limit) {
  counters().atomics++;
  yield();
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  yield();
  return old;
}

inline void thread_main() {
  active_grid->scheduler_stack = enter_stack();
  (*active_grid->kernel)();
  Block& block = *active_thread->block;
  if (block.num_at_barrier != 0) {
    fail("a thread has exited while others of its block wait at a barrier");
  }
  active_thread->is_done = true;
  block.num_done++;
  to_scheduler();
  fail("a finished thread runs again");
}

inline void start_block(Grid& grid) {
  auto block = std::make_unique<Block>();
  block->index = unravel(grid.order[grid.next++], grid.grid);
  const unsigned num_threads = count(grid.block);
  const unsigned num_warps = (num_threads + kLanes - 1) / kLanes;
  block->threads.resize(num_threads);
  block->ready.resize(num_warps);
  block->shared.assign(kSharedBytes, 0xff);
  for (unsigned warp = 0; warp < num_warps; ++warp) {
    block->priority.push_back(grid.random());
  }
  for (unsigned rank = 0; rank < num_threads; ++rank) {
    Thread& thread = block->threads[rank];
    thread.block = block.get();
    thread.rank = rank;
    if (free_stacks().empty()) {
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) {
        fail("no memory for a stack");
      }
      free_stacks().push_back(static_cast<uint8_t*>(stack));
    }
    thread.stack = free_stacks().back();
    free_stacks().pop_back();
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(thread.stack + kStackBytes);
    *--top = nullptr;  // where thread_main would return to; keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&thread_main);
    for (int saved = 0; saved < 6; ++saved) {
      *--top = nullptr;
    }
    thread.context = top;
#else
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.context, thread_main, 0);
#endif
    make_ready(thread);
  }
  grid.resident.push_back(std::move(block));
}

// Half the seeds draw among all warps that can run; the others follow random priorities that seldom change, so that one warp
// can run far ahead of another.
inline unsigned choose_thread(Grid& grid, Block& block, bool by_priority) {
  unsigned warp = 0;
  if (by_priority) {
    bool found = false;
    for (unsigned k = 0; k < block.ready.size(); ++k) {
      if (!block.ready[k].empty() && (!found || block.priority[k] > block.priority[warp])) {
        warp = k;
        found = true;
      }
    }
  } else {
    do {
      warp = static_cast<unsigned>(grid.random() % block.ready.size());
    } while (block.ready[warp].empty());
  }
  auto& ready = block.ready[warp];
  std::swap(ready[grid.random() % ready.size()], ready.back());
  const unsigned rank = ready.back();
  ready.pop_back();
  block.num_ready--;
  return rank;
}

inline void run_grid(dim3 grid_dim, dim3 block_dim, bool cooperative,
                     const std::function<void()>& kernel) {
  Config& settings = config();
  Grid grid;
  grid.grid = grid_dim;
  grid.block = block_dim;
  grid.cooperative = cooperative;
  grid.kernel = &kernel;
  grid.random.seed(settings.seed);
  settings.seed = settings.seed * 6364136223846793005ULL +
                  1442695040888963407ULL;  // the next launch gets another schedule
  grid.yield_probability = settings.yield_probability;
  const bool by_priority = (grid.random() & 1U) != 0;
  const unsigned num_blocks = count(grid_dim);
  const unsigned max_resident =
      cooperative ? num_blocks : 1 + static_cast<unsigned>(grid.random() % settings.max_resident);
  for (unsigned k = 0; k < num_blocks; ++k) {
    grid.order.push_back(k);
  }
  std::shuffle(grid.order.begin(), grid.order.end(), grid.random);
  Arena::instance().start_launch();
  counters().launches++;
  active_grid = &grid;
  while (grid.resident.size() < max_resident && grid.next < num_blocks) {
    start_block(grid);
  }
  while (!grid.resident.empty()) {
    std::vector<unsigned> candidates;
    for (unsigned k = 0; k < grid.resident.size(); ++k) {
      if (grid.resident[k]->num_ready != 0) {
        candidates.push_back(k);
      }
    }
    if (candidates.empty()) {
      fail("deadlock: the threads left wait at a barrier or a shuffle that others never reach");
    }
    const unsigned chosen = candidates[grid.random() % candidates.size()];
    Block& block = *grid.resident[chosen];
    if (grid.random() % 8 == 0) {
      for (auto& priority : block.priority) {
        priority = grid.random();
      }
    }
    for (uint64_t burst = 1 + grid.random() % (4 * block.threads.size());
         burst != 0 && block.num_ready != 0; --burst) {
      active_thread = &block.threads[choose_thread(grid, block, by_priority)];
      switch_stack(grid.scheduler, active_thread->context, {active_thread->stack, kStackBytes});
    }
    if (block.num_done == block.threads.size()) {
      for (Thread& thread : block.threads) {
        clear_guards({thread.stack, kStackBytes});
        free_stacks().push_back(thread.stack);
      }
      grid.resident.erase(grid.resident.begin() + chosen);
      if (grid.next < num_blocks) {
        start_block(grid);
      }
    }
  }
  active_grid = nullptr;
  active_thread = nullptr;
  Arena::instance().check_red_zones();
}

}  // namespace simt
