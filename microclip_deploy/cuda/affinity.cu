// The affinity graph of patch tokens: which pairs are more alike than tau. docs/numerics.md 2.1.
//
//   ncut_lengths    for the cosines: the length of every token, its image's mean removed if asked
//   ncut_affinity   products of all pairs on tensor cores -> one bit a pair
//
// One block compares one tile of 64 tokens with another. The tiles (i, j) with i <= j are enough:
// the block writes its tile and the transpose of it, and the graph is symmetric to the bit.
// Products are accumulated in float32 and compared there; a similarity is never rounded to the
// tokens' type.
//
// Bits lie word by word, edges[image][word][row], as ncut.cu reads them: bit c of word w of row r
// says that tokens r and 32 w + c are joined. Bits of rows and columns past the last token are 0.

#include "token.cuh"

#if !defined(NCUT_TOKENS) || !defined(NCUT_WORDS) || !defined(NCUT_TILES) ||   \
    !defined(NCUT_WIDTH) || !defined(NCUT_TAU) || !defined(NCUT_STAGES) ||     \
    !defined(NCUT_CENTRED) || !defined(NCUT_TILE) || !defined(NCUT_THREADS) || \
    !defined(NCUT_LENGTHS_THREADS)
#error "cuda/layout.py gives all constants: nothing is chosen here"
#endif

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int N = NCUT_TOKENS;
constexpr int WORDS = NCUT_WORDS;
constexpr int ROWS = 32 * WORDS;
constexpr int D = NCUT_WIDTH;  // a multiple of 16, so that every row starts on 16 bytes
constexpr int TILE = NCUT_TILE;
constexpr int THREADS = NCUT_THREADS;
constexpr int LENGTHS_THREADS = NCUT_LENGTHS_THREADS;
constexpr int STAGES = NCUT_STAGES;               // chunks on their way or in use at one time
constexpr int OPERANDS = NCUT_TILES > 1 ? 2 : 1;  // one tile is compared with itself alone
constexpr u32 EVERY_LANE = 0xffffffffu;

// A chunk of a row is 128 bytes; 16 bytes of padding put rows four banks apart, so that the reads
// of a warp do not collide.
constexpr int VECTOR = 16 / (int)sizeof(Token);  // elements moved at once
constexpr int CHUNK = 8 * VECTOR, PITCH = CHUNK + VECTOR;
constexpr int CHUNKS = (D + CHUNK - 1) / CHUNK;
constexpr int OPERAND = TILE * PITCH;

struct alignas(16) Shared {
  Token operands[STAGES * OPERANDS * OPERAND];
  u32 words[TILE * 2];  // the tile's bits, two words a row
};

// ------------------------------------------------------------------------------ the hardware

#ifndef CUDA_ON_CPU  // a CPU that runs this file brings its own

// 16 bytes from global to shared memory without waiting; zeros where `valid` is false.
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const u32 address = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 16 : 0));
#else
  *(uint4*)to = valid ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void close_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}

// Waits until at most `pending` of the latest groups are still on their way.
template <int pending>
__device__ __forceinline__ void await_groups() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending));
#endif
}

#if TOKEN_TYPE < 2
// c (16 x 8) += a (16 x 16) b (16 x 8) in float32.
__device__ __forceinline__ void multiply(float* c, const u32* a, const u32* b) {
#if TOKEN_TYPE == 0 && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif TOKEN_TYPE == 0
  for (int half = 0; half < 2; ++half)  // Turing multiplies 16 x 8 by 8 x 8
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#error "bfloat16 needs compute capability 8.0"
#endif
}
#endif

#endif  // CUDA_ON_CPU

// ------------------------------------------------------------------------------ lengths

