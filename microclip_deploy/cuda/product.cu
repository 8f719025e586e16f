// y = x M^T in float32 for few rows of x: the products of a serving head.
//
// cuBLAS would do, but CuPy does not let it be captured in a CUDA graph. A warp holds two rows of M
// in registers and meets them with every row of x that its block has in shared memory: M is read
// once a block, and one image needs no more than that.

#if !defined(PRODUCT_WIDTH) || !defined(PRODUCT_THREADS) || !defined(PRODUCT_ROWS)
#error "cuda/soap.py gives all constants: nothing is chosen here"
#endif

constexpr int K = PRODUCT_WIDTH;  // a multiple of 4
constexpr int THREADS = PRODUCT_THREADS, WARPS = THREADS / 32;
constexpr int ROWS = PRODUCT_ROWS / WARPS;  // of M that a warp holds
constexpr int PIECES = (K / 4 + 31) / 32;   // groups of 4 numbers that a lane holds of a row
constexpr unsigned EVERY_LANE = 0xffffffffu;

// Grid (rows of M / PRODUCT_ROWS, batch / images).
extern "C" __global__ void __launch_bounds__(THREADS)
    product(int batch, int images, int rows, const float* __restrict__ x,  // [B][K]
            const float* __restrict__ matrix,                              // [rows][K]
            float* __restrict__ y) {                                       // [B][rows]
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  float* held = (float*)shared_bytes;  // [images][K]
  const int lane = threadIdx.x & 31, first = (blockIdx.x * WARPS + (threadIdx.x >> 5)) * ROWS;
  const int start = blockIdx.y * images, own = batch - start < images ? batch - start : images;
  float4 wanted[ROWS][PIECES];
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int k = 4 * (lane + 32 * p);
      wanted[r][p] = k < K && first + r < rows
                         ? *(const float4*)(matrix + (size_t)(first + r) * K + k)
                         : float4{0.f, 0.f, 0.f, 0.f};
    }
  for (int i = threadIdx.x; i < own * (K / 4); i += THREADS)
    ((float4*)held)[i] = ((const float4*)(x + (size_t)start * K))[i];
  __syncthreads();
  for (int image = 0; image < own; ++image) {
    float sum[ROWS] = {};
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int k = 4 * (lane + 32 * p);
      const float4 v = k < K ? *(const float4*)(held + image * K + k) : float4{0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        sum[r] = __fmaf_rn(v.x, wanted[r][p].x, sum[r]);
        sum[r] = __fmaf_rn(v.y, wanted[r][p].y, sum[r]);
        sum[r] = __fmaf_rn(v.z, wanted[r][p].z, sum[r]);
        sum[r] = __fmaf_rn(v.w, wanted[r][p].w, sum[r]);
      }
    }
#pragma unroll
    for (int step = 16; step; step >>= 1)
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        sum[r] = __fadd_rn(sum[r], __shfl_xor_sync(EVERY_LANE, sum[r], step));
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (lane == r && first + r < rows) y[(size_t)(start + image) * rows + first + r] = sum[r];
  }
}
