// ncut.cu on a CPU.
#include "cuda_on_cpu.h"
//
#include "ncut.cu"

LAUNCHED_ON_CPU(ncut_cut)
