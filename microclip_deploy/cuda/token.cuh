// The types that tokens come in: 0 half, 1 bfloat16, 2 float; read as float32.
#pragma once
#ifndef TOKEN_TYPE
#error "cuda_source.py gives the token type"
#endif

#if TOKEN_TYPE == 2
typedef float Token;
#else
typedef unsigned short Token;
#endif

#ifndef CUDA_ON_CPU  // a CPU that runs these files brings its own
__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(unsigned short x) {
#if TOKEN_TYPE == 0
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
#else
  return __uint_as_float((unsigned)x << 16);
#endif
}
#endif
