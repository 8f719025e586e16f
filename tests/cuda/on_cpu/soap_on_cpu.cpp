// soap.cu as functions of NumPy arrays.
#include "token_on_cpu.h"
//
#include "soap.cu"

extern "C" void masked_mean_on_cpu(unsigned blocks, unsigned images, const Token* tokens,
                                   long long stride, int count, const int* salient, const u16* rows,
                                   float* query, unsigned order) {
  cpu::run_grid({blocks, images, 1}, THREADS, order,
                [&] { masked_mean(tokens, stride, count, salient, rows, query); });
}

extern "C" void attend_on_cpu(unsigned splits, unsigned images, const Token* tokens,
                              long long stride, int count, const float* key, float* attention,
                              float* softmaxes, float* sums, unsigned order) {
  cpu::run_grid({splits, images, 1}, THREADS, order,
                [&] { attend(tokens, stride, count, key, attention, (Softmax*)softmaxes, sums); });
}

extern "C" void merge_on_cpu(unsigned images, int count, int splits, const float* softmaxes,
                             const float* sums, float* attention, float* pooled, unsigned order) {
  cpu::run_grid({images, 1, 1}, THREADS, order,
                [&] { merge(count, splits, (const Softmax*)softmaxes, sums, attention, pooled); });
}

extern "C" void fuse_on_cpu(unsigned images, int embedding, float cls_share, const float* cls,
                            const float* projected, float* fg, float* fused, unsigned order) {
  cpu::run_grid({images, 1, 1}, THREADS, order,
                [&] { fuse(embedding, cls_share, cls, projected, fg, fused); });
}
