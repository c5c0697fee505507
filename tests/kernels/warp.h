// Lanes as threads of a CPU, so that a kernel's algebra runs without a GPU: what primitives.cuh does in PTX, and the few
// words of CUDA that decode.cu uses. Matrix fragments lie among lanes as the PTX manual says.
#pragma once
#define ON_HOST
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
#define __device__
#define __forceinline__ inline
#define __noinline__ static
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static
#define BLOCK_MEMORY(name) char* name = block_memory
using std::max;
using std::min;

struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Place { int x, y, z; };
static thread_local Place blockIdx, threadIdx, gridDim;
static char* block_memory;

struct Warp {  // what its lanes show each other
  std::unique_ptr<std::barrier<>> meet;
  u32 word[32], a[32][4], b[32][2];
};
static Warp all_warps[32];
static std::unique_ptr<std::barrier<>> whole_block;
static Warp& warp() { return all_warps[threadIdx.x / 32]; }
static int lane_number() { return threadIdx.x % 32; }

static void __syncwarp() { warp().meet->arrive_and_wait(); }
static void __syncthreads() { whole_block->arrive_and_wait(); }
static void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
static int atomicAdd(int* p, int x) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }
static float __uint_as_float(u32 x) { float r; memcpy(&r, &x, 4); return r; }
static u32 __float_as_uint(float x) { u32 r; memcpy(&r, &x, 4); return r; }

static u32 shown_by(u32 mine, int lane) {
  Warp& w = warp();
  w.word[lane_number()] = mine;
  __syncwarp();
  const u32 r = w.word[lane & 31];
  __syncwarp();
  return r;
}
static float __shfl_sync(u32, float x, int lane) { return __uint_as_float(shown_by(__float_as_uint(x), lane)); }
static float __shfl_xor_sync(u32, float x, int o) { return __shfl_sync(~0u, x, lane_number() ^ o); }
static int __shfl_sync(u32, int x, int lane) { return (int)shown_by((u32)x, lane); }
static int __shfl_up_sync(u32, int x, int o) { return (int)shown_by((u32)x, max(0, lane_number() - o)); }
static u32 __ballot_sync(u32, bool x) {
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (u32)(shown_by(x, i) != 0) << i;
  return r;
}
static int __popc(u32 x) { return __builtin_popcount(x); }
static float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static bool __any_sync(u32, bool x) {
  bool any = false;
  for (int i = 0; i < 32; i++) any |= shown_by(x, i) != 0;
  return any;
}

static float number(u16 h) { _Float16 x; memcpy(&x, &h, 2); return (float)x; }
static u16 to_half(float x) { const _Float16 y = (_Float16)x; u16 h; memcpy(&h, &y, 2); return h; }
static u16 to_brain(float x) { const u32 u = __float_as_uint(x); return (u + 0x7FFF + ((u >> 16) & 1)) >> 16; }
static u32 halves(float low, float high) { return to_half(low) | (u32)to_half(high) << 16; }
static u32 brains(float low, float high) { return to_brain(low) | (u32)to_brain(high) << 16; }
static u32 hmul2(u32 a, u32 b) { return halves(number(a) * number(b), number(a >> 16) * number(b >> 16)); }
static u32 hfma2(u32 a, u32 b, u32 c) {
  return halves(number(a) * number(b) + number(c), number(a >> 16) * number(b >> 16) + number(c >> 16));
}
static u32 hmax2(u32 a, u32 b) { return halves(fmaxf(number(a), number(b)), fmaxf(number(a >> 16), number(b >> 16))); }
static float ex2(float x) { return exp2f(x); }
static u32 prmt(u32 a, u32 b, u32 selector) {
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    const int from = selector >> (4 * i) & 7;
    r |= ((from < 4 ? a : b) >> (8 * (from & 3)) & 0xFF) << (8 * i);
  }
  return r;
}
static u16 half_of(u32 x, int i) { return i & 1 ? x >> 16 : x; }
static u32 transposed(u32 x) {  // 8 x 8 halves; a lane holds two neighbours of row lane / 4
  const int row = lane_number() / 4, column = lane_number() % 4 * 2;
  const u32 low = shown_by(x, 0);  // all words are shown; read them before anybody goes on
  (void)low;
  u32 r[2];
  for (int i = 0; i < 2; i++) r[i] = half_of(warp().word[(column + i) * 4 + row / 2], row);
  __syncwarp();
  return r[0] | r[1] << 16;
}
static float brain(u16 h) { return __uint_as_float((u32)h << 16); }
template <float (*Number)(u16)>
static void product_of(float* c, const u32* a, u32 b0, u32 b1, bool from_zero) {  // m16n8k16
  Warp& w = warp();
  const int lane = lane_number();
  memcpy(w.a[lane], a, 16), w.b[lane][0] = b0, w.b[lane][1] = b1;
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    double sum = from_zero ? 0 : c[i];
    for (int k = 0; k < 16; k++) {
      const u32 x = w.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], y = w.b[column * 4 + k % 8 / 2][k / 8];
      sum += (double)Number(half_of(x, k)) * Number(half_of(y, k));
    }
    c[i] = sum;
  }
  __syncwarp();
}
static void mma(float* c, const u32* a, u32 b0, u32 b1) { product_of<number>(c, a, b0, b1, false); }
static void mma_from_zero(float* c, const u32* a, u32 b0, u32 b1) { product_of<number>(c, a, b0, b1, true); }
static void mma_brain(float* c, const u32* a, u32 b0, u32 b1) { product_of<brain>(c, a, b0, b1, false); }

static void prefetch(const void*) {}
static u32 shared_address(const void* p) { return (u32)((const char*)p - block_memory); }
static void barrier_init(u32, u32) {}
static void copies_arrive(u32) {}
static void barriers_made() {}
static void expect(u32, u32) {}
static void bulk(u32 to, const void* from, u32 n, u32) { memcpy(block_memory + to, from, n); }
static void await(u32, u32) { __syncwarp(); }
static void copy_16(u32 to, const char* from) { memcpy(block_memory + to, from, 16); }
static void copies_end() {}
static void memory_to_copies() {}
template <int LEFT>
static void copies_wait() {}

// Blocks one after another, forward or backward, their memory full of NaN at the start.
template <class Kernel, class Argument>
static void launch(Kernel kernel, const Argument& argument, int blocks, int threads, int bytes, bool backward) {
  std::vector<char> memory(bytes + 128);
  block_memory = (char*)(((size_t)memory.data() + 127) / 128 * 128);
  for (int i = 0; i < blocks; i++) {
    const int block = backward ? blocks - 1 - i : i;
    memset(block_memory, 0xFF, bytes);
    whole_block.reset(new std::barrier<>(threads));
    for (int w = 0; w < threads / 32; w++) all_warps[w].meet.reset(new std::barrier<>(32));
    std::vector<std::thread> lanes;
    for (int t = 0; t < threads; t++)
      lanes.emplace_back([&, t] {
        blockIdx = {block, 0, 0}, threadIdx = {t, 0, 0}, gridDim = {blocks, 1, 1};
        kernel(argument);
      });
    for (auto& lane : lanes) lane.join();
  }
}
