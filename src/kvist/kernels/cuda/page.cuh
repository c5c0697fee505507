// Attention over one span of packed tokens by one warp.
//
// Keys and values are the M operand of mma.sync.m16n8k16, up to 8 query rows the N operand. A code masked at bit k of a
// half IS the fp16 number code * 2^(k-24): one LOP3 yields two operands. The order of channels in q.k and of channels
// in the rows of the output is free, so pages are used as every other kernel stores them; values need pairs of tokens,
// which one byte permutation makes.
//
// Constants, beside those of layout.cuh: SOFTCAP or not.
#pragma once

#include "codes.cuh"

constexpr float HEADROOM = 4.0f;  // log2 by which scores may pass the largest before all sums are rescaled
constexpr u32 ONES = 0x3C003C00u;
constexpr float CENTRE = ((1 << VB) - 1) / 2.0f;  // of the codes of values
constexpr int CHUNK = SPAN < 32 ? SPAN : 32, TILES = CHUNK / 16;  // tokens scored together: their tiles interleave

// What a warp keeps while it walks its share. m0, m1: what no score of columns 2t and 2t + 1 has passed, HEADROOM above
// the largest when they were set; acc: sums of values, rows of channels; zero: rows 0-7 sums of offsets by group, rows
// 8-15 of the weights. Halves are lifted by powers of two, so that products with small scales are no subnormals: queries
// by k_lift, weights by v_lift, as far as the largest scales so far allow; these may grow to k_most, v_most before.
// f0, f1: units of the queries that meet packed keys, in log2; u0, u1: units of raw scores; z0, z1: what offsets known
// beforehand, or offsets of 1, add; base0, base1: what is added to scores in exponents. centre: sums of the weights as
// scaled values meet them, from which codes are centred in Hadamard's space: what all channels share becomes one there.
struct Walk {
  u32 queries[2 * STEPS];  // as they meet codes; where ranges of keys change, made of shared ones each time
  float acc[STEPS][4], zero[4], centre[4], m0, m1, f0, f1, u0, u1, z0, z1, base0, base1, cap, k_most, v_most;
  int g, t, k_lift, v_lift;
  Points<KB> k_points;
  Points<VB> v_points;
};

// Raw scores of a chunk; `x`: of token g of its first tile, at this lane's words.
__device__ __forceinline__ void scores(const char* row, const u32* qs, const Points<KB>& points, float (*s)[4], int t) {
  KeyWords w[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) w[tile].load(row + 16 * tile * KROW, t);
#pragma unroll
  for (int i = 0; i < STEPS; i++)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {  // side by side: a product need not wait for the one before
      u32 codes[4];
      w[tile].codes(i, points, codes);
      if (i == 0)
        mma_from_zero(s[tile], codes, qs[2 * i], qs[2 * i + 1]);
      else
        mma(s[tile], codes, qs[2 * i], qs[2 * i + 1]);
    }
}

// The weights of 16 tokens, as pairs of tokens, times the scales of each group of channels; `from`: of token 2t.
__device__ __forceinline__ void scaled(const char* from, u32 b0, u32 b1, u32* p0, u32* p1) {
  if (NG == 1) {
    p0[0] = hmul2(b0, *(const u32*)from), p1[0] = hmul2(b1, *(const u32*)(from + 16));
  } else if (NG == 2) {
    const uint2 a = *(const uint2*)from, e = *(const uint2*)(from + 32);
    p0[0] = hmul2(b0, prmt(a.x, a.y, 0x5410)), p1[0] = hmul2(b1, prmt(e.x, e.y, 0x5410));
    p0[1] = hmul2(b0, prmt(a.x, a.y, 0x7632)), p1[1] = hmul2(b1, prmt(e.x, e.y, 0x7632));
  } else {
    const uint4 a = *(const uint4*)from, e = *(const uint4*)(from + 64);
    p0[0] = hmul2(b0, prmt(a.x, a.z, 0x5410)), p1[0] = hmul2(b1, prmt(e.x, e.z, 0x5410));
    p0[1] = hmul2(b0, prmt(a.x, a.z, 0x7632)), p1[1] = hmul2(b1, prmt(e.x, e.z, 0x7632));
    p0[2] = hmul2(b0, prmt(a.y, a.w, 0x5410)), p1[2] = hmul2(b1, prmt(e.y, e.w, 0x5410));
    p0[3] = hmul2(b0, prmt(a.y, a.w, 0x7632)), p1[3] = hmul2(b1, prmt(e.y, e.w, 0x7632));
  }
}

// One number per group of two neighbouring tokens, as a pair; `from`: of the first, at the group.
__device__ __forceinline__ u32 pair_at(const char* from) {
  return NG == 1 ? *(const u32*)from : prmt(half_at(from), half_at(from + 2 * NG), 0x5410);
}

