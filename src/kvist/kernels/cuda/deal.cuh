// Work dealt evenly: units of 16 exact tokens or a span of packed ones, of all rows and heads in a line, as many to each
// block. Lengths are on the device, so every block counts for itself.
#pragma once

#include "exact.cuh"

struct Deal {
  int units, blocks, share, more;  // blocks: those that work; share: units of each, the first `more` one more

  __device__ __forceinline__ int first(int block) const { return block * share + min(block, more); }
  __device__ __forceinline__ int block_of(int unit) const {
    const int large = more * (share + 1);
    return unit < large ? unit / (share + 1) : more + (unit - large) / share;
  }
};

struct Cell {  // a row and head; its units lie in [begin, end)
  Row row;
  int b, head, begin, end;
};

__device__ __forceinline__ Row row_at(const Call& c, int b) {
  Row x = {0, 0, 0, 0};
  if (b < c.rows) {
    const int* s = c.state + 8 * b;
    x.held = s[0], x.kf = s[1], x.vf = s[2], x.behind = s[3];
  }
  return x;
}
// Sums over the lanes up to this one.
__device__ __forceinline__ int summed(int x, int lane) {
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int y = __shfl_up_sync(~0u, x, o);
    if (lane >= o) x += y;
  }
  return x;
}

__device__ __forceinline__ Deal dealt(const Call& c, int blocks, int lane) {
  int units = 0;
  for (int b = 0; b < c.rows; b += 32) {
    const int mine = b + lane < c.rows ? row_at(c, b + lane).units() : 0;
    units += __shfl_sync(~0u, summed(mine, lane), 31);
  }
  units *= HEADS;
  const int working = max(1, min(blocks, units / WARPS));
  return {units, working, units / working, units % working};
}

// The cell that a unit belongs to.
__device__ __forceinline__ Cell cell_of(const Call& c, int unit, int lane) {
  int before = 0;
  for (int first = 0;; first += 32) {
    const Row row = row_at(c, first + lane);
    const int mine = first + lane < c.rows ? row.units() : 0, sum = summed(mine, lane);
    const int total = __shfl_sync(~0u, sum, 31);
    if (unit < before + HEADS * total || first + 32 >= c.rows) {
      const int at = min(31, __popc(__ballot_sync(~0u, before + HEADS * sum <= unit)));
      Cell x;
      x.row.held = __shfl_sync(~0u, row.held, at), x.row.behind = __shfl_sync(~0u, row.behind, at);
      x.row.kf = __shfl_sync(~0u, row.kf, at), x.row.vf = __shfl_sync(~0u, row.vf, at);
      const int units = __shfl_sync(~0u, mine, at), start = before + HEADS * __shfl_sync(~0u, sum - mine, at);
      x.b = first + at, x.head = (unit - start) / units;
      x.begin = start + x.head * units, x.end = x.begin + units;
      return x;
    }
    before += HEADS * total;
  }
}
