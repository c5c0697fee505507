// Attention over 16 tokens of which at least one side is not packed, by one warp: sinks, recent tokens, and the span
// between two frontiers, whose packed side is decoded in registers.
#pragma once

#include "page.cuh"

// Numbers of a row: held sinks, then positions behind them; those below kf and vf are packed.
struct Row {
  int held, kf, vf, behind;
  __device__ __forceinline__ int low() const { return min(kf, vf); }
  __device__ __forceinline__ int exact() const { return held + behind - max(kf, vf); }  // tokens exact on both sides
  __device__ __forceinline__ int span() const { return max(kf, vf) - min(kf, vf); }
  __device__ __forceinline__ int exact_slices() const { return (exact() + 15) / 16; }
  __device__ __forceinline__ int slices() const { return exact_slices() + (span() + 15) / 16; }
  __device__ __forceinline__ int units() const { return max(1, slices() + (low() + SPAN - 1) / SPAN); }
};

#if TYPE == 1
constexpr bool BRAIN = true;
#else
constexpr bool BRAIN = false;
#endif

// N neighbouring channels (2 or 4) of a packed token, fp32.
template <bool KEY, int N>
__device__ __forceinline__ void decoded(const Side& s, u64 page, int head, int slot, int d, float* x) {
  constexpr int low = KEY ? KL : VL, high = KEY ? KH : VH, wide = D * low / 8;
  const u64 token = (page * HEADS + head) * PAGE + slot;
  const char* row = s.codes + token * (KEY ? KROW : VROW);
  const char *at = row + d % wide, *thin = row + wide + d % THIN;
  const u32 word = (N == 2 ? half_at(at) : *(const u32*)at) >> (low * (d / wide));
  const u32 above = high ? (N == 2 ? half_at(thin) : *(const u32*)thin) >> (d / THIN) : 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const u32 code = (word >> (8 * i) & ((1 << low) - 1)) | (high ? (above >> (8 * i) & 1) << low : 0);
    const int c = d + i;
    float scale, offset;
    if (KEY && KR == 2) {
      scale = s.fixed_scale[head * D + c], offset = s.fixed_offset[head * D + c];
    } else {
      const u64 alone = (KEY ? KA : VA) ? page * PAGE + slot : token;
      const u64 place = !KEY ? alone * NG + c / VG : KR ? alone : ((page * HEADS + head) * (PAGE / KG) + slot / KG) * D + c;
      scale = number(((const u16*)s.scale)[place]), offset = number(((const u16*)s.offset)[place]);
    }
    x[i] = (KEY ? KT : VT) ? s.points[code] * scale + offset : code * scale + offset;
  }
}

// Channels d to d + N - 1 of one token as words of pairs: from `row`, or decoded where it is none. `by`: what fp32
// numbers are multiplied with before they become halves.
template <bool KEY, bool PACKED, int N>
__device__ __forceinline__ void taken(const Side& s, const Scalar* row, u64 page, int head, int slot, int d, float by,
                                      u32* x) {
  float y[N];
  if (PACKED) {
#pragma unroll
    for (int i = 0; i < N; i += (N == 2 ? 2 : 4)) decoded<KEY, N == 2 ? 2 : 4>(s, page, head, slot, d + i, y + i);
  } else if (TYPE == 2) {
#pragma unroll
    for (int i = 0; i < N; i++) y[i] = widen(row[d + i]) * by;
  } else {
    words<N / 2>((const char*)(row + d), x);
    return;
  }
#pragma unroll
  for (int i = 0; i < N / 2; i++) x[i] = halves(y[2 * i], y[2 * i + 1]);
}

// A power of two that brings the largest of some fp32 rows to 2^14 at most; 1 for other types.
template <int N, int STRIDE>
__device__ __forceinline__ float fitting(const Scalar* const* rows, int from) {
  if (TYPE != 2) return 1;
  float high = 0;
#pragma unroll 1
  for (int n = 0; n < N; n++)
    for (int d = from; d < D; d += STRIDE)
      for (int i = 0; i < 2; i++) high = fmaxf(high, fabsf(widen(rows[n][d + i])));
  high = over_lanes(high);
  const int e = (int)(__float_as_uint(high) >> 23) - 127;
  return high > 0 ? power(max(-126, min(126, 13 - e))) : 1;
}

struct Slice {  // 16 tokens; beyond `count` the last one again and again, which is not seen
  const Call& c;
  Row row;
  int b, head, first, count;
  bool span;

  __device__ __forceinline__ int index(int i) const { return min(first + i, count - 1); }
  __device__ __forceinline__ int position(int i) const { return (span ? row.low() : max(row.kf, row.vf) - row.held) + index(i); }
  __device__ __forceinline__ bool sink(int i) const { return !span && index(i) < row.held; }
  __device__ __forceinline__ const Scalar* exact(const Side& s, int i) const {
    const u64 line = (u64)b * HEADS + head;
    return sink(i) ? s.sinks + (line * c.sinks + index(i)) * D : s.ring + (line * c.capacity + position(i) % c.capacity) * D;
  }
  __device__ __forceinline__ bool seen(int i, int query) const {
    const int before = sink(i) ? index(i) : position(i) + c.sinks;
    return first + i < count && before <= row.held + row.behind - QUERIES + query % QUERIES;
  }
};