// The largest of N numbers of half precision, those that this lane looks at.
template <int N>
__device__ __forceinline__ u32 largest(const char* from, int lane) {
  u32 high = 0;
#pragma unroll
  for (int i = 0; i < N / 256; i++) {
    const uint4 x = *(const uint4*)(from + 512 * i + 16 * lane);
    high = hmax2(high, hmax2(hmax2(x.x, x.y), hmax2(x.z, x.w)));
  }
#pragma unroll
  for (int i = N / 256 * 4; i < N / 64; i++) high = hmax2(high, *(const u32*)(from + 128 * i + 4 * lane));
  constexpr int rest = N % 64;
  if (rest) high = hmax2(high, *(const u32*)(from + N / 64 * 128 + 4 * lane % (rest ? 2 * rest : 1)));
  return high;
}
__device__ __forceinline__ float larger(u32 pair) { return fmaxf(number((u16)pair), number((u16)(pair >> 16))); }
__device__ __forceinline__ float over_lanes(float x) {
#pragma unroll
  for (int o = 16; o; o /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
  return x;
}
// The power of two that brings a factor of at most 1, times numbers up to `high`, to some thousands; 15 at most.
__device__ __forceinline__ int lift_for(float high) {
  return max(0, min(15, 12 - ((int)(__float_as_uint(high) >> 23) - 127)));
}
__device__ __forceinline__ float most_for(int lift) { return lift ? (float)(1 << (15 - lift)) : 65536.0f; }
__device__ __forceinline__ float power(int e) { return __uint_as_float((u32)(127 + e) << 23); }

// Scales have grown, or are seen for the first time.
__device__ __forceinline__ void settle(Walk& me, float k_high, float v_high) {
  k_high = over_lanes(k_high), v_high = over_lanes(v_high);
  if (KR == 0 && k_high > me.k_most) {
    const int lift = lift_for(k_high);
    me.k_lift = lift, me.k_most = most_for(lift);
    me.u0 = me.f0 * K_UNIT * power(-lift), me.u1 = me.f1 * K_UNIT * power(-lift);
  }
  if (v_high > me.v_most) {
    const int lift = lift_for(v_high);
    const float by = power(lift - me.v_lift);
#pragma unroll
    for (int k = 0; k < STEPS; k++) me.acc[k][0] *= by, me.acc[k][1] *= by, me.acc[k][2] *= by, me.acc[k][3] *= by;
    me.zero[0] *= by, me.zero[1] *= by, me.zero[2] *= by, me.zero[3] *= by;
    if (TURN) me.centre[0] *= by, me.centre[1] *= by;
    me.v_lift = lift, me.v_most = most_for(lift);
    me.base0 = lift - me.m0, me.base1 = lift - me.m1;
  }
}

// Scores of up to n0, n1, in log2, are to come: all sums are made smaller where that is more than was allowed for.
__device__ __forceinline__ void expect_scores(Walk& me, float n0, float n1) {
  if (__builtin_expect(__any_sync(~0u, n0 > me.m0 || n1 > me.m1), 0)) {
#pragma unroll
    for (int o = 4; o < 32; o *= 2) {
      n0 = fmaxf(n0, __shfl_xor_sync(~0u, n0, o));
      n1 = fmaxf(n1, __shfl_xor_sync(~0u, n1, o));
    }
    n0 = n0 > me.m0 ? n0 + HEADROOM : me.m0, n1 = n1 > me.m1 ? n1 + HEADROOM : me.m1;
    const float r0 = ex2(me.m0 - n0), r1 = ex2(me.m1 - n1);
    me.m0 = n0, me.m1 = n1, me.base0 = me.v_lift - n0, me.base1 = me.v_lift - n1;
#pragma unroll
    for (int k = 0; k < STEPS; k++) me.acc[k][0] *= r0, me.acc[k][1] *= r1, me.acc[k][2] *= r0, me.acc[k][3] *= r1;
    me.zero[0] *= r0, me.zero[1] *= r1, me.zero[2] *= r0, me.zero[3] *= r1;
    if (TURN) me.centre[0] *= r0, me.centre[1] *= r1;
  }
}

__device__ __forceinline__ float capped(const Walk& me, float x) {
  return me.cap * (1.0f - 2.0f / (ex2(x * (2.885390082f / me.cap)) + 1.0f));
}

// Queries in the order of the keys' products times the scales of a group; folded: as much smaller as a field's place in
// a byte makes its codes larger; and lifted.
__device__ __forceinline__ void times_scales(u32* qs, const char* from, int lift, int t) {
  u32 x[2 * STEPS];
  per_channel(from, t, x);
#pragma unroll
  for (int i = 0; i < STEPS; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) qs[2 * i + h] = hmul2(hmul2(qs[2 * i + h], fold(lift, i)), x[2 * i + h]);
}

// One span in shared memory, of which the first `left` tokens count; TAIL: not all do. qp: queries, for key offsets.
template <bool TAIL>
__device__ __forceinline__ void read_span(Walk& me, char* page, const u16* qp, int left, int lane) {
  const int g = me.g, t = me.t;
  if (TAIL) {  // what nobody wrote may be anything: make it 0
#pragma unroll 1
    for (int e = left * NG + lane; e < SPAN * NG; e += 32) ((u16*)(page + VS))[e] = ((u16*)(page + VZ))[e] = 0;
#pragma unroll 1
    for (int e = (KR == 0 ? (left + KG - 1) / KG * D : left) + lane; e < KN / 2; e += 32)
      ((u16*)(page + KS))[e] = ((u16*)(page + KZ))[e] = 0;
    __syncwarp();
  }
  const float k_high = KR == 0 ? larger(largest<KN / 2>(page + KS, lane)) : -1;
  const float v_high = larger(largest<SPAN * NG>(page + VS, lane));
  if (__builtin_expect(__any_sync(~0u, k_high > me.k_most || v_high > me.v_most), 0)) settle(me, k_high, v_high);
  float zq[4];
  u32 qs[2 * STEPS];
  if (KR == 0) {  // q.offset: here queries are rows, and the groups, again and again, columns
    u32 x[2 * STEPS];
    per_channel((const char*)(qp + g * QROW), t, qs);
    per_channel(page + KZ + g % (LOADED + (KR != 0)) * D * 2, t, x);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const u32 a[4] = {qs[2 * i], 0, qs[2 * i + 1], 0};
      if (i == 0)
        mma_from_zero(zq, a, x[0], x[1]);
      else
        mma(zq, a, x[2 * i], x[2 * i + 1]);
    }
    times_scales(qs, page + KS, me.k_lift, t);
  }
#pragma unroll (COUNTED ? SPAN / CHUNK : 1)
  for (int chunk = 0; chunk < SPAN / CHUNK; chunk++) {
    float s[TILES][4], d0, d1;
    const int first = chunk * CHUNK;
    if (KR == 0) {
      if (KG == CHUNK && chunk) {
        per_channel((const char*)(qp + g * QROW), t, qs);
        times_scales(qs, page + KS + chunk * D * 2, me.k_lift, t);
      }
      const int j = first / KG;  // column j: of query 2t at lane 8t + j / 2
      const float a = j % 2 ? zq[1] : zq[0];
      d0 = __shfl_sync(~0u, a, 8 * t + j / 2) * me.f0, d1 = __shfl_sync(~0u, a, 8 * t + 4 + j / 2) * me.f1;
    } else {
      d0 = KR == 2 ? me.z0 : 0, d1 = KR == 2 ? me.z1 : 0;
    }
    scores(page + KC + (first + g) * KROW, KR == 0 ? qs : me.queries, me.k_points, s, t);
    float u0 = me.u0, u1 = me.u1;
    if (KR == 1) {
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int h = 0; h < 2; h++) {  // tokens g and g + 8
          const char* at = page + (first + 16 * tile + g + 8 * h) * 2;
          const float scale = number(half_at(at + KS)), offset = number(half_at(at + KZ));
          s[tile][2 * h] = s[tile][2 * h] * (scale * u0) + offset * me.z0;
          s[tile][2 * h + 1] = s[tile][2 * h + 1] * (scale * u1) + offset * me.z1;
        }
      u0 = u1 = 1;
    }
#if SOFTCAP
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int k = 0; k < 4; k++) s[tile][k] = capped(me, s[tile][k] * (k % 2 ? u1 : u0) + (k % 2 ? d1 : d0));
    u0 = u1 = 1, d0 = d1 = 0;
