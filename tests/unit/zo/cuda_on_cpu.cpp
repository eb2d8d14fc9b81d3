// Enough of CUDA for a C++ compiler to run directions.cu: thread after thread, block after block.
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ static inline
#define __launch_bounds__(...)
#define __shared__
#define __syncthreads()
#define __isGlobal(pointer) true
#define __builtin_assume(condition)

struct uint4 { uint32_t x, y, z, w; };
struct Index { unsigned x; };
static Index threadIdx, blockIdx, blockDim, gridDim;

static inline float __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float half_to_float(uint16_t bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
static inline uint16_t float_to_half(float x) { _Float16 h = (_Float16)x; uint16_t bits; memcpy(&bits, &h, 2); return bits; }

#include "directions.cu"

#if GAUSSIAN && SHARED_TABLE
float shared_table[TABLE];
#endif

// Threads one after another: the table is whole before the first of them reads it.
#define ENTRY(name)                                                                  \
  extern "C" void run_##name(const Arguments* arguments, unsigned blocks) {           \
    gridDim.x = blocks, blockDim.x = THREADS;                                         \
    for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++) open_table(*arguments, draw_of(*arguments)); \
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)                           \
      for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++) name(*arguments);   \
  }
ENTRY(add)
ENTRY(add_rows)
ENTRY(scatter)
ENTRY(lots)
