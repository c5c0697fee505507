// Attention over one packed page by one warp.
//
// Keys and values are the M operand of mma.sync.m16n8k16, up to 8 query rows the N operand. A code masked at bit k of a
// half IS the fp16 number code * 2^(k-24): one LOP3 yields two operands. The order of channels in q.k and of channels
// in the rows of the output is free, so pages are used as every other kernel stores them; values need pairs of tokens,
// which one byte permutation makes.
//
// Constants, beside those of layout.cuh: SOFTCAP or not.
#pragma once

#include "layout.cuh"

constexpr float UNIT = 16777216.0f;  // 2^24
constexpr float HEADROOM = 4.0f;     // log2 by which scores may pass the largest before all sums are rescaled

// What a warp keeps while it walks its pages. m0, m1: what no score of columns 2t and 2t + 1 has passed, HEADROOM above
// the largest when they were set; acc: sums of values, rows of channels; zero: rows 0-7 sums of offsets by group, rows
// 8-15 of the weights. Halves are lifted by powers of two, so that products with small scales are no subnormals: queries
// by k_lift, weights by v_lift, as far as the largest scales so far allow; these may grow to k_most, v_most before.
// f0, f1: units of the queries, in log2; u0, u1: units of raw scores; base0, base1: what is added to scores in exponents.
struct Walk {
  u32 queries[8][4];  // per field and word two pairs: as they are, and folded, side by side as a matrix operand has them
  float acc[8][4], zero[4], m0, m1, f0, f1, u0, u1, base0, base1, cap, k_most, v_most;
  int g, t, k_lift, v_lift;
};

// Channels that field f and word w of a lane begin with, among the words of a key.
__device__ __forceinline__ int channel(int t, int w, int f) { return f * KW + 4 * (t * (KW / 16) + w); }

// Queries times what is stored per channel at `from`, in the order of the keys' words: 16 pairs.
__device__ __forceinline__ void per_channel(const char* from, int t, u32* x) {
#pragma unroll
  for (int f = 0; f < KF; f++)
#pragma unroll
    for (int w = 0; w < KW / 16; w += 2) {
      const uint4 a = *(const uint4*)(from + 2 * channel(t, w, f));
      x[2 * (w * KF + f)] = a.x, x[2 * (w * KF + f) + 1] = a.y;
      x[2 * (w * KF + KF + f)] = a.z, x[2 * (w * KF + KF + f) + 1] = a.w;
    }
}

// Raw scores of the 16 tokens from `x` on.
__device__ __forceinline__ void scores(const char* x, const u32* qs, float* s) {
  const char* y = x + 8 * KW;
  u32 a[KW / 16], e[KW / 16];
  if (KW / 16 == 2) {
    *(uint2*)a = *(const uint2*)x, *(uint2*)e = *(const uint2*)y;
  } else {
    *(uint4*)a = *(const uint4*)x, *(uint4*)e = *(const uint4*)y;
  }
#pragma unroll
  for (int w = 0; w < KW / 16; w++) {
    a[w] = prmt(a[w], 0, 0x3120), e[w] = prmt(e[w], 0, 0x3120);
    const u32 a8 = a[w] >> 8, e8 = e[w] >> 8;
#pragma unroll
    for (int f = 0; f < KF; f++) {
      const u32 mask = 0x00010001u * (((1 << KB) - 1) << (KB * f));
      const int i = 2 * (w * KF + f);
      const u32 codes[4] = {a[w] & mask, e[w] & mask, a8 & mask, e8 & mask};
      if (w == 0 && f == 0)
        mma_from_zero(s, codes, qs[i], qs[i + 1]);
      else
        mma(s, codes, qs[i], qs[i + 1]);
    }
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
  if (k_high > me.k_most) {
    const int lift = lift_for(k_high);
    const float by = power(lift - me.k_lift);  // exact, or as small as it would have been
#pragma unroll
    for (int k = 0; k < 8; k++)
#pragma unroll
      for (int h = 1; h < 4; h += 2)
        me.queries[k][h] = halves(number((u16)me.queries[k][h]) * by, number((u16)(me.queries[k][h] >> 16)) * by);
    me.k_lift = lift, me.k_most = most_for(lift);
    me.u0 = me.f0 * UNIT * power(-lift), me.u1 = me.f1 * UNIT * power(-lift);
  }
  if (v_high > me.v_most) {
    const int lift = lift_for(v_high);
    const float by = power(lift - me.v_lift);
#pragma unroll
    for (int k = 0; k < 8; k++) me.acc[k][0] *= by, me.acc[k][1] *= by, me.acc[k][2] *= by, me.acc[k][3] *= by;
    me.zero[0] *= by, me.zero[1] *= by, me.zero[2] *= by, me.zero[3] *= by;
    me.v_lift = lift, me.v_most = most_for(lift);
    me.base0 = lift - me.m0, me.base1 = lift - me.m1;
  }
}

// One page in shared memory, of which the first `left` tokens count; TAIL: not all do.
template <bool TAIL>
__device__ __forceinline__ void read_page(Walk& me, char* page, int left, int lane) {
  const int g = me.g, t = me.t;
  if (TAIL) {  // what nobody wrote may be anything: make it 0
#pragma unroll 1
    for (int e = left * NG + lane; e < PAGE * NG; e += 32) ((u16*)(page + VS))[e] = ((u16*)(page + VZ))[e] = 0;
#pragma unroll 1
    for (int e = (left + KG - 1) / KG * D + lane; e < GROUPS * D; e += 32)
      ((u16*)(page + KS))[e] = ((u16*)(page + KZ))[e] = 0;
    __syncwarp();
  }
  const float k_high = larger(largest<GROUPS * D>(page + KS, lane)), v_high = larger(largest<PAGE * NG>(page + VS, lane));
  if (__builtin_expect(__any_sync(~0u, k_high > me.k_most || v_high > me.v_most), 0)) settle(me, k_high, v_high);
  float s[TILES][4], n0 = NONE, n1 = NONE, z[GROUPS][2];
  {  // q.offset: here queries are rows, and the groups, again and again, columns
    float zq[4];
    u32 a[16];
    per_channel(page + KZ + g % GROUPS * D * 2, t, a);
    mma_from_zero(zq, me.queries[0], a[0], a[1]);
#pragma unroll
    for (int k = 1; k < 8; k++) mma(zq, me.queries[k], a[2 * k], a[2 * k + 1]);
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      z[j][0] = __shfl_sync(~0u, zq[j % 2], 8 * t + j / 2) * me.f0;
      z[j][1] = __shfl_sync(~0u, zq[j % 2], 8 * t + 4 + j / 2) * me.f1;
    }
  }
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    u32 qs[16];
    per_channel(page + KS + j * D * 2, t, qs);
#pragma unroll
    for (int k = 0; k < 16; k++) qs[k] = hmul2(me.queries[k / 2][k % 2 * 2 + 1], qs[k]);
#pragma unroll
    for (int u = 0; u < KG / 16; u++) {
      const int tile = j * (KG / 16) + u;
      scores(page + KC + (16 * tile + g) * KW + t * (KW / 4), qs, s[tile]);
    }
  }
