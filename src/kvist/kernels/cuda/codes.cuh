// Packed codes as operands of matrix products, straight from the planes as they lie.
//
// Keys: rows are tokens g and g + 8, columns four neighbouring channels of a lane's word. Values: rows are two
// neighbouring channels of a lane's word, columns tokens 2t, 2t + 1, 2t + 8, 2t + 9.
#pragma once

#include "layout.cuh"

constexpr float K_UNIT = KT ? 1 : 16777216.0f, V_UNIT = VT ? 1 : 16777216.0f;  // 2^24: a code is a subnormal half

// Words of a lane in the first plane, and channels that product i begins with: field f, word w.
constexpr int NW = KW / 16;
__device__ __forceinline__ int key_channel(int t, int i) { return i % KF * KW + 4 * (t * NW + i / KF); }

// 2^lift, less as many bits as product i's codes lie up in their bytes, twice as a half.
__device__ __forceinline__ u32 fold(int lift, int i) { return 0x00010001u * ((15 + lift - (KT ? 0 : KL * (i % KF))) << 10); }

// Numbers stored per channel at `from`, in the order of the keys' products: pairs.
__device__ __forceinline__ void per_channel(const char* from, int t, u32* x) {
  if (NW == 1) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const uint2 a = *(const uint2*)(from + 2 * key_channel(t, i));
      x[2 * i] = a.x, x[2 * i + 1] = a.y;
    }
  } else {
#pragma unroll
    for (int f = 0; f < KF; f++)
#pragma unroll
      for (int w = 0; w < NW; w += 2) {
        const int i = w * KF + f;
        const uint4 a = *(const uint4*)(from + 2 * key_channel(t, i));
        x[2 * i] = a.x, x[2 * i + 1] = a.y, x[2 * (i + KF)] = a.z, x[2 * (i + KF) + 1] = a.w;
      }
  }
}

// N words in a row, of 4, 8 or 16 bytes at a time.
template <int N>
__device__ __forceinline__ void words(const char* from, u32* x) {
  if (N == 1) {
    x[0] = *(const u32*)from;
  } else if (N == 2) {
    const uint2 a = *(const uint2*)from;
    x[0] = a.x, x[1] = a.y;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const uint4 a = *(const uint4*)(from + 4 * i);
      x[i] = a.x, x[i + 1] = a.y, x[i + 2] = a.z, x[i + 3] = a.w;
    }
  }
}

// A field of pairs of codes, as far up as it lies in its byte; `thin`: the plane of one bit, moved so that a code's last
// bit follows the others.
template <int LOW, int HIGH>
__device__ __forceinline__ u32 field(u32 pairs, u32 thin, int f) {
  const u32 x = pairs & 0x00010001u * (((1 << LOW) - 1) << (LOW * f));
  return HIGH ? x | (thin & 0x00010001u << (LOW * f + LOW)) : x;
}

// The points of a non-uniform ladder as halves, low and high bytes apart: a permutation of bytes looks up four codes.
template <int BITS>
struct Points {
  static constexpr int QUADS = BITS < 2 ? 1 : (1 << BITS) / 4;
  u32 low[QUADS], high[QUADS];

  __device__ __forceinline__ void load(const float* from) {
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
      const u32 a = halves(from[4 * i], from[4 * i + 1]), e = halves(from[4 * i + 2], from[4 * i + 3]);
      low[i] = prmt(a, e, 0x6420), high[i] = prmt(a, e, 0x7531);
    }
  }
  // Codes in the four bytes of x: the points of the first two as a pair, and of the others.
  __device__ __forceinline__ void find(u32 x, u32& first, u32& second) const {
    const u32 nibbles = prmt(x | x >> 4, 0, 0x4420);
    u32 a, e;
    if (BITS == 4) {
      const u32 select = nibbles & 0x7777, upper = (nibbles >> 1 & 0x4444) | 0x3210;
      a = prmt(prmt(low[0], low[QUADS / 4], select), prmt(low[QUADS / 2], low[QUADS - 1], select), upper);
      e = prmt(prmt(high[0], high[QUADS / 4], select), prmt(high[QUADS / 2], high[QUADS - 1], select), upper);
    } else {
      a = prmt(low[0], low[QUADS - 1], nibbles), e = prmt(high[0], high[QUADS - 1], nibbles);
    }
    first = prmt(a, e, 0x5140), second = prmt(a, e, 0x7362);
  }
};
// Codes of a field as the four bytes of a word; `up`: see `field`.
template <int LOW, int HIGH>
__device__ __forceinline__ u32 bytes_of(u32 w, u32 thin, int f, int up) {
  const u32 x = w >> (LOW * f) & 0x01010101u * ((1 << LOW) - 1);
  if (!HIGH) return x;
  return x | ((f ? thin >> (LOW * f - up) : thin << up) & 0x01010101u << LOW);
}

