// A warp's share of a cell: slices of exact tokens, then spans of packed ones that come through a ring of its own.
//
// Constants, beside those of page.cuh: WARPS of a block, STAGES of its rings; COUNTED: whole spans alone, so that machine
// code can be counted.
#pragma once

#include "queries.cuh"

struct Ring {  // one warp's; lives as long as the block
  char* memory;
  u32 bars, stage, phase;
};

// Wait until the oldest span under way is there.
__device__ __forceinline__ void span_is_there(const Ring& r) {
#if COPIES
  await(r.bars + 8 * r.stage, r.phase);
#else
  copies_wait<STAGES - 1>();
  __syncwarp();
#endif
}

__device__ __forceinline__ void begin(Walk& me, const Call& c, int lane) {
  me.g = lane / 4, me.t = lane % 4;
  if (KT) me.k_points.load(c.k.points);
  if (VT) me.v_points.load(c.v.points);
  me.m0 = me.m1 = NONE, me.cap = c.softcap * 1.442695041f;
  me.k_most = me.v_most = -1, me.k_lift = LIFT, me.v_lift = 0;
  me.base0 = me.base1 = -NONE;
#pragma unroll
  for (int i = 0; i < STEPS; i++) me.acc[i][0] = me.acc[i][1] = me.acc[i][2] = me.acc[i][3] = 0;
  me.zero[0] = me.zero[1] = me.zero[2] = me.zero[3] = me.centre[0] = me.centre[1] = me.centre[2] = me.centre[3] = 0;
}

// Queries as packed keys meet them.
__device__ __forceinline__ void meet_packed(Walk& me, const Queries& q) {
  if (KR) {
    per_channel((const char*)(q.meeting_packed() + me.g * QROW), me.t, me.queries);
#pragma unroll
    for (int i = 0; i < 2 * STEPS; i++) me.queries[i] = hmul2(me.queries[i], fold(LIFT, i / 2));
  }
  me.f0 = q.packed_unit[2 * me.t], me.f1 = q.packed_unit[2 * me.t + 1];
  me.z0 = q.added[2 * me.t], me.z1 = q.added[2 * me.t + 1];
  me.u0 = me.f0 * K_UNIT * power(-LIFT), me.u1 = me.f1 * K_UNIT * power(-LIFT);
}

// In Hadamard's space, sums over exact values go on together with those over packed ones. The matrix is symmetric.
__device__ __forceinline__ void turn_sums(Walk& me) {
#pragma unroll
  for (int bit = 1; bit < D; bit *= 2)
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const int d0 = value_channel(0, i);
      if (bit == 1) {
        const float a = me.acc[i][0], e = me.acc[i][1], x = me.acc[i][2], y = me.acc[i][3];
        me.acc[i][0] = a + x, me.acc[i][1] = e + y, me.acc[i][2] = a - x, me.acc[i][3] = e - y;
      } else if (bit >= VBYTES && bit < 8 * VBYTES) {  // among lanes
        const int o = bit / VBYTES;
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const float y = __shfl_xor_sync(~0u, me.acc[i][k], 4 * o);
          me.acc[i][k] = me.g & o ? y - me.acc[i][k] : me.acc[i][k] + y;
        }
      } else if (!(d0 & bit)) {
#pragma unroll
        for (int j = 0; j < STEPS; j++)
          if (value_channel(0, j) == d0 + bit)
#pragma unroll
            for (int k = 0; k < 4; k++) {
              // sums i and j stand for different powers of two
              const float by = (float)(1 << value_shift(i)) / (1 << value_shift(j));
              const float a = me.acc[i][k], e = me.acc[j][k] * by;
              me.acc[i][k] = a + e, me.acc[j][k] = (a - e) / by;
            }
      }
    }
#pragma unroll
  for (int i = 0; i < STEPS; i++)
#pragma unroll
    for (int k = 0; k < 4; k++) me.acc[i][k] *= rsqrtf((float)D);
}

