// The CUDA kernels of directions: made in registers from (key, coordinate), added, rounded and written in one pass.
//
// Compiled at run time (fedzo/zo/nvrtc.py) with DTYPE, GAUSSIAN, STOCHASTIC, SHARED_TABLE and LATER_DRAW set; a test
// compiles the same text for the CPU. Bits are those of docs/explanation-randomness.md: no product is fused into a sum.
//
// A thread moves a unit at a time: the W coordinates, numbered from a multiple of W on, that fill 16 bytes of weights.
// The table of Gaussian values is antisymmetric, z(65535 - h) = -z(h), so its upper half is enough. It is gathered
// from shared memory, where 32 threads at random addresses wait for 3.4 turns and not for 32, and lies there times the
// scale: that is the product of every coordinate already, since rounding knows no sign.

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2
#define THREADS 1024
#define TABLE 32768
#define UNROLL 2                 // units of a thread whose loads are under way together
#define TILE (UNROLL * THREADS)  // units that a block moves at a time

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if DTYPE == FLOAT32
typedef float Weight;
#define W 4
#else
typedef unsigned short Weight;
#define W 8
#endif

struct Piece {
  u64 base, out;  // addresses of its first weight: where it is read and, less Arguments.room, where it goes
  i64 start;      // coordinate of its first weight
  i64 size;       // weights
  i64 first;      // tiles of all pieces before it
};

struct Draw {  // which direction, and times what
  u32 k0, k1;
  float scale;
};

struct Arguments {  // of every kernel; mirrored in fedzo/zo/directions_cuda.py
  u64 pieces;       // Piece [count], or 0: the only one is ``one``
  i64 count;
  i64 tiles;  // of all pieces; add_rows: of a row, at most
  Piece one;
  u64 room;   // what is added to every out of ``pieces``
  u64 table;  // float [TABLE], the upper half
  u64 index;  // i64 []: what add_rows and scatter say
  Draw draw;
  u32 draws;       // scatter: whether a direction is added
  u64 later_draw;  // with LATER_DRAW: a Draw that is read in place of ``draw``, when the kernel runs
};

#if LATER_DRAW
__device__ __forceinline__ Draw draw_of(const Arguments& a) { return *(const Draw*)a.later_draw; }
#else
__device__ __forceinline__ const Draw& draw_of(const Arguments& a) { return a.draw; }
#endif

union Unit {
  uint4 bytes;
  Weight weights[W];
};

__device__ __forceinline__ uint4 philox(u64 block, u32 purpose, u32 k0, u32 k1) {
  u32 c0 = (u32)block, c1 = (u32)(block >> 32), c2 = purpose, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    u64 p0 = (u64)0xD2511F53u * c0, p1 = (u64)0xCD9E8D57u * c2;
    c0 = (u32)(p1 >> 32) ^ c1 ^ k0;
    c1 = (u32)p1;
    c2 = (u32)(p0 >> 32) ^ c3 ^ k1;
    c3 = (u32)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  uint4 words = {c0, c1, c2, c3};
  return words;
}

// --- float32 and the weights' dtype -----------------------------------------------------------------------------------

__device__ __forceinline__ float widen(Weight weight) {
#if DTYPE == FLOAT32
  return weight;
#elif DTYPE == BFLOAT16
  return __uint_as_float((u32)weight << 16);
#elif defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(weight));
  return x;
#else
  return half_to_float(weight);
#endif
}

__device__ __forceinline__ Weight narrow(float x) {  // to nearest, ties to even
#if DTYPE == FLOAT32
  return x;
#elif DTYPE == BFLOAT16
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  Weight weight;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(weight) : "f"(x));
  return weight;
#else
  u32 bits = __float_as_uint(x);
  return x == x ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FFF;
#endif
#elif defined(__CUDA_ARCH__)
  Weight weight;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(weight) : "f"(x));
  return weight;
#else
  return float_to_half(x);
#endif
}

#if STOCHASTIC
// Away from zero if draw < 65536 (|x| - |lower|) / gap, of the two neighbours: round_stochastically of rounding.py.
__device__ __forceinline__ Weight narrow_by(float x, u32 draw) {
  const u32 bits = __float_as_uint(x), dropped = DTYPE == BFLOAT16 ? 16 : 13;
  u32 low = bits & ((1u << dropped) - 1);
  float rounded = __uint_as_float(bits - low + (draw < low << (16 - dropped) ? 1u << dropped : 0));
#if DTYPE == FLOAT16
  float size = fabsf(x);
  if (size < 6.103515625e-05f) {  // 2^-14; below it the spacing stays 2^-24
    float quotient = size * 16777216.0f, whole = floorf(quotient);
    float up = (float)draw < (quotient - whole) * 65536.0f ? 1.0f : 0.0f;
    rounded = copysignf((whole + up) * 5.9604644775390625e-08f, x);
  }
#endif
  return narrow((bits & 0x7F800000u) == 0x7F800000u ? x : rounded);
}
#endif

