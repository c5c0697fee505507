// A decode step in one launch (split-KV), straight from planar pages: packed spans, exact tokens, and the merge.
//
// As many blocks as the device holds at once share all units of work; a block whose share ends inside a row and head
// leaves a partial result, and the last to arrive there merges.
//
// Constants, beside those of packed.cuh: ROWS of queries per KV head, QUERIES of them per query head; BLOCKS per
// multiprocessor; LOGIT: a logit per query head without a value.
#include "packed.cuh"

constexpr int THREADS = WARPS * 32, QUADS = ROWS * D / 4;  // fours of numbers of a cell's output
constexpr int FLIGHT = 8;                                  // parts that a thread asks for before it adds the first

// Four numbers o of a row of the output, of parts whose scores reach m and whose weights sum to l; `rows`: room for all.
__device__ __forceinline__ void put(const Call& c, float* rows, const Cell& x, int quad, float m, float l, const float* o) {
  const int r = quad / (D / 4);
  float by = 1;
#if LOGIT
  const float logit = c.logits[x.head * (ROWS / QUERIES) + r / QUERIES] * 1.442695041f, most = fmaxf(m, logit);
  by = ex2(m - most), l = l * by + ex2(logit - most);
#endif
  by = l > 0 ? by / l : 0;
  const u64 at = ((u64)x.b * HEADS + x.head) * ROWS * D + 4 * quad;
#pragma unroll
  for (int j = 0; j < 4; j++)
    if (TURN)
      rows[4 * quad + j] = o[j] * by;
    else
      c.out[at + j] = narrow(o[j] * by);
}
__device__ __forceinline__ void turn_output(const Call& c, const float* rows, const Cell& x, int warp, int lane) {
  __syncthreads();
  for (int r = warp; r < ROWS; r += WARPS) {
    float y[LANE];
#pragma unroll
    for (int j = 0; j < LANE; j++) y[j] = rows[r * D + LANE * lane + j];
    turn_row(y, lane);
#pragma unroll
    for (int j = 0; j < LANE; j++)
      c.out[(((u64)x.b * HEADS + x.head) * ROWS + r) * D + LANE * lane + j] = narrow(y[j]);
  }
}

