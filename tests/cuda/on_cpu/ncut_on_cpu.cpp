// ncut.cu as a function of NumPy arrays.
#include "cuda_on_cpu.h"
//
#include "ncut.cu"

extern "C" int ncut_cut_on_cpu(const u32* edges, const int* defects, int images, float* spilled,
                               u8* mask, float* vector, u8* degenerate, u8* complete,
                               float* residual, int* count, u16* rows, int* steps, int* components,
                               unsigned order) {
  if (sizeof(Shared) > SHARED_BYTES) return -1;
  cpu::order = order;
  for (int image = 0; image < images; ++image) {
    blockIdx = {(unsigned)image, 0, 0};
    cpu::run_block(THREADS, [&] {
      ncut_cut(edges, defects, spilled, mask, vector, degenerate, complete, residual, count, rows,
               steps, components);
    });
  }
  return (int)sizeof(Shared);
}