// A warp's units of a cell: my, my + WARPS, … below `last`; slices of exact tokens first, then spans.
__device__ __forceinline__ void share(const Call& c, Walk& me, Queries& q, Asked& asked, Ring& ring, const Cell& x,
                                      int my, int last, int warp, int lane) {
  const int slices = x.row.slices(), spans = (x.row.low() + SPAN - 1) / SPAN;
  const int ahead = my < slices ? (slices - my + WARPS - 1) / WARPS : 0;
  const int exact = max(0, (min(last, slices) - my + WARPS - 1) / WARPS);  // slices of this warp
  const int first = my + ahead * WARPS - slices;                          // its first span, of n
  const int n = max(0, (min(last - slices, spans) - first + WARPS - 1) / WARPS);
#if COPIES
  const Copy mine = copy_of(c, min(lane, 5), x.b, x.head);
  int next = n ? mine.table[first / PARTS] : 0;  // each is asked for before it is needed
  for (int i = 0; i < min(STAGES, n); i++) {
    const int page = next, to = (ring.stage + i) % STAGES;
    if (i + 1 < n) next = mine.table[(first + (i + 1) * WARPS) / PARTS];
    fetch(c, mine, shared_address(ring.memory) + to * SPAN_BYTES, ring.bars + 8 * to, page, first + i * WARPS, x.b, x.head, lane);
  }
#else
  for (int i = 0; i < STAGES; i++) {
    if (i < n) fetch(c, ring.memory + (ring.stage + i) % STAGES * SPAN_BYTES, first + i * WARPS, x.b, x.head, lane);
    copies_end();
  }
#endif
  if (exact) touch(slice_of(c, x.row, x.b, x.head, my), lane);
  asked.make(c, q, x.head, warp, lane);
  begin(me, c, lane);
  __syncthreads();  // queries are there
#if TURN
  bool turned = false;
#endif
#pragma unroll 1
  for (int i = 0; i < exact && !COUNTED; i++) {
    const Slice slice = slice_of(c, x.row, x.b, x.head, my + i * WARPS);
    if (i + 1 < exact) touch(slice_of(c, x.row, x.b, x.head, my + (i + 1) * WARPS), lane);
    const bool k_packed = slice.span && x.row.kf > x.row.vf, v_packed = slice.span && x.row.vf > x.row.kf;
#if TURN  // exact values come first; from the first packed one on sums are in the other space
    if (!turned && v_packed) turned = true, turn_sums(me);
#endif
    read_slice(me, slice, k_packed, v_packed, k_packed ? q.meeting_packed() : q.exact, k_packed ? q.packed_unit : q.exact_unit);
  }
#if TURN
  if (exact && !turned) turn_sums(me);
#endif
  meet_packed(me, q);
  const int left = x.row.low() % SPAN;
  const bool tail = left && n > 0 && first + (n - 1) * WARPS == x.row.low() / SPAN;
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    char* span = ring.memory + ring.stage * SPAN_BYTES;
    span_is_there(ring);
    if (tail && i == n - 1 && !COUNTED)
      read_span<true>(me, span, q.meeting_packed(), left, lane);
    else
      read_span<false>(me, span, q.meeting_packed(), SPAN, lane);
    __syncwarp();
#if COPIES
    if (i + STAGES < n) {
      fetch(c, mine, shared_address(span), ring.bars + 8 * ring.stage, next, first + (i + STAGES) * WARPS, x.b, x.head, lane);
      next = mine.table[(first + min(i + STAGES + 1, n - 1) * WARPS) / PARTS];
    }
#else
    if (i + STAGES < n) fetch(c, span, first + (i + STAGES) * WARPS, x.b, x.head, lane);
    copies_end();
#endif
    if (++ring.stage == STAGES) ring.stage = 0, ring.phase ^= 1;
  }
#if !COPIES
  copies_wait<0>();
#endif
}

// A warp's sums, their reference and the sum of the weights to shared memory: so (ROWS, D), sm and sl (8,).
__device__ __forceinline__ void leave(const Walk& me, float* so, float* sm, float* sl) {
  const int g = me.g, t = me.t;
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const float* x = me.acc[i];
    const int d = value_channel(g, i), k = value_group(i);
    float z0 = __shfl_sync(~0u, me.zero[0], k * 4 + t), z1 = __shfl_sync(~0u, me.zero[1], k * 4 + t);
    if (TURN) z0 -= CENTRE * me.centre[0], z1 -= CENTRE * me.centre[1];
    const float unit = V_UNIT / (1 << value_shift(i));
    float *to = so + 2 * t * D + d, *beside = to + D;
    if (2 * t < ROWS) to[0] = x[0] * unit + z0, to[1] = x[2] * unit + z0;
    if (2 * t + 1 < ROWS) beside[0] = x[1] * unit + z1, beside[1] = x[3] * unit + z1;
  }
  if (g == 0) {
    sm[2 * t] = me.m0 - me.v_lift, sm[2 * t + 1] = me.m1 - me.v_lift;
    sl[2 * t] = me.zero[2], sl[2 * t + 1] = me.zero[3];
  }
}