// --- units ------------------------------------------------------------------------------------------------------------

// The W scaled coordinates of z from unit * W on.
__device__ __forceinline__ void make_moves(float* moves, i64 unit, const float* table, const Draw& draw) {
#if GAUSSIAN
  uint4 words = philox(unit * W / 8, 0, draw.k0, draw.k1);
#if W == 4
  u32 pairs[2] = {unit & 1 ? words.z : words.x, unit & 1 ? words.w : words.y};
#else
  u32 pairs[4] = {words.x, words.y, words.z, words.w};
#endif
#pragma unroll
  for (int j = 0; j < W / 2; j++) {
    u32 minus = ~pairs[j] & 0x80008000u;                             // the sign of each half
    u32 at = (pairs[j] ^ (minus - (minus >> 15))) & 0x7FFF7FFFu;     // h - 32768, or 32767 - h below zero
    float low = table[at & 0xFFFFu], high = table[at >> 16];
#if !SHARED_TABLE
    low = __fmul_rn(low, draw.scale), high = __fmul_rn(high, draw.scale);
#endif
    moves[2 * j] = __uint_as_float(__float_as_uint(low) ^ minus << 16);
    moves[2 * j + 1] = __uint_as_float(__float_as_uint(high) ^ (minus & 0x80000000u));
  }
#else
  uint4 words = philox(unit * W / 128, 0, draw.k0, draw.k1);
  u32 number = (u32)(unit * W % 128);
  u32 word = number < 64 ? (number < 32 ? words.x : words.y) : (number < 96 ? words.z : words.w);
  word >>= number % 32;
#pragma unroll
  for (int j = 0; j < W; j++) moves[j] = __uint_as_float(__float_as_uint(draw.scale) ^ (word >> j & 1) << 31);
#endif
}

__device__ __forceinline__ void move(Unit& unit, i64 number, const float* table, const Draw& draw) {
  float moves[W];
  make_moves(moves, number, table, draw);
#if STOCHASTIC
  uint4 draws = philox(number * W / 8, 1, draw.k0, draw.k1);
  u32 pairs[4] = {draws.x, draws.y, draws.z, draws.w};
#endif
#pragma unroll
  for (int j = 0; j < W; j++) {
    float moved = __fadd_rn(widen(unit.weights[j]), moves[j]);
#if STOCHASTIC
    unit.weights[j] = narrow_by(moved, j & 1 ? pairs[j / 2] >> 16 : pairs[j / 2] & 0xFFFFu);
#else
    unit.weights[j] = narrow(moved);
#endif
  }
}

__device__ __forceinline__ i64 units_of(const Piece& p) { return (p.start + p.size - 1) / W - p.start / W + 1; }

// The tiles low, low + step, ... of a piece: 16 bytes at a time where units lie on them, and weight by weight otherwise,
// as at a ragged end.
__device__ __forceinline__ void add_piece(const Piece& p, i64 low, i64 step, const float* table, const Draw& draw) {
  const Weight* base = (const Weight*)p.base;
  Weight* out = (Weight*)p.out;
  __builtin_assume(__isGlobal(base) && __isGlobal(out));
  const i64 first = p.start / W, units = units_of(p);
  const i64 whole = p.start % W == 0 && p.base % 16 == 0 && p.out % 16 == 0 ? p.size / W : 0;
  i64 i = low * TILE + threadIdx.x;
  for (; i < whole; i += step * TILE) {
    Unit unit[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; k++)
      if (i + k * THREADS < whole) unit[k].bytes = ((const uint4*)base)[i + k * THREADS];
#pragma unroll
    for (int k = 0; k < UNROLL; k++)
      if (i + k * THREADS < whole) {
        move(unit[k], first + i + k * THREADS, table, draw);
        ((uint4*)out)[i + k * THREADS] = unit[k].bytes;
      }
  }
  if (whole == units) return;
  for (i = low * TILE + threadIdx.x; i < units; i += step * TILE)
    for (int k = 0; k < UNROLL; k++) {
      const i64 own = i + k * THREADS, at = (first + own) * W - p.start;
      if (own < whole || own >= units) continue;
      Unit unit;
#pragma unroll
      for (int j = 0; j < W; j++) unit.weights[j] = at + j >= 0 && at + j < p.size ? base[at + j] : 0;
      move(unit, first + own, table, draw);
#pragma unroll
      for (int j = 0; j < W; j++)
        if (at + j >= 0 && at + j < p.size) out[at + j] = unit.weights[j];
    }
}

