// product.cu as a function of NumPy arrays.
#include "cuda_on_cpu.h"
//
#include "product.cu"

extern "C" void product_on_cpu(unsigned blocks, unsigned pieces, int batch, int images, int rows,
                               const float* x, const float* matrix, float* y, unsigned order) {
  cpu::run_grid({blocks, pieces, 1}, THREADS, order,
                [&] { product(batch, images, rows, x, matrix, y); });
}
