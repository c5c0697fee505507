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
  float scale = 0, offset = 0;
  u32 scales[2], offsets[2];
  if (KEY && KR == 0) {
    const u64 place = ((page * HEADS + head) * (PAGE / KG) + slot / KG) * D + d;
    words<N / 2>(s.scale + 2 * place, scales), words<N / 2>(s.offset + 2 * place, offsets);
  } else if (!KEY || KR == 1) {
    const u64 alone = (KEY ? KA : VA) ? page * PAGE + slot : token, place = KEY ? alone : alone * NG + d / VG;
    scale = number(((const u16*)s.scale)[place]), offset = number(((const u16*)s.offset)[place]);
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const u32 code = (word >> (8 * i) & ((1 << low) - 1)) | (high ? (above >> (8 * i) & 1) << low : 0);
    if (KEY && KR == 2) scale = s.fixed_scale[head * D + d + i], offset = s.fixed_offset[head * D + d + i];
    if (KEY && KR == 0) {
      scale = number((u16)(scales[i / 2] >> (i % 2 * 16))), offset = number((u16)(offsets[i / 2] >> (i % 2 * 16)));
    }
    x[i] = (KEY ? KT : VT) ? s.points[code] * scale + offset : code * scale + offset;
  }
}

// Channels d to d + N - 1 of one packed token as words of pairs.
template <bool KEY, int N>
__device__ __forceinline__ void packed_words(const Side& s, u64 page, int head, int slot, int d, u32* x) {
  float y[N];
#pragma unroll
  for (int i = 0; i < N; i += N == 2 ? 2 : 4) decoded<KEY, N == 2 ? 2 : 4>(s, page, head, slot, d + i, y + i);
#pragma unroll
  for (int i = 0; i < N / 2; i++) x[i] = halves(y[2 * i], y[2 * i + 1]);
}

// The same of an exact one. `by`: what fp32 numbers are multiplied with before they become halves.
template <int N>
__device__ __forceinline__ void exact_words(const Scalar* row, float by, u32* x) {
#if TYPE == 2
#pragma unroll
  for (int i = 0; i < N / 2; i++) x[i] = halves(row[2 * i] * by, row[2 * i + 1] * by);
#else
  words<N / 2>((const char*)row, x);
#endif
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

// Exact rows are on their way to the second-level cache before anybody waits for them: 128 bytes a lane.
__device__ __forceinline__ void touch(const Slice& x, int lane) {
  constexpr int LINES = D * sizeof(Scalar) / 128;
#pragma unroll
  for (int n = lane; n < 16 * LINES; n += 32) {
    if (!x.span || x.row.kf < x.row.vf) prefetch((const char*)x.exact(x.c.k, n / LINES) + n % LINES * 128);
    if (!x.span || x.row.vf < x.row.kf) prefetch((const char*)x.exact(x.c.v, n / LINES) + n % LINES * 128);
  }
}

// Keys g and g + 8 as operands, and how much larger they are than they should be.
template <bool PACKED>
__device__ __forceinline__ float take_keys(const Slice& x, u32 (*k)[D / 8], int g, int t) {
  const Scalar* rows[2] = {};
#pragma unroll
  for (int h = 0; h < 2; h++) rows[h] = x.exact(x.c.k, g + 8 * h);
  const float by = PACKED ? 1 : fitting<2, 8>(rows, 2 * t);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int p = x.position(g + 8 * h);
    const u64 page = PACKED ? x.c.k.table[(u64)x.b * x.c.k_width + p / PAGE] : 0;
#pragma unroll
    for (int i = 0; i < D / 32; i++)
      if (PACKED)
        packed_words<true, 8>(x.c.k, page, x.head, p % PAGE, 32 * i + 8 * t, k[h] + 4 * i);
      else
        exact_words<8>(rows[h] + 32 * i + 8 * t, by, k[h] + 4 * i);
  }
  return by;
}

