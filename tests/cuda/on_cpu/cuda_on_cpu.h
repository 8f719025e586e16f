// Runs CUDA sources on an x86-64 CPU, unchanged. One block at a time; every thread is a fiber that
// runs until it meets a barrier or a warp collective. Those are real: threads wait for all that
// must take part, and a block in which nobody can go on ends the process. Shared memory starts
// poisoned. Threads run in an order that can be permuted, so that a missing barrier shows as
// another result.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__
#define __align__(bytes)

struct float4 {
  float x, y, z, w;
};
struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx, gridDim;
constexpr size_t SHARED_BYTES = 1 << 18;
constexpr size_t GUARD_BYTES = 4096;  // behind a block's memory, to see whether it is left alone
alignas(128) unsigned char shared_bytes[SHARED_BYTES + GUARD_BYTES];

// Saves the callee's registers and stack of one fiber and takes up those of another.
extern "C" void switch_fiber(void** from, void* to);
asm(R"(
.text
.globl switch_fiber
switch_fiber:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace cpu {

enum State { RUNNING, AT_BARRIER, AT_COLLECTIVE, DONE };
constexpr size_t STACK_BYTES = 1 << 16;

struct Fiber {
  void* stack_pointer = nullptr;
  State state = RUNNING;
  uint32_t mask = 0;        // of the collective it waits in
  uint32_t offered = 0;     // what it brings to the collective, ...
  uint32_t heard[32] = {};  // ... and what all lanes brought when it was complete
  int voted[2] = {};        // votes of barriers, in turns: a slot is written when all have read it
  unsigned turn = 0;
  std::vector<char> stack = std::vector<char>(STACK_BYTES);
};

static std::vector<Fiber> fibers;
static void* scheduler;
static int current, count;
static void (*body)(void*);  // of a thread; no std::function, whose header costs every build
static void* bound;
static unsigned order = 0;  // 0: ascending, 1: descending, others: seeds of random orders

static void wait(State state) {
  const int self = current;
  fibers[self].state = state;
  switch_fiber(&fibers[self].stack_pointer, scheduler);
}

static void enter() {
  body(bound);
  wait(DONE);
}

[[noreturn]] static void fail(const char* what) {
  fprintf(stderr, "block (%u, %u): %s\n", blockIdx.x, blockIdx.y, what);
  abort();
}

static void start(int threads) {
  count = threads;
  if ((int)fibers.size() < threads) fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = RUNNING;
    auto top = ((uintptr_t)fiber.stack.data() + STACK_BYTES) & ~(uintptr_t)15;
    void** stack = (void**)top;
    *--stack = nullptr;
    *--stack = (void*)enter;
    for (int saved = 0; saved < 6; ++saved) *--stack = nullptr;
    fiber.stack_pointer = stack;
  }
}

// Lets those go on whose collective is complete: all lanes of the mask wait in it.
static bool release_collectives() {
  bool released = false;
  for (int i = 0; i < count; ++i) {
    if (fibers[i].state != AT_COLLECTIVE) continue;
    const int warp = i & ~31;
    const uint32_t mask = fibers[i].mask;
    if (!(mask >> (i & 31) & 1)) fail("a collective without its own thread");
    bool complete = true;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1)
        complete &= warp + lane < count && fibers[warp + lane].state == AT_COLLECTIVE &&
                    fibers[warp + lane].mask == mask;
    if (!complete) continue;
    uint32_t brought[32] = {};
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) brought[lane] = fibers[warp + lane].offered;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) {
        memcpy(fibers[warp + lane].heard, brought, sizeof brought);
        fibers[warp + lane].state = RUNNING;
      }
    released = true;
  }
  return released;
}

static bool release_barrier() {
  int waiting = 0, done = 0;
  for (int i = 0; i < count; ++i) {
    waiting += fibers[i].state == AT_BARRIER;
    done += fibers[i].state == DONE;
  }
  if (waiting == 0 || waiting + done < count) return false;
  if (done) fail("a barrier that some threads have left behind");
  for (int i = 0; i < count; ++i) fibers[i].state = RUNNING;
  return true;
}