// The parts of several blocks to a cell's output, by the last block to arrive.
__device__ __noinline__ void merge(const Call& c, const Deal& deal, const Cell& x, char* memory, float* m, float* l,
                                      int warp, int lane) {
  constexpr int GROUPS = THREADS > QUADS ? THREADS / QUADS : 1;
  const int from = deal.block_of(x.begin), n = deal.block_of(x.end - 1) - from + 1;
  const int late = deal.first(from) < x.begin;  // the first block came here from another cell
  float *w = (float*)memory, *rows = w + n * ROWS + (4 - n * ROWS % 4), *between = rows + ROWS * D;
  const auto place = [&](int i) { return (u64)2 * (from + i) + (i == 0 && late); };  // two per block: see `slot`
  for (int r = warp; r < ROWS; r += WARPS) {
    float high = NONE, total = 0;
    for (int i = lane; i < n; i += 32) high = fmaxf(high, c.top[place(i) * 8 + r]);
    high = over_lanes(high);
    for (int i = lane; i < n; i += 32) {
      const u64 at = place(i) * 8 + r;
      const float y = ex2(c.top[at] - high);
      w[i * ROWS + r] = y, total += y * c.sum[at];
    }
    total = lanes_sum(total);
    if (lane == 0) m[r] = high, l[r] = total;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < QUADS * GROUPS; e += THREADS) {
    const int quad = e % QUADS, group = e / QUADS, r = quad / (D / 4);
    float o[4] = {0, 0, 0, 0};
    for (int first = group; first < n; first += GROUPS * FLIGHT) {
      float4 y[FLIGHT];
#pragma unroll
      for (int i = 0; i < FLIGHT; i++)
        y[i] = *(const float4*)(c.part + place(min(first + i * GROUPS, n - 1)) * ROWS * D + 4 * quad);
#pragma unroll
      for (int i = 0; i < FLIGHT; i++) {
        const float by = first + i * GROUPS < n ? w[(first + i * GROUPS) * ROWS + r] : 0;
        o[0] += y[i].x * by, o[1] += y[i].y * by, o[2] += y[i].z * by, o[3] += y[i].w * by;
      }
    }
    if (GROUPS == 1)
      put(c, rows, x, quad, m[r], l[r], o);
    else
#pragma unroll
      for (int j = 0; j < 4; j++) between[4 * e + j] = o[j];
  }
  if (GROUPS > 1) {
    __syncthreads();
    for (int quad = threadIdx.x; quad < QUADS; quad += THREADS) {
      float o[4] = {0, 0, 0, 0};
      for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int j = 0; j < 4; j++) o[j] += between[4 * (group * QUADS + quad) + j];
      put(c, rows, x, quad, m[quad / (D / 4)], l[quad / (D / 4)], o);
    }
  }
  if (TURN) turn_output(c, rows, x, warp, lane);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) decode(const __grid_constant__ Call c) {
  BLOCK_MEMORY(memory);
  __shared__ __align__(16) Queries q;
  __shared__ u64 bars[WARPS * STAGES];
  __shared__ float sm[WARPS * 8], sl[WARPS * 8], m[8], l[8];
  __shared__ int arrived;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x;
  const Deal deal = dealt(c, gridDim.x, lane);
  if (block >= deal.blocks) return;
  Ring ring = {memory + warp * STAGES * SPAN_BYTES, shared_address(bars + warp * STAGES), 0, 0};
#if COPIES
  if (lane == 0) {
    for (int s = 0; s < STAGES; s++) barrier_init(ring.bars + 8 * s, ARRIVALS);
    barriers_made();
  }
  __syncwarp();
#endif
  const int start = deal.first(block), stop = deal.first(block + 1);
  for (int at = start; at < stop;) {
    const Cell x = cell_of(c, at, lane);
    const int last = min(stop, x.end), parts = deal.block_of(x.end - 1) - deal.block_of(x.begin) + 1;
    float* so = (float*)memory;  // (WARPS, ROWS, D), in the place of the rings
    {
      Asked asked;
      asked.load(c, x.b, x.head, warp, lane);
      Walk me;
      const int turn = (at - start) % WARPS;  // warps go on where they stopped in the cell before
      share(c, me, q, asked, ring, x, at - x.begin + (warp - turn + WARPS) % WARPS, last - x.begin, warp, lane);
      __syncthreads();  // the rings are free
      leave(me, so + warp * ROWS * D, sm + warp * 8, sl + warp * 8);
    }
    __syncthreads();
    const u64 slot = 2 * block + (at != start);  // at most two of a block's cells are shared: its first and its last
    for (int quad = threadIdx.x; quad < QUADS; quad += THREADS) {  // the warps' parts to one
      const int r = quad / (D / 4);
      float most = NONE, sum = 0, o[4] = {0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < WARPS; w++) most = fmaxf(most, sm[w * 8 + r]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float by = ex2(sm[w * 8 + r] - most);
        const float4 y = *(const float4*)(so + w * ROWS * D + 4 * quad);
        sum += by * sl[w * 8 + r], o[0] += y.x * by, o[1] += y.y * by, o[2] += y.z * by, o[3] += y.w * by;
      }
      if (parts == 1) {
        put(c, so + WARPS * ROWS * D, x, quad, most, sum, o);
      } else {
        *(float4*)(c.part + slot * ROWS * D + 4 * quad) = float4{o[0], o[1], o[2], o[3]};
        if (quad % (D / 4) == 0) c.top[slot * 8 + r] = most, c.sum[slot * 8 + r] = sum;
      }
    }
    if (parts == 1) {
      if (TURN) turn_output(c, so + WARPS * ROWS * D, x, warp, lane);
    } else {
      __threadfence();  // this thread's part is seen before its arrival
      __syncthreads();
      if (threadIdx.x == 0) arrived = atomicAdd(c.counters + x.b * HEADS + x.head, 1);
      __syncthreads();
      if (arrived == parts - 1) {
        __threadfence();
        if (threadIdx.x == 0) c.counters[x.b * HEADS + x.head] = 0;
        merge(c, deal, x, memory, m, l, warp, lane);
      }
    }
    at = last;
    if (at < stop) {
      __syncthreads();
      memory_to_copies();  // what threads wrote there, copies may replace
    }
  }
}