// Values 2t, 2t + 1, 2t + 8, 2t + 9, likewise.
template <bool PACKED>
__device__ __forceinline__ float take_values(const Slice& x, u32 (*v)[STEPS], int g, int t) {
  constexpr int N = VBYTES == 2 ? 2 : 4;
  const Scalar* rows[4] = {};
#pragma unroll
  for (int n = 0; n < 4; n++) rows[n] = x.exact(x.c.v, 2 * t + n % 2 + n / 2 * 8);
  const float by = PACKED ? 1 : fitting<4, 16>(rows, 2 * g);
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const int p = x.position(2 * t + n % 2 + n / 2 * 8);
    const u64 page = PACKED ? x.c.v.table[(u64)x.b * x.c.v_width + p / PAGE] : 0;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      if (N == 4 && i / VF % 2) continue;  // comes with the one before
      u32 z[2];
      if (PACKED)
        packed_words<false, N>(x.c.v, page, x.head, p % PAGE, value_channel(g, i), z);
      else
        exact_words<N>(rows[n] + value_channel(g, i), by, z);
      v[n][i] = z[0];
      if (N == 4) v[n][i + VF < STEPS ? i + VF : i] = z[1];
    }
  }
  return by;
}

// Scores of packed or exact keys (BF: as bfloat16).
template <bool BF>
__device__ __forceinline__ void slice_scores(const u32 (*k)[D / 8], const u16* q, int g, int t, float* s) {
  float e[4] = {0, 0, 0, 0};
  s[0] = s[1] = s[2] = s[3] = 0;
#pragma unroll
  for (int i = 0; i < STEPS; i++) {  // two chains
    const uint2 y = *(const uint2*)(q + g * QROW + i / 2 * 32 + 8 * t + i % 2 * 4);
    const u32 a[4] = {k[0][2 * i], k[1][2 * i], k[0][2 * i + 1], k[1][2 * i + 1]};
    if (i % 2)
      product<BF>(e, a, y.x, y.y);
    else
      product<BF>(s, a, y.x, y.y);
  }
#pragma unroll
  for (int k = 0; k < 4; k++) s[k] += e[k];
}

template <bool BF>
__device__ __forceinline__ void slice_values(const u32 (*v)[STEPS], float by, Walk& me, const float* w) {
  const u32 b0 = transposed(BF ? brains(w[0], w[1]) : halves(w[0], w[1]));
  const u32 b1 = transposed(BF ? brains(w[2], w[3]) : halves(w[2], w[3]));
  const u32 one = BF ? 0x3F803F80u : ONES, ones[4] = {0, one, 0, one};
  product<BF>(me.zero, ones, b0, b1);
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const u32 a[4] = {prmt(v[0][i], v[1][i], 0x5410), prmt(v[0][i], v[1][i], 0x7632),
                      prmt(v[2][i], v[3][i], 0x5410), prmt(v[2][i], v[3][i], 0x7632)};
    float y[4] = {0, 0, 0, 0};
    product<BF>(y, a, b0, b1);
    const float unit = (float)(1 << value_shift(i)) / V_UNIT / by;  // as if they were codes
#pragma unroll
    for (int k = 0; k < 4; k++) me.acc[i][k] += y[k] * unit;
  }
}

__device__ __forceinline__ Slice slice_of(const Call& c, const Row& row, int b, int head, int n) {
  const bool span = n >= row.exact_slices();
  return {c, row, b, head, 16 * (span ? n - row.exact_slices() : n), span ? row.span() : row.exact(), span};
}

// q and f: queries that meet such keys, and their units in log2.
__device__ __forceinline__ void read_slice(Walk& me, const Slice& x, bool k_packed, bool v_packed, const u16* q,
                                           const float* f) {
  float s[4], by;
  {
    u32 k[2][D / 8];
    by = k_packed ? take_keys<true>(x, k, me.g, me.t) : take_keys<false>(x, k, me.g, me.t);
    if (BRAIN && !k_packed)
      slice_scores<true>(k, q, me.g, me.t, s);
    else
      slice_scores<false>(k, q, me.g, me.t, s);
  }
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
  u32 v[4][STEPS];
  by = v_packed ? take_values<true>(x, v, me.g, me.t) : take_values<false>(x, v, me.g, me.t);
  if (BRAIN && !v_packed)
    slice_values<true>(v, by, me, s);
  else
    slice_values<false>(v, by, me, s);
}
