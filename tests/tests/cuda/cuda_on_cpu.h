// Runs CUDA kernels on the processor: the threads of a block are fibers on one thread of the operating system, which take turns
// at every barrier and warp operation, in the order of their numbers. Blocks run one after the other, first to last or last to first. What a kernel computes is
// what a card would compute, but for rounding of library functions; how fast says nothing.
//
// Registers, memory order between blocks and alignment are not checked.
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
struct Dim3 { unsigned x, y, z; };
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
const size_t STACK = 64 * 1024;
struct Fiber { ucontext_t start; jmp_buf at; char *stack; bool started, done; };
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static ucontext_t outside;
static unsigned current;
static void (*body)(void **);
static bool backwards;
static void **arguments;
// What each lane of a warp offers to the others.
static uint32_t offered[1024];

static void enter() {
    body(arguments);
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

// Lets every other thread of the block run up to its next barrier.
static inline void pause() {
    if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
    threadIdx.x = current;
}

static void run_block(unsigned threads) {
    for (Fiber &fiber : fibers) fiber.started = fiber.done = false;
    for (bool left = true; left;) {
        left = false;
        for (unsigned i = 0; i < threads; i++) {
            Fiber &fiber = fibers[i];
            if (fiber.done) continue;
            left = true;
            current = i;
            threadIdx.x = i;
            if (_setjmp(scheduler) == 0) {
                if (fiber.started) _longjmp(fiber.at, 1);
                fiber.started = true;
                getcontext(&fiber.start);
                fiber.start.uc_stack.ss_sp = fiber.stack;
                fiber.start.uc_stack.ss_size = STACK;
                fiber.start.uc_link = 0;
                makecontext(&fiber.start, enter, 0);
                setcontext(&fiber.start);
            }
        }
    }
}

static void run(void (*kernel)(void **), unsigned blocks, unsigned threads, void **args) {
    while (fibers.size() < threads) {
        fibers.push_back(Fiber());
        fibers.back().stack = (char *)malloc(STACK);
    }
    body = kernel;
    arguments = args;
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
    for (unsigned block = 0; block < blocks; block++) {
        blockIdx = {backwards ? blocks - 1 - block : block, 0, 0};
        run_block(threads);
    }
}

template <class... A, size_t... I>
void unpack(void (*kernel)(A...), void **args, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A> *)args[I]...);
}
template <class... A> void call(void (*kernel)(A...), void **args) {
    unpack(kernel, args, std::index_sequence_for<A...>());
}
}

static inline void __syncthreads() { emulator::pause(); }

// All lanes offer, all read, and nobody offers again before all have read.
template <class T> static inline T exchange(T value, int lane) {
    static_assert(sizeof(T) == 4, "lanes exchange 32 bits");
    unsigned me = threadIdx.x, base = me / 32 * 32;
    memcpy(&emulator::offered[me], &value, 4);
    emulator::pause();
    T found;
    memcpy(&found, &emulator::offered[base + (unsigned)lane % 32], 4);
    emulator::pause();
    return found;
}
template <class T> static inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return exchange(value, (int)(threadIdx.x % 32) ^ mask);
}
template <class T> static inline T __shfl_up_sync(unsigned, T value, int delta) {
    int lane = (int)(threadIdx.x % 32);
    return exchange(value, lane >= delta ? lane - delta : lane);
}
template <class T> static inline T atomicAdd(T *at, T value) {
    T before = *at;
    *at += value;
    return before;
}
static inline int __popc(unsigned value) { return __builtin_popcount(value); }
static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