#if SOFTCAP
  const float u0 = 1, u1 = 1;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float x = s[tile][k] * (k % 2 ? me.u1 : me.u0) + z[tile * 16 / KG][k % 2];
      s[tile][k] = me.cap * (1.0f - 2.0f / (ex2(x * (2.885390082f / me.cap)) + 1.0f));
    }
#pragma unroll
  for (int j = 0; j < GROUPS; j++) z[j][0] = z[j][1] = 0;
#else
  const float u0 = me.u0, u1 = me.u1;
#endif
  if (TAIL) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      if (16 * tile + g >= left) s[tile][0] = s[tile][1] = NONE;
      if (16 * tile + g + 8 >= left) s[tile][2] = s[tile][3] = NONE;
    }
  }
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    float a = NONE, e = NONE;
#pragma unroll
    for (int u = 0; u < KG / 16; u++) {
      const float* x = s[j * (KG / 16) + u];
      a = fmaxf(a, fmaxf(x[0], x[2])), e = fmaxf(e, fmaxf(x[1], x[3]));
    }
    n0 = fmaxf(n0, a * u0 + z[j][0]), n1 = fmaxf(n1, e * u1 + z[j][1]);
  }
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
    for (int k = 0; k < 8; k++) me.acc[k][0] *= r0, me.acc[k][1] *= r1, me.acc[k][2] *= r0, me.acc[k][3] *= r1;
    me.zero[0] *= r0, me.zero[1] *= r1, me.zero[2] *= r0, me.zero[3] *= r1;
  }
#pragma unroll
  for (int j = 0; j < GROUPS; j++) z[j][0] += me.base0, z[j][1] += me.base1;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const float *score = s[tile], d0 = z[tile * 16 / KG][0], d1 = z[tile * 16 / KG][1];
    const u32 b0 = transposed(halves(ex2(score[0] * u0 + d0), ex2(score[1] * u1 + d1)));
    const u32 b1 = transposed(halves(ex2(score[2] * u0 + d0), ex2(score[3] * u1 + d1)));
    const int token = 16 * tile + 2 * t;
    u32 p0[NG], p1[NG], w[4];
    scaled(page + VS + token * NG * 2, b0, b1, p0, p1);
    const char* z0 = page + VZ + (token * NG + g % NG) * 2;
    const u32 offsets[4] = {pair_at(z0), 0x3C003C00u, pair_at(z0 + 16 * NG), 0x3C003C00u};  // and ones
    mma(me.zero, offsets, b0, b1);
#pragma unroll
    for (int j = 0; j < VW / 32; j++) {
      const char* x = page + VC + token * VW + 32 * j + 4 * g;
      w[0] = *(const u32*)x, w[1] = *(const u32*)(x + VW);
      w[2] = *(const u32*)(x + 8 * VW), w[3] = *(const u32*)(x + 9 * VW);
#pragma unroll
      for (int h = 0; h < 2; h++) {  // bytes 2h and 2h + 1 of the word, of pairs of tokens
        const u32 pick = h ? 0x7632 : 0x5410, a = prmt(w[0], w[1], pick), e = prmt(w[2], w[3], pick);
        const u32 a8 = a >> 8, e8 = e >> 8;
#pragma unroll
        for (int f = 0; f < VF; f++) {
          const u32 mask = 0x00010001u * (((1 << VB) - 1) << (VB * f));
          const int k = (f * VW + 32 * j) / VG;
          const u32 codes[4] = {a & mask, a8 & mask, e & mask, e8 & mask};
          mma(me.acc[(j * 2 + h) * VF + f], codes, p0[k], p1[k]);
        }
      }
    }
  }
}
