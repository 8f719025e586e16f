// soap.cu on a CPU.
#include "token_on_cpu.h"
//
#include "soap.cu"

LAUNCHED_ON_CPU(masked_mean)
LAUNCHED_ON_CPU(attend)
LAUNCHED_ON_CPU(merge)
LAUNCHED_ON_CPU(fuse)