template <class Kernel>
static void run_block(int threads, size_t shared, Kernel kernel) {
  body = [](void* called) { (*(Kernel*)called)(); };
  bound = &kernel;
  start(threads);
  memset(shared_bytes, 0xA5, shared + GUARD_BYTES);
  std::vector<int> turn(threads);
  for (int i = 0; i < threads; ++i) turn[i] = order == 1 ? threads - 1 - i : i;
  unsigned random = order;
  for (;;) {
    if (order > 1)
      for (int i = threads - 1; i > 0; --i) {
        random = random * 1664525u + 1013904223u;
        std::swap(turn[i], turn[(random >> 8) % (i + 1)]);
      }
    bool progress = false;
    for (int i : turn)
      if (fibers[i].state == RUNNING) {
        current = i;
        threadIdx.x = i;
        switch_fiber(&scheduler, fibers[i].stack_pointer);
        progress = true;
      }
    progress |= release_collectives();
    bool done = true;
    for (int i = 0; i < threads; ++i) done &= fibers[i].state == DONE;
    if (done) break;
    progress |= release_barrier();
    if (!progress) fail("deadlock: threads wait for one another");
  }
  for (size_t i = shared; i < shared + GUARD_BYTES; ++i)
    if (shared_bytes[i] != 0xA5) fail("writes past the shared memory it is launched with");
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
  kernel(*(A*)parameters[I]...);
}

// Runs all blocks of a launch, one after another; parameters as cuLaunchKernel takes them.
template <class... A>
static void launch(void (*kernel)(A...), Index grid, int threads, size_t shared,
                   unsigned order_of_threads, void** parameters, int count_of_parameters) {
  if (sizeof...(A) != count_of_parameters) fail("another number of parameters");
  if (shared > SHARED_BYTES) fail("more shared memory than there is");
  order = order_of_threads;
  gridDim = grid;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      run_block(threads, shared,
                [&] { call(kernel, parameters, std::index_sequence_for<A...>{}); });
}

// Brings a value to a collective; returns what every lane of the mask brought.
static const uint32_t* meet(uint32_t mask, uint32_t value) {
  Fiber& self = fibers[current];
  self.offered = value;
  self.mask = mask;
  const int own = current;
  wait(AT_COLLECTIVE);
  return fibers[own].heard;
}

template <class T>
static T exchange(uint32_t mask, T value, int source) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = meet(mask, bits)[source];
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace cpu

// Defines what Python calls to launch a kernel.
#define LAUNCHED_ON_CPU(kernel)                                                      \
  extern "C" void kernel##_on_cpu(unsigned x, unsigned y, int threads, size_t bytes, \
                                  unsigned order, void** parameters, int count) {    \
    cpu::launch(kernel, {x, y, 1}, threads, bytes, order, parameters, count);        \
  }

static inline void __syncthreads() { cpu::wait(cpu::AT_BARRIER); }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { cpu::meet(mask, 0); }
static inline int __syncthreads_count(int vote) {
  cpu::Fiber& self = cpu::fibers[cpu::current];
  const unsigned slot = self.turn++ & 1;
  self.voted[slot] = vote != 0;
  cpu::wait(cpu::AT_BARRIER);
  int sum = 0;
  for (int i = 0; i < cpu::count; ++i) sum += cpu::fibers[i].voted[slot];
  return sum;
}
static inline int __syncthreads_or(int vote) { return __syncthreads_count(vote) != 0; }
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int step) {
  return cpu::exchange(mask, value, (cpu::current & 31) ^ step);
}
template <class T>
static inline T __shfl_sync(unsigned mask, T value, int lane) {
  return cpu::exchange(mask, value, lane & 31);
}
static inline unsigned __ballot_sync(unsigned mask, int vote) {
  const uint32_t* brought = cpu::meet(mask, vote != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= brought[lane] << lane;
  return votes;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
static inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.f / a; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
