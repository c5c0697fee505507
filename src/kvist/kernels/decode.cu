// Decode attention straight from planar pages of uniform codes, with the exact tokens beside them, in one launch.
//
// Keys and values are the M operand of mma.sync.m16n8k16, up to 8 query rows the N operand. A code masked at bit k of a
// half IS the fp16 number code * 2^(k-24): one LOP3 yields two operands. The order of channels in q.k and of channels
// in the rows of the output is free, so pages are used as every other kernel stores them; values need pairs of tokens,
// which one byte permutation makes. Each warp owns pages of its own and a ring of them in shared memory.
//
// Constants: KB, VB bits; KG, VG tokens or channels that share a range; PAGE, HEADS, ROWS, QUERIES; TYPE of queries and
// exact tokens (0 fp16, 1 bf16, 2 fp32); WARPS, STAGES; LOOSE tokens per block; BULK copies (sm_90) or not; SOFTCAP; LOGIT.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef unsigned char u8;

constexpr int D = 128;
constexpr int KW = D * KB / 8, VW = D * VB / 8;                 // bytes of a token
constexpr int KF = 8 / KB, VF = 8 / VB;                         // fields of a byte
constexpr int GROUPS = PAGE / KG, NG = D / VG, TILES = PAGE / 16;
constexpr int KC = 0, VC = KC + PAGE * KW, KS = VC + PAGE * VW, KZ = KS + GROUPS * D * 2, VS = KZ + GROUPS * D * 2;
constexpr int VZ = VS + PAGE * NG * 2, PAGE_BYTES = VZ + PAGE * NG * 2;
constexpr float UNIT = 16777216.0f;                             // 2^24
constexpr float HEADROOM = 4.0f;                                // log2 by which scores may pass the running reference
constexpr float NONE = -1e30f;

__device__ __forceinline__ void mma(float* c, const u32* a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_from_zero(float* c, const u32* a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
               : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}
__device__ __forceinline__ u32 hmul2(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ u32 hmax2(u32 a, u32 b) {
  u32 r;
  asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ u32 halves(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float number(u16 half) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(half));
  return r;
}
__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
__device__ __forceinline__ u32 transposed(u32 x) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}
__device__ __forceinline__ float ex2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u16 half_at(const char* p) { return *(const u16*)p; }

#if TYPE == 2
typedef float Scalar;
__device__ __forceinline__ float widen(Scalar x) { return x; }
__device__ __forceinline__ Scalar narrow(float x) { return x; }
#elif TYPE == 1
typedef u16 Scalar;
__device__ __forceinline__ float widen(Scalar x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ Scalar narrow(float x) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
#else
typedef u16 Scalar;
__device__ __forceinline__ float widen(Scalar x) { return number(x); }
__device__ __forceinline__ Scalar narrow(float x) {
  u16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
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

#if BULK
__device__ __forceinline__ void barrier_init(u32 b) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(b)); }
__device__ __forceinline__ void expect(u32 b, u32 n) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(n) : "memory");
}
__device__ __forceinline__ void bulk(u32 to, const void* from, u32 n, u32 b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(n), "r"(b)
               : "memory");
}
__device__ __forceinline__ void await(u32 b, u32 phase) {
  asm volatile("{\n.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(b),
               "r"(phase)
               : "memory");
}
#else
__device__ __forceinline__ void await() {
  asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
  __syncwarp();
}
__device__ __forceinline__ void spread(char* to, const char* from, int n, int lane) {
  for (int i = lane * 16; i < n; i += 512)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + i)), "l"(from + i) : "memory");
}
#endif

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
    spread(to + x.to, x.from + x.table[index] * x.stride, x.bytes, lane);
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