#endif
    if (TAIL) {
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        if (first + 16 * tile + g >= left) s[tile][0] = s[tile][1] = NONE;
        if (first + 16 * tile + g + 8 >= left) s[tile][2] = s[tile][3] = NONE;
      }
    }
    float n0 = NONE, n1 = NONE;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      n0 = fmaxf(n0, fmaxf(s[tile][0], s[tile][2])), n1 = fmaxf(n1, fmaxf(s[tile][1], s[tile][3]));
    expect_scores(me, n0 * u0 + d0, n1 * u1 + d1);
    d0 += me.base0, d1 += me.base1;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const float* x = s[tile];
      const u32 b0 = transposed(halves(ex2(x[0] * u0 + d0), ex2(x[1] * u1 + d1)));
      const u32 b1 = transposed(halves(ex2(x[2] * u0 + d0), ex2(x[3] * u1 + d1)));
      const int token = first + 16 * tile + 2 * t;
      u32 p0[NG], p1[NG];
      scaled(page + VS + token * NG * 2, b0, b1, p0, p1);
      const char* z0 = page + VZ + (token * NG + g % NG) * 2;
      u32 offsets[4] = {pair_at(z0), ONES, pair_at(z0 + 16 * NG), ONES};
      if (TURN) {
        const u32 ones[4] = {ONES, ONES, ONES, ONES};
        offsets[0] = hfma2(pair_at(z0 + VS - VZ), halves(CENTRE, CENTRE), offsets[0]);
        offsets[2] = hfma2(pair_at(z0 + VS - VZ + 16 * NG), halves(CENTRE, CENTRE), offsets[2]);
        mma(me.centre, ones, p0[0], p1[0]);
      }
      mma(me.zero, offsets, b0, b1);
      add_values(me.acc, me.v_points, page + VC + token * VROW, g, p0, p1);
    }
  }
}