// --- kernels ----------------------------------------------------------------------------------------------------------

#if GAUSSIAN && SHARED_TABLE
extern __shared__ float shared_table[];

__device__ __forceinline__ const float* open_table(const Arguments& a, const Draw& draw) {
  const float* table = (const float*)a.table;
  for (int i = threadIdx.x; i < TABLE; i += blockDim.x) shared_table[i] = __fmul_rn(table[i], draw.scale);
  __syncthreads();
  return shared_table;
}
#else
__device__ __forceinline__ const float* open_table(const Arguments& a, const Draw& draw) { return (const float*)a.table; }
#endif

// out = cast(float32(base) + scale * z), over all pieces. The blocks take the tiles in turn, whatever pieces they are of:
// with a run of tiles for each block memory is a fifth slower.
extern "C" __global__ void __launch_bounds__(THREADS) add(const Arguments a) {
  const Draw& draw = draw_of(a);
  const float* table = open_table(a, draw);
  const Piece* pieces = (const Piece*)a.pieces;
  for (i64 tile = blockIdx.x; tile < a.tiles;) {
    i64 i = 0;
    for (i64 end = a.count; end - i > 1;) {  // the last piece that begins at this tile or before
      const i64 middle = (i + end) / 2;
      if (pieces[middle].first <= tile) i = middle; else end = middle;
    }
    Piece p = pieces ? pieces[i] : a.one;
    p.out += a.room;
    const i64 tiles = (units_of(p) + TILE - 1) / TILE, low = tile - p.first;
    add_piece(p, low, gridDim.x, table, draw);
    tile += (tiles - low + gridDim.x - 1) / gridDim.x * gridDim.x;
  }
}

// The same for the rows [count, one.size] of a matrix; index: the coordinates of their first weights. Blocks take tiles
// of rows in turn: of an expert's matrix, taken by its number, there is one row. The last tile of a row is empty where
// the row begins well, so that of all rows comes last: or half of the blocks had nothing but empty ones.
extern "C" __global__ void __launch_bounds__(THREADS) add_rows(const Arguments a) {
  const Draw& draw = draw_of(a);
  const float* table = open_table(a, draw);
  for (i64 tile = blockIdx.x; tile < a.count * a.tiles; tile += gridDim.x) {
    const i64 row = tile % a.count;
    u64 offset = row * a.one.size * sizeof(Weight);
    Piece p = {a.one.base + offset, a.one.out + offset, ((const i64*)a.index)[row], a.one.size, 0};
    add_piece(p, tile / a.count, a.tiles, table, draw);
  }
}

// The float32 values one.base [one.size], moved if ``draws``, to one.out if it is given, and cast to the weights whose
// addresses ``index`` holds. Compiled with DTYPE of those weights.
extern "C" __global__ void __launch_bounds__(THREADS) scatter(const Arguments a) {
  const Draw& draw = draw_of(a);
  const float* table = a.draws ? open_table(a, draw) : 0;
  const float* values = (const float*)a.one.base;
  for (i64 number = (i64)blockIdx.x * blockDim.x + threadIdx.x; number * W < a.one.size; number += (i64)gridDim.x * blockDim.x) {
    float moves[W];
    if (a.draws) make_moves(moves, number, table, draw);
#pragma unroll
    for (int j = 0; j < W; j++) {
      i64 i = number * W + j;
      if (i >= a.one.size) continue;
      float value = a.draws ? __fadd_rn(values[i], moves[j]) : values[i];
      if (a.one.out) ((float*)a.one.out)[i] = value;
      *(Weight*)(((const u64*)a.index)[i]) = narrow(value);
    }
  }
}

// 64-bit lots: word 2 i and 2 i + 1 of a stream for random masks, as an i64 that is larger for a smaller pair.
extern "C" __global__ void __launch_bounds__(THREADS) lots(const Arguments a) {
  const Draw& draw = draw_of(a);
  i64* out = (i64*)a.one.out;
  for (i64 block = (i64)blockIdx.x * blockDim.x + threadIdx.x; block * 2 < a.one.size; block += (i64)gridDim.x * blockDim.x) {
    uint4 words = philox(block, 5, draw.k0, draw.k1);
    out[2 * block] = ~(i64)(((u64)words.y << 32 | words.x) ^ 1ull << 63);
    if (2 * block + 1 < a.one.size) out[2 * block + 1] = ~(i64)(((u64)words.w << 32 | words.z) ^ 1ull << 63);
  }
}
