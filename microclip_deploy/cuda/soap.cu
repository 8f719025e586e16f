// SOAP and TokenFusion, but for their matrix products. docs/numerics.md sections 3 and 5.
//
//   masked_mean   mean of the salient tokens: the query
//   attend        one pass over the tokens: scores, and what they would pool, in pieces
//   merge         pieces and the zero token -> attention and pooled token
//   fuse          [FG] to unit length, mixed with [CLS], scaled: what the classes are compared with
//
// Wk^T Wq / sqrt(D) is one matrix on the query, Wv^T P another on the pooled token
// (cuda/soap.py), so that no matrix is applied to all tokens.

#include "token.cuh"

#if !defined(SOAP_WIDTH) || !defined(SOAP_LOGIT_SCALE) || !defined(SOAP_THREADS) || \
    !defined(SOAP_COLUMNS)
#error "cuda/soap.py gives all constants: nothing is chosen here"
#endif

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int D = SOAP_WIDTH;  // a multiple of 16
constexpr int THREADS = SOAP_THREADS, WARPS = THREADS / 32;
constexpr int COLUMNS = SOAP_COLUMNS;      // of masked_mean's blocks
constexpr int PIECES = (D / 4 + 31) / 32;  // groups of 4 numbers that a lane holds of a token
constexpr u32 EVERY_LANE = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = __fadd_rn(x, __shfl_xor_sync(EVERY_LANE, x, step));
  return x;
}

// Four neighbouring numbers, in one load.
__device__ __forceinline__ float4 four(const float* at) { return *(const float4*)at; }

__device__ __forceinline__ float4 four(const u16* at) {
  struct alignas(8) Halves {
    u16 x, y, z, w;
  };
  const Halves h = *(const Halves*)at;
  return {to_float(h.x), to_float(h.y), to_float(h.z), to_float(h.w)};
}

// Grid (D / COLUMNS, B): a warp a group of rows, 32 pairs of columns. Only salient rows are read.
extern "C" __global__ void __launch_bounds__(THREADS)
    masked_mean(const Token* __restrict__ tokens, long long image_stride, int tokens_an_image,
                const int* __restrict__ count, const u16* __restrict__ rows,
                float* __restrict__ query) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  float* part = (float*)shared_bytes;  // [WARPS][COLUMNS]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, image = blockIdx.y;
  const int column = blockIdx.x * COLUMNS + 2 * lane, salient = count[image];
  rows += (size_t)image * tokens_an_image;
  tokens += image * image_stride;
  float even = 0.f, odd = 0.f;
  if (column < D)
#pragma unroll 8
    for (int i = warp; i < salient; i += WARPS) {
      const Token* token = tokens + (size_t)rows[i] * D + column;
      even = __fadd_rn(even, to_float(token[0]));
      odd = __fadd_rn(odd, to_float(token[1]));
    }
  part[warp * COLUMNS + 2 * lane] = even;
  part[warp * COLUMNS + 2 * lane + 1] = odd;
  __syncthreads();
  const int own = blockIdx.x * COLUMNS + threadIdx.x;
  if (threadIdx.x >= COLUMNS || own >= D) return;
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum = __fadd_rn(sum, part[w * COLUMNS + threadIdx.x]);
  query[(size_t)image * D + own] = __fdiv_rn(sum, (float)salient);
}

// A softmax that is not finished: weights are exp(score - peak), `sum` adds them up.
struct Softmax {
  float peak, sum;
};

// Grid (splits, B): a warp reads a token once, scores it, and adds it to its sum.
// Where a new peak appears, what was summed is scaled down.
extern "C" __global__ void __launch_bounds__(THREADS)
    attend(const Token* __restrict__ tokens, long long image_stride, int tokens_an_image,
           const float* __restrict__ key,    // [B][D]
           float* __restrict__ attention,    // [B][N + 1]: raw scores here
           Softmax* __restrict__ softmaxes,  // [B][splits]
           float* __restrict__ sums) {       // [B][splits][D]
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  float* part = (float*)shared_bytes;  // [WARPS][D], then a Softmax a warp
  Softmax* parts = (Softmax*)(part + WARPS * D);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, image = blockIdx.y;
  tokens += image * image_stride;
  float4 wanted[PIECES], sum[PIECES];
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int d = 4 * (lane + 32 * p);
    wanted[p] = d < D ? four(key + (size_t)image * D + d) : float4{0.f, 0.f, 0.f, 0.f};
    sum[p] = {0.f, 0.f, 0.f, 0.f};
  }
  Softmax own = {-3.4e38f, 0.f};
  const int step = gridDim.x * WARPS;
  for (int i = blockIdx.x * WARPS + warp; i < tokens_an_image; i += step) {
    float4 token[PIECES];
    float score = 0.f;
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int d = 4 * (lane + 32 * p);
      token[p] = d < D ? four(tokens + (size_t)i * D + d) : float4{0.f, 0.f, 0.f, 0.f};
      score = __fmaf_rn(token[p].x, wanted[p].x, score);
      score = __fmaf_rn(token[p].y, wanted[p].y, score);
      score = __fmaf_rn(token[p].z, wanted[p].z, score);
      score = __fmaf_rn(token[p].w, wanted[p].w, score);
    }
    score = warp_sum(score);
    if (lane == 0) attention[(size_t)image * (tokens_an_image + 1) + i] = score;
    const float peak = fmaxf(own.peak, score);
    const float keep = expf(own.peak - peak), weight = expf(score - peak);
    own = {peak, __fmaf_rn(own.sum, keep, weight)};
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      sum[p].x = __fmaf_rn(sum[p].x, keep, weight * token[p].x);
      sum[p].y = __fmaf_rn(sum[p].y, keep, weight * token[p].y);
      sum[p].z = __fmaf_rn(sum[p].z, keep, weight * token[p].z);
      sum[p].w = __fmaf_rn(sum[p].w, keep, weight * token[p].w);
    }
  }
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int d = 4 * (lane + 32 * p);
    if (d < D) *(float4*)(part + warp * D + d) = sum[p];
  }
  if (lane == 0) parts[warp] = own;
  __syncthreads();
  Softmax all = {-3.4e38f, 0.f};