// What a warp keeps while it walks its pages. m0, m1: what no score of columns 2t and 2t + 1 has passed, HEADROOM above
// the largest when they were set; acc: sums of values, rows of channels; zero: rows 0-7 sums of offsets by group, rows
// 8-15 of the weights. Halves are lifted by powers of two, so that products with small scales are no subnormals: queries
// by k_lift, weights by v_lift, as far as the largest scales so far allow; these may grow to k_most, v_most before.
struct Walk {
  u32 queries[8][4];  // per field and word two pairs: as they are, and folded, side by side as a matrix operand has them
  float acc[8][4], zero[4], m0, m1, f0, f1, cap, k_most, v_most;
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

// Raw scores of the 16 tokens from `x` on: fields in the lower half of a byte, and those in the upper half, 16 times less.
__device__ __forceinline__ void scores(const char* x, const u32* qs, float* s) {
  float low[4], high[4];
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
      float* into = KB * f < 4 ? low : high;
      const int i = 2 * (w * KF + f);
      const u32 codes[4] = {a[w] & mask, e[w] & mask, a8 & mask, e8 & mask};
      if (w == 0 && KB * f % 4 == 0)
        mma_from_zero(into, codes, qs[i], qs[i + 1]);
      else
        mma(into, codes, qs[i], qs[i + 1]);
    }
  }
#pragma unroll
  for (int k = 0; k < 4; k++) s[k] = low[k] + high[k] * 0.0625f;
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

// The largest of n numbers of half precision, those that this lane looks at; n is a multiple of 64.
__device__ __forceinline__ float largest(const char* from, int n, int lane) {
  u32 high = *(const u32*)(from + 4 * lane);
#pragma unroll
  for (int i = 1; i < n / 64; i++) high = hmax2(high, *(const u32*)(from + 128 * i + 4 * lane));
  return fmaxf(number((u16)high), number((u16)(high >> 16)));
}
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
  }
  if (v_high > me.v_most) {
    const int lift = lift_for(v_high);
    const float by = power(lift - me.v_lift);
#pragma unroll
    for (int k = 0; k < 8; k++) me.acc[k][0] *= by, me.acc[k][1] *= by, me.acc[k][2] *= by, me.acc[k][3] *= by;
    me.zero[0] *= by, me.zero[1] *= by, me.zero[2] *= by, me.zero[3] *= by;
    me.v_lift = lift, me.v_most = most_for(lift);
  }
}

// One page in shared memory, of which the first `left` tokens count; TAIL: not all do.
template <bool TAIL>
__device__ __forceinline__ void read_page(Walk& me, char* page, int left, int lane) {
  const int g = me.g, t = me.t;
  if (TAIL) {  // what nobody wrote may be anything: make its values 0
#pragma unroll 1
    for (int e = left * NG + lane; e < PAGE * NG; e += 32) ((u16*)(page + VS))[e] = ((u16*)(page + VZ))[e] = 0;
    __syncwarp();
  }
  const int groups = TAIL ? (left + KG - 1) / KG : GROUPS;  // those that are written
  float k_high = 0;
#pragma unroll
  for (int j = 0; j < GROUPS; j++)
    if (j < groups) k_high = fmaxf(k_high, largest(page + KS + j * D * 2, D, lane));
  const float v_high = largest(page + VS, PAGE * NG, lane);
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
  const float unit = UNIT * power(-me.k_lift);
#if SOFTCAP
  const float u0 = 1, u1 = 1;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float x = s[tile][k] * ((k % 2 ? me.f1 : me.f0) * unit) + z[tile * 16 / KG][k % 2];
      s[tile][k] = me.cap * (1.0f - 2.0f / (ex2(x * (2.885390082f / me.cap)) + 1.0f));
    }
#pragma unroll
  for (int j = 0; j < GROUPS; j++) z[j][0] = z[j][1] = 0;
#else
  const float u0 = me.f0 * unit, u1 = me.f1 * unit;
#endif
  if (TAIL) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      if (16 * tile + g >= left) s[tile][0] = s[tile][1] = NONE;
      if (16 * tile + g + 8 >= left) s[tile][2] = s[tile][3] = NONE;
    }
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
      if (j >= groups) z[j][0] = z[j][1] = 0;
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
    me.m0 = n0, me.m1 = n1;