// One block an image, a warp a token. With NCUT_CENTRED it also writes the tokens without their
// image's mean, in float32: the products of those decide, and rounding them would move edges.
extern "C" __global__ void __launch_bounds__(LENGTHS_THREADS)
    ncut_lengths(const Token* __restrict__ tokens, long long image_stride,
                 float* __restrict__ lengths,    // [B][N], at least 1e-12
                 float* __restrict__ centred) {  // [B][N][D], or not used
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, image = blockIdx.x;
  tokens += image * image_stride;
#if NCUT_CENTRED
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  float* mean = (float*)shared_bytes;  // [D]
  for (int d = threadIdx.x; d < D; d += LENGTHS_THREADS) {
    float sum = 0.f;
    for (int i = 0; i < N; ++i) sum = __fadd_rn(sum, to_float(tokens[(size_t)i * D + d]));
    mean[d] = __fdiv_rn(sum, (float)N);
  }
  __syncthreads();
#endif
  for (int i = warp; i < N; i += LENGTHS_THREADS / 32) {
    float square = 0.f;
    for (int d = lane; d < D; d += 32) {
      float x = to_float(tokens[(size_t)i * D + d]);
#if NCUT_CENTRED
      x = __fadd_rn(x, -mean[d]);
      centred[((size_t)image * N + i) * D + d] = x;
#endif
      square = __fmaf_rn(x, x, square);
    }
#pragma unroll
    for (int step = 16; step; step >>= 1)
      square = __fadd_rn(square, __shfl_xor_sync(EVERY_LANE, square, step));
    if (lane == 0) lengths[(size_t)image * N + i] = fmaxf(__fsqrt_rn(square), 1e-12f);
  }
}

// ------------------------------------------------------------------------------ affinity

// What two tokens' product must exceed: tau, or tau times both lengths for the cosines.
struct Level {
  const float* lengths;  // of this image, or null

  __device__ __forceinline__ bool exceeded(float product, int row, int column) const {
    if (row >= N || column >= N) return false;
    const float level = (float)NCUT_TAU;
    return product > (lengths ? level * lengths[row] * lengths[column] : level);
  }
};

// Starts loading one chunk of both tiles' rows.
__device__ __forceinline__ void load(Token* stage, const Token* tokens, int chunk, int row_tile,
                                     int column_tile) {
  constexpr int VECTORS = CHUNK / VECTOR;
  const int operands = row_tile == column_tile ? 1 : 2;
  for (int operand = 0; operand < operands; ++operand)
    for (int v = threadIdx.x; v < TILE * VECTORS; v += THREADS) {
      const int r = v / VECTORS, c = v % VECTORS * VECTOR;
      const int row = (operand ? column_tile : row_tile) * TILE + r, column = chunk * CHUNK + c;
      const bool valid = row < N && column < D;
      copy16(stage + operand * OPERAND + r * PITCH + c,
             tokens + (valid ? (size_t)row * D + column : 0), valid);
    }
  close_group();
}

#if TOKEN_TYPE < 2

// A warp forms 32 x 32 products as 2 x 4 pieces of the hardware's 16 x 8.
struct Products {
  float piece[2][4][4];

  __device__ __forceinline__ void accumulate(const Token* a, const Token* b, int lane, int warp) {
    const int top = warp / 2 * 32, left = warp % 2 * 32, group = lane >> 2, pair = lane & 3;
#pragma unroll
    for (int k = 0; k < CHUNK; k += 16) {
      u32 rows[2][4], columns[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Token* at = a + (top + i * 16 + group) * PITCH + k + 2 * pair;
        rows[i][0] = *(const u32*)at;
        rows[i][1] = *(const u32*)(at + 8 * PITCH);
        rows[i][2] = *(const u32*)(at + 8);
        rows[i][3] = *(const u32*)(at + 8 * PITCH + 8);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Token* at = b + (left + j * 8 + group) * PITCH + k + 2 * pair;
        columns[j][0] = *(const u32*)at;
        columns[j][1] = *(const u32*)(at + 8);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(piece[i][j], rows[i], columns[j]);
    }
  }

  // Compares, and gathers each row's bits from the four lanes that hold them. Returns whether a
  // token's product with itself is no number.
  __device__ __forceinline__ bool compare(const Level& level, int row0, int column0, u32* words,
                                          int lane, int warp) const {
    const int top = warp / 2 * 32, left = warp % 2 * 32, group = lane >> 2, pair = lane & 3;
    bool defect = false;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = top + i * 16 + h * 8 + group;
        u32 word = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = j * 8 + 2 * pair + e, row = row0 + r, column = column0 + left + c;
            const float product = piece[i][j][2 * h + e];
            if (level.exceeded(product, row, column)) word |= 1u << c;
            defect |= row == column && row < N && !(fabsf(product) <= 3.4e38f);
          }
        word |= __shfl_xor_sync(EVERY_LANE, word, 1);
        word |= __shfl_xor_sync(EVERY_LANE, word, 2);
        if (pair == 0) words[2 * r + warp % 2] = word;
      }
    return defect;
  }
};

#else

// True float32 products: a thread forms rows ty + 8 i by columns tx + 16 j.
struct Products {
  float piece[8][4];