#pragma unroll
  for (int w = 0; w < WARPS; ++w) all.peak = fmaxf(all.peak, parts[w].peak);
  float scale[WARPS];
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    scale[w] = expf(parts[w].peak - all.peak);
    all.sum = __fmaf_rn(parts[w].sum, scale[w], all.sum);
  }
  const size_t split = (size_t)image * gridDim.x + blockIdx.x;
  for (int d = threadIdx.x; d < D; d += THREADS) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total = __fmaf_rn(part[w * D + d], scale[w], total);
    sums[split * D + d] = total;
  }
  if (threadIdx.x == 0) softmaxes[split] = all;
}

// Grid (B). The zero token's score is 0 and it adds nothing but weight.
extern "C" __global__ void __launch_bounds__(THREADS)
    merge(int tokens_an_image, int splits, const Softmax* __restrict__ softmaxes,
          const float* __restrict__ sums, float* __restrict__ attention,
          float* __restrict__ pooled) {  // [B][D]
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  float* share = (float*)shared_bytes;  // [splits]: what a piece's weights are multiplied with
  const int image = blockIdx.x;
  softmaxes += (size_t)image * splits;
  sums += (size_t)image * splits * D;
  attention += (size_t)image * (tokens_an_image + 1);
  float peak = 0.f;
  for (int s = 0; s < splits; ++s) peak = fmaxf(peak, softmaxes[s].peak);
  float total = expf(-peak);
  for (int s = 0; s < splits; ++s)
    total = __fmaf_rn(softmaxes[s].sum, expf(softmaxes[s].peak - peak), total);
  if (threadIdx.x < splits)
    share[threadIdx.x] = __fdiv_rn(expf(softmaxes[threadIdx.x].peak - peak), total);
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += THREADS) {
    float sum = 0.f;
#pragma unroll 8
    for (int s = 0; s < splits; ++s) sum = __fmaf_rn(sums[(size_t)s * D + d], share[s], sum);
    pooled[(size_t)image * D + d] = sum;
  }
  for (int i = threadIdx.x; i <= tokens_an_image; i += THREADS)
    attention[i] = __fdiv_rn(expf((i < tokens_an_image ? attention[i] : 0.f) - peak), total);
}

// Grid (B).
extern "C" __global__ void __launch_bounds__(THREADS)
    fuse(int embedding, float cls_share, int tokens_an_image,
         const int* __restrict__ salient,      // [B], or null; [FG] is [CLS] where every token is
         const float* __restrict__ cls,        // [B][E], unit rows
         const float* __restrict__ projected,  // [B][E]
         float* __restrict__ fg, float* __restrict__ fused) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  float* part = (float*)shared_bytes;  // [WARPS]
  const size_t row = (size_t)blockIdx.x * embedding;
  float square = 0.f;
  for (int e = threadIdx.x; e < embedding; e += THREADS)
    square = __fmaf_rn(projected[row + e], projected[row + e], square);
  square = warp_sum(square);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = square;
  __syncthreads();
  square = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) square = __fadd_rn(square, part[w]);
  const float length = __fsqrt_rn(fmaxf(square, 1e-24f));  // as F.normalize
  const bool alone = salient && salient[blockIdx.x] == tokens_an_image;
  for (int e = threadIdx.x; e < embedding; e += THREADS) {
    const float unit = alone ? cls[row + e] : __fdiv_rn(projected[row + e], length);
    fg[row + e] = unit;
    fused[row + e] =
        (float)SOAP_LOGIT_SCALE *
        __fmaf_rn(cls_share, cls[row + e], __fmul_rn(__fadd_rn(1.f, -cls_share), unit));
  }
}
