// Reads the token types of token.cuh without the GPU's instructions.
#pragma once
#define CUDA_ON_CPU
#include "cuda_on_cpu.h"

static inline float to_float(float x) { return x; }
static inline float to_float(uint16_t bits) {
#if TOKEN_TYPE == 0
  _Float16 x;
  memcpy(&x, &bits, 2);
  return (float)x;
#else
  return __uint_as_float((uint32_t)bits << 16);
#endif
}
