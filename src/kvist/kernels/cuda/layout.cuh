// How packed spans and exact tokens lie in memory, and how spans are brought in.
//
// Constants, for keys (K…) and values (V…): B bits; T: levels of a table, or uniform; G tokens (keys) or channels
// (values) that share a range; KR: what a range of keys spans: 0 KG tokens of a channel, 1 the channels of a token, 2 all
// tokens of a channel, known beforehand; A: ranges that heads share. D channels; PAGE tokens; SPAN of them at a time;
// HEADS; TYPE of queries and exact tokens (0 fp16, 1 bf16, 2 fp32); TURN: stored in Hadamard's space; COPIES:
// 0 of 16 bytes (sm_80), 1 whole arrays at a time, 2 codes so and ranges by 16 bytes.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#ifndef ON_HOST  // a test gives its own
#include "primitives.cuh"
#endif

constexpr int KL = KB == 3 ? 2 : KB, VL = VB == 3 ? 2 : VB;  // three bits are a plane of two and a plane of one
constexpr int KH = KB - KL, VH = VB - VL;
constexpr int KW = D * KL / 8, VW = D * VL / 8, THIN = D / 8;  // bytes of a token in its planes
constexpr int KROW = D * KB / 8, VROW = D * VB / 8;            // in all of them
constexpr int KF = 8 / KL, VF = 8 / VL;                        // fields of a byte
constexpr int STEPS = D / 16;                                  // matrix products along a head
constexpr int LOADED = KR == 0 ? (SPAN > KG ? SPAN / KG : 1) : 0, NG = D / VG;  // groups of keys in a span; of a value
constexpr int KN = KR == 0 ? LOADED * D * 2 : KR == 1 ? SPAN * 2 : 0, VN = SPAN * NG * 2;
constexpr int PARTS = PAGE / SPAN;  // of a page
constexpr int KC = 0, VC = KC + SPAN * KROW, KS = VC + SPAN * VROW, KZ = KS + KN, VS = KZ + KN, VZ = VS + VN;
constexpr int SPAN_BYTES = VZ + VN;
constexpr float NONE = -1e30f;  // the maximum of no scores: finite, so that differences are numbers
constexpr int QROW = D + 8;     // halves from a row of queries to the next in shared memory

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

struct Side {  // one side's pool, page table, exact tokens, and numbers known beforehand
  const char *codes, *scale, *offset;
  const int* table;
  const Scalar *sinks, *ring;
  const float *points, *fixed_scale, *fixed_offset;  // (2^B,), (HEADS, D), (HEADS, D)
};

struct Call {
  const Scalar* q;          // (B, HEADS * ROWS, D)
  Scalar* out;              // the same
  float *part, *top, *sum;  // two per block: sums (ROWS, D), their reference and the sum of the weights (8,)
  int* counters;            // per cell, 0 before and after
  Side k, v;
  const int* state;     // (B, 8): sinks held, frontier of keys, of values, tokens behind the sinks
  const float* logits;  // per query head, or nothing
  float scale, softcap;
  int k_width, v_width, sinks, capacity, rows;
};

// What a lane copies of each span: with bulk copies lanes 0 to 5 take one array each, otherwise all lanes share each.
struct Copy {
  const char* from;  // of page 0 of this head
  const int* table;
  u32 to, bytes, step;  // step: from one part of a page to the next, unless STEP of them share what is copied
  u64 stride;
};

__device__ __forceinline__ Copy copy_of(const Call& c, int array, int b, int head) {
  const bool key = array < 3;
  const Side& s = key ? c.k : c.v;
  const int kind = array % 3;
  Copy x;
  x.bytes = kind == 0 ? SPAN * (key ? KROW : VROW) : key ? KN : VN;
  x.step = kind && key && KR == 0 && KG > SPAN ? 0 : x.bytes;
  const u32 whole = kind && key && KR == 0 ? PAGE / KG * D * 2 : x.bytes * PARTS;
  const bool shared = kind && (key ? KA : VA);
  x.from = (kind == 0 ? s.codes : kind == 1 ? s.scale : s.offset) + (shared ? 0 : (u64)head * whole);
  x.to = key ? (kind == 0 ? KC : kind == 1 ? KS : KZ) : kind == 0 ? VC : kind == 1 ? VS : VZ;
  x.stride = (shared ? 1 : HEADS) * (u64)whole;
  x.table = key ? c.k.table + (u64)b * c.k_width : c.v.table + (u64)b * c.v_width;
  return x;
}
__device__ __forceinline__ const char* source(const Copy& x, int page, int span) {
  const int part = span % PARTS;
  const u32 ahead = x.step ? part * x.step : part * SPAN / (KR == 0 ? KG : SPAN) * (D * 2);
  return x.from + page * x.stride + ahead;
}

#if COPIES
constexpr int ARRIVALS = COPIES == 2 ? 33 : 1;  // at a span's barrier
// Bring a span to `to`; `page`: the place in its pool that the lane's table names. Ranges are small: they may come by
// copies of 16 bytes.
__device__ __forceinline__ void fetch(const Call& c, const Copy& mine, u32 to, u32 barrier, int page, int span, int b,
                                      int head, int lane) {
  if (lane == 0) expect(barrier, COPIES == 2 ? KS : SPAN_BYTES);
  __syncwarp();
  if (lane < 6 && mine.bytes && (COPIES == 1 || lane % 3 == 0)) bulk(to + mine.to, source(mine, page, span), mine.bytes, barrier);
#if COPIES == 2
  const int pages[2] = {__shfl_sync(~0u, page, 0), __shfl_sync(~0u, page, 3)};
#pragma unroll
  for (int array = 1; array < 6; array++) {
    if (array == 3) continue;
    const Copy x = copy_of(c, array, b, head);
    const char* from = source(x, pages[array / 3], span);
#pragma unroll
    for (u32 i = 0; i < x.bytes; i += 512)
      if (i + lane * 16 < x.bytes) copy_16(to + x.to + i + lane * 16, from + i + lane * 16);
  }
  copies_arrive(barrier);
#endif
}
#else
__device__ __forceinline__ void fetch(const Call& c, char* to, int span, int b, int head, int lane) {
#pragma unroll
  for (int array = 0; array < 6; array++) {
    const Copy x = copy_of(c, array, b, head);
    const char* from = x.bytes ? source(x, x.table[span / PARTS], span) : 0;
    for (u32 i = lane * 16; i < x.bytes; i += 512) copy_16(shared_address(to + x.to + i), from + i);
  }
}
#endif
