// product.cu on a CPU.
#include "cuda_on_cpu.h"
//
#include "product.cu"

LAUNCHED_ON_CPU(product)