#pragma unroll
    for (int k = 0; k < 8; k++) me.acc[k][0] *= r0, me.acc[k][1] *= r1, me.acc[k][2] *= r0, me.acc[k][3] *= r1;
    me.zero[0] *= r0, me.zero[1] *= r1, me.zero[2] *= r0, me.zero[3] *= r1;
  }
#pragma unroll
  for (int j = 0; j < GROUPS; j++) z[j][0] += me.v_lift - me.m0, z[j][1] += me.v_lift - me.m1;
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

// A warp's share of the packed tokens: pages first + warp, first + warp + WARPS, … below `last`.
__device__ __forceinline__ void packed_part(const Call& c, const float* q, const float* size, char* ring, u64* bars,
                                            float* so, float* sm, float* sl, int b, int head, int first, int last,
                                            int limit, int warp, int lane) {
  const int n = max(0, (last - first - warp + WARPS - 1) / WARPS);
  Walk me;
  const int g = me.g = lane / 4, t = me.t = lane % 4;
#if BULK
  const u32 bar = shared_address(bars), rings = shared_address(ring);
  if (lane == 0) {
    for (int s = 0; s < STAGES; s++) barrier_init(bar + 8 * s);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncwarp();
  const Copy mine = copy_of(c, min(lane, 5), b, head);
  const int* table = mine.table + first + warp;
  for (int s = 0; s < min(STAGES, n); s++) fetch(mine, rings + s * PAGE_BYTES, bar + 8 * s, table[s * WARPS], lane);
  int next = STAGES < n ? table[STAGES * WARPS] : 0;
#else
  for (int s = 0; s < STAGES; s++) {
    if (s < n) fetch(c, ring + s * PAGE_BYTES, first + warp + s * WARPS, b, head, lane);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
#endif
#pragma unroll
  for (int i = 0; i < 8; i++) {  // odd fields of two bits a quarter, which their place in a byte makes four times as large
    const int f = i % KF, d = channel(t, i / KF, f);
    const float less = KB == 2 && f % 2 ? 0.25f : 1.0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float x = q[g * D + d + 2 * h], y = q[g * D + d + 2 * h + 1];
      me.queries[i][2 * h] = halves(x, y);
      me.queries[i][2 * h + 1] = halves(x * less, y * less);
    }
  }
  me.f0 = size[2 * t] * 1.442695041f, me.f1 = size[2 * t + 1] * 1.442695041f;  // units of the queries, in log2
  me.m0 = me.m1 = NONE, me.cap = c.softcap * 1.442695041f;
  me.k_most = me.v_most = -1, me.k_lift = me.v_lift = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) me.acc[i][0] = me.acc[i][1] = me.acc[i][2] = me.acc[i][3] = 0;
  me.zero[0] = me.zero[1] = me.zero[2] = me.zero[3] = 0;
  int stage = 0;
  u32 phase = 0;
  const bool tail = limit % PAGE && n > 0 && first + warp + (n - 1) * WARPS == limit / PAGE;
#pragma unroll 1
  for (int i = 0; i < n - tail; i++) {
    char* page = ring + stage * PAGE_BYTES;
#if BULK
    await(bar + 8 * stage, phase);
#else
    await();
#endif
    read_page<false>(me, page, PAGE, lane);
    __syncwarp();
#if BULK
    if (i + STAGES < n) {
      fetch(mine, rings + stage * PAGE_BYTES, bar + 8 * stage, next, lane);
      next = table[min(i + STAGES + 1, n - 1) * WARPS];  // asked for an iteration before it is needed
    }
#else
    if (i + STAGES < n) fetch(c, page, first + warp + (i + STAGES) * WARPS, b, head, lane);
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  if (tail) {
#if BULK
    await(bar + 8 * stage, phase);
#else
    await();
#endif
    read_page<true>(me, ring + stage * PAGE_BYTES, limit % PAGE, lane);
  }
#if !BULK
  asm volatile("cp.async.wait_group 0;" ::: "memory");
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

extern "C" __global__ void __launch_bounds__(WARPS * 32) decode(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) char memory[];
  __shared__ __align__(8) u64 bars[WARPS * STAGES];
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
