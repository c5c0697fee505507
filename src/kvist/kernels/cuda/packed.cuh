// Attention over packed pages: each warp owns pages of its own, and a ring of them in shared memory.
//
// Constants, beside those of page.cuh: WARPS of a block, STAGES of its rings.
#pragma once

#include "page.cuh"

// Wait until the oldest page under way is there.
__device__ __forceinline__ void page_is_there(u32 barrier, u32 phase) {
#if BULK
  await(barrier, phase);
#else
  copies_wait<STAGES - 1>();
  __syncwarp();
#endif
}

// A warp's share of the packed tokens: pages first + warp, first + warp + WARPS, … below `last`.
__device__ __forceinline__ void packed_part(const Call& c, const float* q, const float* size, char* ring, u64* bars,
                                            float* so, float* sm, float* sl, int b, int head, int first, int last,
                                            int limit, int warp, int lane) {
  const int n = max(0, (last - first - warp + WARPS - 1) / WARPS);
  Walk me;
  const int g = me.g = lane / 4, t = me.t = lane % 4;
  const u32 bar = shared_address(bars), rings = shared_address(ring);
#if BULK
  if (lane == 0) {
    for (int s = 0; s < STAGES; s++) barrier_init(bar + 8 * s);
    barriers_made();
  }
  __syncwarp();
  const Copy mine = copy_of(c, min(lane, 5), b, head);
  const int* table = mine.table + first + warp;
  for (int s = 0; s < min(STAGES, n); s++) fetch(mine, rings + s * PAGE_BYTES, bar + 8 * s, table[s * WARPS], lane);
  int next = STAGES < n ? table[STAGES * WARPS] : 0;
#else
  for (int s = 0; s < STAGES; s++) {
    if (s < n) fetch(c, ring + s * PAGE_BYTES, first + warp + s * WARPS, b, head, lane);
    copies_end();
  }
#endif
#pragma unroll
  for (int i = 0; i < 8; i++) {  // folded: as much smaller as a field's place in a byte makes its codes larger
    const int f = i % KF, d = channel(t, i / KF, f);
    const float less = 1.0f / (1 << (KB * f));
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float x = q[g * D + d + 2 * h], y = q[g * D + d + 2 * h + 1];
      me.queries[i][2 * h] = halves(x, y);
      me.queries[i][2 * h + 1] = halves(x * less, y * less);
    }
  }
  me.f0 = size[2 * t] * 1.442695041f, me.f1 = size[2 * t + 1] * 1.442695041f;  // units of the queries, in log2
  me.m0 = me.m1 = NONE, me.cap = c.softcap * 1.442695041f;
  me.k_most = me.v_most = -1, me.k_lift = me.v_lift = 0, me.u0 = me.u1 = me.base0 = me.base1 = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) me.acc[i][0] = me.acc[i][1] = me.acc[i][2] = me.acc[i][3] = 0;
  me.zero[0] = me.zero[1] = me.zero[2] = me.zero[3] = 0;
  int stage = 0;
  u32 phase = 0;
  const bool tail = limit % PAGE && n > 0 && first + warp + (n - 1) * WARPS == limit / PAGE;
#pragma unroll 1
  for (int i = 0; i < n - tail; i++) {
    char* page = ring + stage * PAGE_BYTES;
    page_is_there(bar + 8 * stage, phase);
    read_page<false>(me, page, PAGE, lane);
    __syncwarp();
#if BULK
    if (i + STAGES < n) {
      fetch(mine, rings + stage * PAGE_BYTES, bar + 8 * stage, next, lane);
      next = table[min(i + STAGES + 1, n - 1) * WARPS];  // asked for an iteration before it is needed
    }
#else
    if (i + STAGES < n) fetch(c, page, first + warp + (i + STAGES) * WARPS, b, head, lane);
    copies_end();
#endif
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  if (tail) {
    page_is_there(bar + 8 * stage, phase);
    read_page<true>(me, ring + stage * PAGE_BYTES, limit % PAGE, lane);
  }
#if !BULK
  copies_wait<0>();
#endif
  __syncthreads();  // the rings are free: the parts of all warps take their place
#pragma unroll
  for (int j = 0; j < VW / 32; j++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int f = 0; f < VF; f++) {
        const float* x = me.acc[(j * 2 + h) * VF + f];
        const int d = f * VW + 32 * j + 4 * g + 2 * h, k = (f * VW + 32 * j) / VG;
        const float z0 = __shfl_sync(~0u, me.zero[0], k * 4 + t), z1 = __shfl_sync(~0u, me.zero[1], k * 4 + t);
        const float unit = UNIT / (1 << (VB * f));
        float *to = so + (warp * 8 + 2 * t) * D + d, *beside = to + D;
        to[0] = x[0] * unit + z0, beside[0] = x[1] * unit + z1;
        to[1] = x[2] * unit + z0, beside[1] = x[3] * unit + z1;
      }
  if (g == 0) {
    sm[warp * 8 + 2 * t] = me.m0 - me.v_lift, sm[warp * 8 + 2 * t + 1] = me.m1 - me.v_lift;
    sl[warp * 8 + 2 * t] = me.zero[2], sl[warp * 8 + 2 * t + 1] = me.zero[3];
  }
}
