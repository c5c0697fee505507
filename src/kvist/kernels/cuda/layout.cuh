// How pages and exact tokens lie in memory, and how they are brought in.
//
// Constants: KB, VB bits; KG, VG tokens or channels that share a range; PAGE tokens, HEADS; TYPE of queries and exact
// tokens (0 fp16, 1 bf16, 2 fp32); BULK copies (sm_90) or not.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#ifndef ON_HOST  // a test gives its own
#include "primitives.cuh"
#endif

constexpr int D = 128;
constexpr int KW = D * KB / 8, VW = D * VB / 8;                 // bytes of a token
constexpr int KF = 8 / KB, VF = 8 / VB;                         // fields of a byte
constexpr int GROUPS = PAGE / KG, NG = D / VG, TILES = PAGE / 16;
constexpr int KC = 0, VC = KC + PAGE * KW, KS = VC + PAGE * VW, KZ = KS + GROUPS * D * 2, VS = KZ + GROUPS * D * 2;
constexpr int VZ = VS + PAGE * NG * 2, PAGE_BYTES = VZ + PAGE * NG * 2;
constexpr float NONE = -1e30f;  // the maximum of no scores: finite, so that differences are numbers

__device__ __forceinline__ u16 half_at(const char* p) { return *(const u16*)p; }

#if TYPE == 2
typedef float Scalar;
__device__ __forceinline__ float widen(Scalar x) { return x; }
__device__ __forceinline__ Scalar narrow(float x) { return x; }
#elif TYPE == 1
typedef u16 Scalar;
__device__ __forceinline__ float widen(Scalar x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ Scalar narrow(float x) { return to_brain(x); }
#else
typedef u16 Scalar;
__device__ __forceinline__ float widen(Scalar x) { return number(x); }
__device__ __forceinline__ Scalar narrow(float x) { return to_half(x); }
#endif

struct Side {  // one side's pool, page table and exact tokens
  const char *codes, *scale, *offset;
  const int* table;
  const Scalar *sinks, *ring;
};

struct Call {
  const Scalar* q;        // (B, HEADS * ROWS, D)
  Scalar* out;            // the same
  float *part, *top, *sum;  // per cell and part: sums (8, D), their reference and the sum of the weights (8,)
  int* counters;          // per cell, 0 before and after
  Side k, v;
  const int* state;       // (B, 8): sinks held, frontier of keys, of values, tokens behind the sinks
  const float* logits;    // per query head, or nothing
  float scale, softcap;
  int k_width, v_width, sinks, capacity, loose, parts;
};

// What a lane copies of each page: with bulk copies lanes 0 to 5 take one array each, otherwise all lanes share each.
struct Copy {
  const char* from;  // of page 0 of this head
  const int* table;
  u32 to, bytes;
  u64 stride;
};

__device__ __forceinline__ Copy copy_of(const Call& c, int array, int b, int head) {
  const bool key = array < 3;
  const Side& s = key ? c.k : c.v;
  const int kind = array % 3, numbers = key ? GROUPS * D * 2 : PAGE * NG * 2;
  Copy x;
  x.bytes = kind == 0 ? PAGE * (key ? KW : VW) : numbers;
  x.from = (kind == 0 ? s.codes : kind == 1 ? s.scale : s.offset) + (u64)head * x.bytes;
  x.to = key ? (kind == 0 ? KC : kind == 1 ? KS : KZ) : kind == 0 ? VC : kind == 1 ? VS : VZ;
  x.stride = (u64)HEADS * x.bytes;
  x.table = key ? c.k.table + b * c.k_width : c.v.table + b * c.v_width;
  return x;
}

#if BULK
// Bring a page to `to`; `page`: the place in its pool that the lane's table names.
__device__ __forceinline__ void fetch(const Copy& mine, u32 to, u32 barrier, int page, int lane) {
  if (lane == 0) expect(barrier, PAGE_BYTES);
  __syncwarp();
  if (lane < 6) bulk(to + mine.to, mine.from + page * mine.stride, mine.bytes, barrier);
}
#else
__device__ __forceinline__ void fetch(const Call& c, char* to, int index, int b, int head, int lane) {
#pragma unroll
  for (int array = 0; array < 6; array++) {
    const Copy x = copy_of(c, array, b, head);
    for (u32 i = lane * 16; i < x.bytes; i += 512)
      copy_16(shared_address(to + x.to + i), x.from + x.table[index] * x.stride + i);
  }
}
#endif

// One token of one side, channels 4*lane to 4*lane + 3, fp32: exact from `row`, or decoded from the page of slot p.
__device__ __forceinline__ void token(const Side& s, const Scalar* row, int width, int b, int head, int p, int lane,
                                      int bits, bool key, float* x) {
  if (row) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = widen(row[4 * lane + i]);
    return;
  }
  const u64 page = (u64)s.table[b * width + p / PAGE] * HEADS + head;
  const int slot = p % PAGE, bytes = D * bits / 8, field = 4 * lane / bytes;
  const u32 word = *(const u32*)(s.codes + (page * PAGE + slot) * bytes + 4 * lane % bytes) >> (bits * field);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u64 at = key ? (page * GROUPS + slot / KG) * D + 4 * lane + i : (page * PAGE + slot) * NG + (4 * lane + i) / VG;
    x[i] = ((word >> (8 * i)) & ((1 << bits) - 1)) * number(((const u16*)s.scale)[at]) + number(((const u16*)s.offset)[at]);
  }
}
