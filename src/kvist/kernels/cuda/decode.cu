// A decode step in one launch, straight from planar pages of uniform codes: packed pages, exact tokens, and the merge.
//
// Constants, beside those of packed.cuh: ROWS of queries per KV head, QUERIES of them per query head; LOOSE tokens per
// block; LOGIT: a logit per query head without a value.
#include "packed.cuh"

// A block's LOOSE exact tokens, a token per warp at a time, from number `first` on: sinks, then positions from `low` on.
__device__ void loose_part(const Call& c, const float* q, float* so, float* sm, float* sl, int b, int head, int first,
                           int held, int kf, int vf, int behind, int warp, int lane) {
  const int low = min(kf, vf), count = held + behind - low;
  const u64 line = (u64)b * HEADS + head;
  float acc[ROWS][4], m[ROWS], l[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    m[r] = NONE, l[r] = 0;
    acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = 0;
  }
  for (int i = first + warp; i < min(first + LOOSE, count); i += WARPS) {
    const int p = low + i - held, at = p % c.capacity;
    const bool sink = i < held;
    const u64 exact = line * c.capacity + at, start = line * c.sinks + i;
    const Scalar* kr = sink ? c.k.sinks + start * D : p >= kf ? c.k.ring + exact * D : 0;
    const Scalar* vr = sink ? c.v.sinks + start * D : p >= vf ? c.v.ring + exact * D : 0;
    const int before = sink ? i : p + c.sinks;
    float x[4], y[4];
    token(c.k, kr, c.k_width, b, head, p, lane, KB, true, x);
    token(c.v, vr, c.v_width, b, head, p, lane, VB, false, y);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float s = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) s += q[r * D + 4 * lane + j] * x[j];
#pragma unroll
      for (int o = 16; o; o /= 2) s += __shfl_xor_sync(~0u, s, o);
#if SOFTCAP
      float e = ex2(s * (2.885390082f / c.softcap));
      s = c.softcap * (1.0f - 2.0f / (e + 1.0f));
#endif
      s *= 1.442695041f;
      if (before <= held + behind - QUERIES + r % QUERIES) {
        const float n = fmaxf(m[r], s), fade = ex2(m[r] - n), w = ex2(s - n);
        m[r] = n, l[r] = l[r] * fade + w;
#pragma unroll
        for (int j = 0; j < 4; j++) acc[r][j] = acc[r][j] * fade + w * y[j];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int j = 0; j < 4; j++) so[(warp * 8 + r) * D + 4 * lane + j] = acc[r][j];
    if (lane == 0) sm[warp * 8 + r] = m[r], sl[warp * 8 + r] = l[r];
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) decode(const __grid_constant__ Call c) {
  BLOCK_MEMORY(memory);
  __shared__ u64 bars[WARPS * STAGES];
  __shared__ float q[8 * D], size[8], peak[8], sm[WARPS * 8], sl[WARPS * 8];
  __shared__ int arrived;
  const int part = blockIdx.x, cell = blockIdx.y, b = cell / HEADS, head = cell % HEADS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int held = c.state[8 * b], kf = c.state[8 * b + 1], vf = c.state[8 * b + 2], behind = c.state[8 * b + 3];
  const int limit = min(kf, vf), pages = (limit + PAGE - 1) / PAGE, splits = c.parts - c.loose;
  const int share = max((pages + splits - 1) / splits, WARPS), used = c.loose + (pages + share - 1) / share;
  const u64 place = (u64)cell * c.parts + part;
  float* so = (float*)memory;  // (WARPS, 8, D)
  if (part < used) {
    for (int r = warp; r < 8; r += WARPS) {  // queries, at most 1 in size where they meet packed keys
      float x[4] = {0, 0, 0, 0}, high = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (r < ROWS) x[j] = widen(c.q[((u64)cell * ROWS + r) * D + 4 * lane + j]) * c.scale;
        high = fmaxf(high, fabsf(x[j]));
      }
#pragma unroll
      for (int o = 16; o; o /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, o));
      high = high > 0 ? high : 1;
      const float shrink = part < c.loose ? 1 : 1 / high;
#pragma unroll
      for (int j = 0; j < 4; j++) q[r * D + 4 * lane + j] = x[j] * shrink;
      if (lane == 0) size[r] = high;
    }
    __syncthreads();
    if (part < c.loose)
      loose_part(c, q, so, sm, sl, b, head, part * LOOSE, held, kf, vf, behind, warp, lane);
    else {
      const int first = (part - c.loose) * share;
      packed_part(c, q, size, memory + warp * STAGES * PAGE_BYTES, bars + warp * STAGES, so, sm, sl, b, head, first,
                  min(first + share, pages), limit, warp, lane);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < ROWS * D; e += WARPS * 32) {  // the warps' parts to one
      const int r = e / D;
      float m = NONE, l = 0, o = 0;
      for (int w = 0; w < WARPS; w++) m = fmaxf(m, sm[w * 8 + r]);
      for (int w = 0; w < WARPS; w++) {
        const float weight = ex2(sm[w * 8 + r] - m);
        l += weight * sl[w * 8 + r], o += weight * so[(w * 8 + r) * D + e % D];
      }
      c.part[place * 8 * D + e] = o;
      if (e % D == 0) c.top[place * 8 + r] = m, c.sum[place * 8 + r] = l;
    }
  }
  __threadfence();  // this thread's part is seen before its arrival
  __syncthreads();
  if (threadIdx.x == 0) arrived = atomicAdd(c.counters + cell, 1);
  __syncthreads();
  if (arrived != c.parts - 1) return;
  __threadfence();
  if (threadIdx.x == 0) c.counters[cell] = 0;
  const u64 all = (u64)cell * c.parts;
  for (int r = warp; r < ROWS; r += WARPS) {  // the last to arrive merges all parts, in order
    float m = NONE, l = 0;
    for (int i = lane; i < used; i += 32) m = fmaxf(m, c.top[(all + i) * 8 + r]);
#pragma unroll
    for (int o = 16; o; o /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, o));
#if LOGIT
    const float logit = c.logits[head * (ROWS / QUERIES) + r / QUERIES] * 1.442695041f;
    m = fmaxf(m, logit), l = ex2(logit - m);
#endif
    for (int i = 0; i < used; i++) l += c.sum[(all + i) * 8 + r] * ex2(c.top[(all + i) * 8 + r] - m);
    if (lane == 0) peak[r] = m, size[r] = l > 0 ? 1 / l : 0;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < ROWS * D; e += WARPS * 32) {
    const int r = e / D;
    float o = 0;
#pragma unroll 8
    for (int i = 0; i < used; i++) o += c.part[(all + i) * 8 * D + e] * ex2(c.top[(all + i) * 8 + r] - peak[r]);
    c.out[(u64)cell * ROWS * D + e] = narrow(o * size[r]);
  }
}