  __device__ __forceinline__ void accumulate(const Token* a, const Token* b, int, int) {
    const int ty = threadIdx.x >> 4, tx = threadIdx.x & 15;
#pragma unroll 2
    for (int k = 0; k < CHUNK; k += 4) {
      float4 columns[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) columns[j] = *(const float4*)(b + (tx + 16 * j) * PITCH + k);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float4 row = *(const float4*)(a + (ty + 8 * i) * PITCH + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          piece[i][j] = __fmaf_rn(row.x, columns[j].x, piece[i][j]);
          piece[i][j] = __fmaf_rn(row.y, columns[j].y, piece[i][j]);
          piece[i][j] = __fmaf_rn(row.z, columns[j].z, piece[i][j]);
          piece[i][j] = __fmaf_rn(row.w, columns[j].w, piece[i][j]);
        }
      }
    }
  }

  // A vote of a warp is 16 neighbouring bits of two rows.
  __device__ __forceinline__ bool compare(const Level& level, int row0, int column0, u32* words,
                                          int lane, int) const {
    const int ty = threadIdx.x >> 4, tx = threadIdx.x & 15;
    bool defect = false;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int r = ty + 8 * i, row = row0 + r, column = column0 + tx + 16 * j;
        const u32 votes = __ballot_sync(EVERY_LANE, level.exceeded(piece[i][j], row, column));
        if (tx == 0) ((u16*)words)[4 * r + j] = (u16)(lane & 16 ? votes >> 16 : votes);
        defect |= row == column && row < N && !(fabsf(piece[i][j]) <= 3.4e38f);
      }
    return defect;
  }
};

#endif

// A warp writes one 32 x 32 square of the tile and its transpose. On the diagonal the lower
// triangle decides, as in the definition.
__device__ __forceinline__ void store(const u32* words, u32* edges, int row_tile, int column_tile,
                                      int lane, int warp) {
  const int down = warp / 2, right = warp % 2, rows = 2 * row_tile + down,
            columns = 2 * column_tile + right;
  u32 word = words[2 * (down * 32 + lane) + right], transposed = 0;
#pragma unroll
  for (int c = 0; c < 32; ++c) {
    const u32 column = __ballot_sync(EVERY_LANE, word >> c & 1u);
    if (lane == c) transposed = column;
  }
  if (rows >= WORDS || columns >= WORDS || columns > rows && row_tile == column_tile) return;
  if (rows == columns) {
    const u32 lower = EVERY_LANE >> (31 - lane);
    word = (word & lower) | (transposed & ~lower);
  } else {
    edges[rows * ROWS + columns * 32 + lane] = transposed;
  }
  edges[columns * ROWS + rows * 32 + lane] = word;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    ncut_affinity(const Token* __restrict__ tokens, long long image_stride,
                  const float* __restrict__ lengths,  // [B][N] for the cosines, otherwise null
                  u32* __restrict__ edges, int* __restrict__ defects) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& s = *(Shared*)shared_bytes;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, image = blockIdx.y;
  int row_tile = 0, left = blockIdx.x;  // blocks count the pairs row_tile <= column_tile
  for (; left >= NCUT_TILES - row_tile; ++row_tile) left -= NCUT_TILES - row_tile;
  const int column_tile = row_tile + left;
  tokens += image * image_stride;

  Products products = {};
#pragma unroll
  for (int chunk = 0; chunk < STAGES - 1; ++chunk)
    if (chunk < CHUNKS)
      load(s.operands + chunk * OPERANDS * OPERAND, tokens, chunk, row_tile, column_tile);
    else close_group();  // an empty one, so that groups and chunks stay in step
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    await_groups<STAGES - 2>();
    __syncthreads();  // the chunk is there for all, and all are done with the one before
    const int ahead = chunk + STAGES - 1;
    if (ahead < CHUNKS)
      load(s.operands + ahead % STAGES * OPERANDS * OPERAND, tokens, ahead, row_tile, column_tile);
    else close_group();
    const Token* a = s.operands + chunk % STAGES * OPERANDS * OPERAND;
    products.accumulate(a, row_tile == column_tile ? a : a + OPERAND, lane, warp);
  }
  const Level level{lengths ? lengths + (size_t)image * N : nullptr};
  const bool defect =
      products.compare(level, row_tile * TILE, column_tile * TILE, s.words, lane, warp);
  const int any = __syncthreads_or(defect);
  if (row_tile == column_tile && threadIdx.x == 0) defects[image * NCUT_TILES + row_tile] = any;
  store(s.words, edges + (size_t)image * WORDS * ROWS, row_tile, column_tile, lane, warp);
}