template <bool BF>
__device__ __forceinline__ void product(float* c, const u32* a, u32 b0, u32 b1) {
  if (BF)
    mma_brain(c, a, b0, b1);
  else
    mma(c, a, b0, b1);
}

// q: queries as rows of 16-bit numbers; `by`: what scores come out larger by.
template <bool PACKED>
__device__ __forceinline__ void slice_scores(const Slice& x, const u16* q, int g, int t, float* s, float& by) {
  const Scalar* rows[2] = {};
  u64 page[2] = {};
#pragma unroll
  for (int h = 0; h < 2; h++)
    if (PACKED)
      page[h] = x.c.k.table[(u64)x.b * x.c.k_width + x.position(g + 8 * h) / PAGE];
    else
      rows[h] = x.exact(x.c.k, g + 8 * h);
  by = PACKED ? 1 : fitting<2, 8>(rows, 2 * t);
  u32 k[2][D / 8];
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int i = 0; i < D / 32; i++)
      taken<true, PACKED, 8>(x.c.k, rows[h], page[h], x.head, x.position(g + 8 * h) % PAGE, 32 * i + 8 * t, by, k[h] + 4 * i);
  s[0] = s[1] = s[2] = s[3] = 0;
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const uint2 y = *(const uint2*)(q + g * QROW + i / 2 * 32 + 8 * t + i % 2 * 4);
    const u32 a[4] = {k[0][2 * i], k[1][2 * i], k[0][2 * i + 1], k[1][2 * i + 1]};
    product<BRAIN && !PACKED>(s, a, y.x, y.y);
  }
}

template <bool PACKED>
__device__ __forceinline__ void slice_values(const Slice& x, Walk& me, const float* w) {
  constexpr bool bf = BRAIN && !PACKED;
  constexpr int N = VBYTES == 2 ? 2 : 4;
  const Scalar* rows[4] = {};
  u64 page[4] = {};
  int slot[4];
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const int i = 2 * me.t + n % 2 + n / 2 * 8;
    slot[n] = x.position(i) % PAGE;
    if (PACKED)
      page[n] = x.c.v.table[(u64)x.b * x.c.v_width + x.position(i) / PAGE];
    else
      rows[n] = x.exact(x.c.v, i);
  }
  const float by = PACKED ? 1 : fitting<4, 16>(rows, 2 * me.g);
  u32 v[4][STEPS];
#pragma unroll
  for (int n = 0; n < 4; n++)
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      if (N == 4 && i / VF % 2) continue;
      u32 y[2];
      taken<false, PACKED, N>(x.c.v, rows[n], page[n], x.head, slot[n], value_channel(me.g, i), by, y);
      v[n][i] = y[0];
      if (N == 4) v[n][i + VF < STEPS ? i + VF : i] = y[1];
    }
  const u32 b0 = transposed(bf ? brains(w[0], w[1]) : halves(w[0], w[1]));
  const u32 b1 = transposed(bf ? brains(w[2], w[3]) : halves(w[2], w[3]));
  const u32 one = bf ? 0x3F803F80u : 0x3C003C00u, ones[4] = {0, one, 0, one};
  product<bf>(me.zero, ones, b0, b1);
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const u32 a[4] = {prmt(v[0][i], v[1][i], 0x5410), prmt(v[0][i], v[1][i], 0x7632),
                      prmt(v[2][i], v[3][i], 0x5410), prmt(v[2][i], v[3][i], 0x7632)};
    float y[4] = {0, 0, 0, 0};
    product<bf>(y, a, b0, b1);
    const float unit = (float)(1 << value_shift(i)) / V_UNIT / by;  // as if they were codes
#pragma unroll
    for (int k = 0; k < 4; k++) me.acc[i][k] += y[k] * unit;
  }
}

// Slice number n of a row and head. qe, qp: queries that meet exact and packed keys; fe: units of the first, in log2.
__device__ __forceinline__ void read_slice(const Call& c, Walk& me, const u16* qe, const u16* qp, const float* fe,
                                           const float* fp, const Row& row, int b, int head, int n) {
  const bool span = n >= row.exact_slices();
  const Slice x = {c, row, b, head, 16 * (span ? n - row.exact_slices() : n), span ? row.span() : row.exact(), span};
  const bool k_packed = span && row.kf > row.vf, v_packed = span && row.vf > row.kf;
  const float* f = k_packed ? fp : fe;
  float s[4], by;
  if (k_packed)
    slice_scores<true>(x, qp, me.g, me.t, s, by);
  else
    slice_scores<false>(x, qe, me.g, me.t, s, by);
  const float f0 = f[2 * me.t] / by, f1 = f[2 * me.t + 1] / by;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    s[k] *= k % 2 ? f1 : f0;
#if SOFTCAP
    s[k] = capped(me, s[k]);
#endif
    if (!x.seen(me.g + k / 2 * 8, 2 * me.t + k % 2)) s[k] = NONE;
  }
  expect_scores(me, fmaxf(s[0], s[2]), fmaxf(s[1], s[3]));
#pragma unroll
  for (int k = 0; k < 4; k++) s[k] = s[k] > NONE ? ex2(s[k] + (k % 2 ? me.base1 : me.base0)) : 0;
  if (v_packed)
    slice_values<true>(x, me, s);
  else
    slice_values<false>(x, me, s);
}
