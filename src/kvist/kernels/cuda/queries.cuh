// Queries of a row and head in shared memory, as exact and as packed keys meet them.
#pragma once

#include "deal.cuh"

constexpr int LIFT = 12;  // of queries before scales are known
constexpr bool APART = KR == 2 || TURN || TYPE == 1;  // packed keys meet other queries than exact ones
constexpr int LANE = D / 32;                          // channels of a lane where a warp holds a row

struct Queries {  // of a cell, in shared memory; rows of 16-bit numbers, and units of them in log2
  u16 exact[8 * QROW], packed[APART ? 8 * QROW : 8];
  float exact_unit[8], packed_unit[8], added[8];
  __device__ __forceinline__ const u16* meeting_packed() const { return APART ? packed : exact; }
};

// A row spread over a warp, LANE neighbouring channels a lane, turned by Hadamard's matrix.
__device__ __forceinline__ void turn_row(float* x, int lane) {
#pragma unroll
  for (int bit = 1; bit < LANE; bit *= 2)
#pragma unroll
    for (int j = 0; j < LANE; j++)
      if (!(j & bit)) {
        const float a = x[j], e = x[j + bit];
        x[j] = a + e, x[j + bit] = a - e;
      }
#pragma unroll
  for (int o = 1; o < 32; o *= 2)
#pragma unroll
    for (int j = 0; j < LANE; j++) {
      const float y = __shfl_xor_sync(~0u, x[j], o);
      x[j] = lane & o ? y - x[j] : x[j] + y;
    }
#pragma unroll
  for (int j = 0; j < LANE; j++) x[j] *= rsqrtf((float)D);
}
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int o = 16; o; o /= 2) x += __shfl_xor_sync(~0u, x, o);
  return x;
}
// The power of two that brings numbers up to `high` below 1.
__device__ __forceinline__ float shrinking(float high) {
  const int e = (int)(__float_as_uint(high) >> 23) - 127;
  return high > 0 ? power(max(-126, min(126, -1 - e))) : 1;
}

// The queries of a cell, rows warp, warp + WARPS, …: asked for, then made what exact and packed keys meet.
struct Asked {
  float x[(7 + WARPS) / WARPS][LANE];

  __device__ __forceinline__ void load(const Call& c, int b, int head, int warp, int lane) {
#pragma unroll
    for (int n = 0; n < (7 + WARPS) / WARPS; n++)
#pragma unroll
      for (int j = 0; j < LANE; j++) {
        const int r = warp + n * WARPS;
        x[n][j] = r < ROWS ? widen(c.q[(((u64)b * HEADS + head) * ROWS + r) * D + LANE * lane + j]) : 0;
      }
  }
  __device__ __forceinline__ void make(const Call& c, Queries& q, int head, int warp, int lane) {
#pragma unroll
    for (int n = 0; n < (7 + WARPS) / WARPS; n++)
      if (warp + n * WARPS < 8) row(c, q, head, warp + n * WARPS, lane, x[n]);
  }
  static __device__ __forceinline__ void row(const Call& c, Queries& q, int head, int r, int lane, float* x) {
    float high = 0, added = 0;
#pragma unroll
    for (int j = 0; j < LANE; j++) high = fmaxf(high, fabsf(x[j]));
    float by = shrinking(over_lanes(high));
    const float unit = c.scale * 1.442695041f;
    u16* to = q.exact + r * QROW + LANE * lane;
#pragma unroll
    for (int j = 0; j < LANE; j++) to[j] = BRAIN ? to_brain(x[j] * by) : to_half(x[j] * by);
    if (lane == 0) q.exact_unit[r] = unit / by;
    if (APART) {
      if (TURN) turn_row(x, lane);
      high = 0;
#pragma unroll
      for (int j = 0; j < LANE; j++) {
        const int d = head * D + LANE * lane + j;
        if (KR == 2) added += x[j] * c.k.fixed_offset[d], x[j] *= c.k.fixed_scale[d];
        high = fmaxf(high, fabsf(x[j]));
      }
      by = shrinking(over_lanes(high));
      to = q.packed + r * QROW + LANE * lane;
#pragma unroll
      for (int j = 0; j < LANE; j++) to[j] = to_half(x[j] * by);
    }
    if (KR == 1) {  // of what the codes meet, so that what is rounded cancels
#pragma unroll
      for (int j = 0; j < LANE; j++) added += number(to_half(x[j] * by));
    }
    added = KR == 1 ? lanes_sum(added) * (unit / by) : KR == 2 ? lanes_sum(added) * unit : 0;
    if (lane == 0) q.packed_unit[r] = unit / by, q.added[r] = added;
  }
};