struct KeyWords {
  u32 a[2][NW], thin[2][KH ? NW : 1];  // tokens g and g + 8: bytes 0, 2, 1, 3 of their words
  int up;                              // that a thin plane's bit has to go to follow its first two

  __device__ __forceinline__ void load(const char* row, int t) {
    const int at = t * (KW / 4);
    up = at < THIN ? 2 : 1;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      words<NW>(row + 8 * h * KROW + at, a[h]);
#pragma unroll
      for (int w = 0; w < NW; w++) a[h][w] = KT ? a[h][w] : prmt(a[h][w], 0, 0x3120);
      if (KH) {
        words<NW>(row + 8 * h * KROW + KW + at % THIN, thin[h]);
#pragma unroll
        for (int w = 0; w < NW; w++) thin[h][w] = KT ? thin[h][w] : prmt(thin[h][w], 0, 0x3120);
      }
    }
  }
  // Channels d, d + 1 of both tokens, then d + 2, d + 3.
  __device__ __forceinline__ void codes(int i, const Points<KB>& points, u32* x) const {
    const int w = i / KF, f = i % KF;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 high = KH ? thin[h][KH ? w : 0] : 0;
      if (KT) {
        points.find(bytes_of<KL, KH>(a[h][w], high, f, up), x[h], x[2 + h]);
        continue;
      }
      x[h] = field<KL, KH>(a[h][w], high << up, f);
      x[2 + h] = field<KL, KH>(a[h][w] >> 8, high >> (8 - up), f);
    }
  }
};

// Rows of sums: which channel row g of sums i is; the next one is row g + 8.
constexpr int VBYTES = VW < 32 ? 2 : 4;  // of a lane's word
__device__ __forceinline__ int value_channel(int g, int i) {
  if (VBYTES == 2) return i * VW + 2 * g;
  const int f = i % VF, h = i / VF % 2, j = i / VF / 2;
  return f * VW + 32 * j + 4 * g + 2 * h;
}
// The group of a row, the same for all lanes where groups are of 32 channels and more.
__device__ __forceinline__ int value_group(int i) { return value_channel(0, i) / VG; }
// How many times larger than code * 2^-24 the codes of sums i are.
__device__ constexpr int value_shift(int i) { return VT ? 0 : VL * (i % VF); }

// Values of 16 tokens times their weights; `row`: of token 2t; p0, p1: by group of channels.
__device__ __forceinline__ void add_values(float (*acc)[4], const Points<VB>& points, const char* row, int g, const u32* p0, const u32* p1) {
#pragma unroll
  for (int j = 0; j < (VW < 32 ? 1 : VW / 32); j++) {
    const int at = 32 * j + VBYTES * g;
    const int up = at < THIN ? 2 : 1;
    u32 w[4], thin[4] = {};
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const char* x = row + (n % 2 + n / 2 * 8) * VROW;
      w[n] = VBYTES == 2 ? half_at(x + at) : *(const u32*)(x + at);
      if (VH) thin[n] = VBYTES == 2 ? half_at(x + VW + at % THIN) : *(const u32*)(x + VW + at % THIN);
    }
#pragma unroll
    for (int h = 0; h < VBYTES / 2; h++) {  // bytes 2h and 2h + 1 of the word, of pairs of tokens
      const u32 pick = VT ? (h ? 0x7362 : 0x5140) : h ? 0x7632 : 0x5410;
      u32 a[2], high[2] = {};
#pragma unroll
      for (int n = 0; n < 2; n++) {
        a[n] = prmt(w[2 * n], w[2 * n + 1], pick);
        if (VH) high[n] = prmt(thin[2 * n], thin[2 * n + 1], pick);
      }
#pragma unroll
      for (int f = 0; f < VF; f++) {
        const int i = (j * (VBYTES / 2) + h) * VF + f, k = value_group(i);
        u32 x[4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
          if (VT) {
            points.find(bytes_of<VL, VH>(a[n], high[n], f, up), x[2 * n], x[2 * n + 1]);
            continue;
          }
          x[2 * n] = field<VL, VH>(a[n], high[n] << up, f);
          x[2 * n + 1] = field<VL, VH>(a[n] >> 8, high[n] >> (8 - up), f);
        }
        mma(acc[i], x, p0[k], p1[k]);
      }
    }
  }
}
