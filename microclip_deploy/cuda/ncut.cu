// The normalised cut: the edges of a graph -> its foreground. docs/numerics.md section 2.
//
// One block cuts one graph; thread i stands for token i. Five phases, in the order of `ncut_cut`:
//
//   degrees      popcounts; graphs that say nothing (complete, edgeless, not finite) end here
//   components   breadth-first search on the bits
//   parts        several components: a scalar equation in float64 decides (decision 007)
//   Lanczos      one component: Krylov space in float32, and a second one that looks for a twin
//   foreground   orientation, level, side, mask
//
// The graph is a bit matrix of WORDS words a row, stored word by word: edges[word][row]. All float
// operations are explicit and round to nearest, so that every device gives the same bits, and so
// does a CPU that runs this file.

#if !defined(NCUT_TOKENS) || !defined(NCUT_WORDS) || !defined(NCUT_EPS) || !defined(NCUT_TIE) || \
    !defined(NCUT_GAP) || !defined(NCUT_RESIDUAL) || !defined(NCUT_RESTARTS) ||                  \
    !defined(NCUT_THRESHOLD) || !defined(NCUT_ASKS_CLS) || !defined(NCUT_BORDER_SIDE) ||         \
    !defined(NCUT_BASIS) || !defined(NCUT_BASIS_SHARED) || !defined(NCUT_FIRST_CHECK) ||         \
    !defined(NCUT_EDGES_SHARED) || !defined(NCUT_TILES)
#error "cuda/layout.py gives all constants: nothing is chosen here"
#endif

// NCUT_THRESHOLD, besides the mean.
#define NCUT_STD 0
#define NCUT_OTSU 2

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int N = NCUT_TOKENS;
constexpr int WORDS = NCUT_WORDS;
constexpr int THREADS = 32 * WORDS;
constexpr int NIBBLES = 8 * WORDS;
constexpr int BASIS = NCUT_BASIS;               // Krylov vectors kept before a restart
constexpr int BASIS_ROWS = BASIS + 1;           // and the vectors known before them
constexpr int SHARED_ROWS = NCUT_BASIS_SHARED;  // rows in shared memory; the others are spilled
// Lanes that form one inner product; they share a row in whole groups of 4 numbers.
constexpr int LANES = N < 66 ? 4 : (N < 300 || WORDS % 2) ? 8 : 16;
// With 4 lanes a vector, rows 16 banks apart let a quarter of a warp read 16 bytes a lane freely.
constexpr int ROW = THREADS + (LANES == 4 ? 16 : 0);
constexpr u32 EVERY_LANE = 0xffffffffu;
constexpr float HUGE_FLOAT = 3.4e38f;

// A Krylov space ends where the next vector is rounding alone, is doubtful well before, and is
// orthogonalised again where much cancelled.
constexpr float ENDED = 2e-6f;
constexpr float DOUBTFUL = 1e-3f;
constexpr float CANCELLED = 0.05f;
// Rounding of energies, which are about 1.
constexpr float SLACK = 1e-4f;

struct Thread {
  int id, lane, warp;
  bool token;  // threads past the last token only help with sums
};

struct alignas(16) Shared {
  float sums[NIBBLES * 16];  // of every subset of 4 neighbouring entries: a matrix row in nibbles
  float probe[THREADS + 32];
#if NCUT_EDGES_SHARED
  u32 edges[WORDS * THREADS];
#endif
  float basis[SHARED_ROWS * ROW];
  float alpha[BASIS + 4], beta[BASIS + 4];                     // the tridiagonal matrix
  float diagonal[BASIS + 4], off[BASIS + 4], off2[BASIS + 4];  // the same, scaled into [-1, 1]
  float pivot[BASIS + 4], factor[BASIS + 4], ritz[BASIS + 4];
  float coefficient[BASIS + 4];
  float partial[32], pair[64], theta, last;
  int size[THREADS / 2 + 2], degrees[THREADS / 2 + 2];  // of each component
  u32 front[WORDS], ballot[WORDS];
};

// By its name, not through a pointer: the compiler then knows where every access goes.
extern __shared__ __align__(16) unsigned char shared_bytes[];
#define shared (*(Shared*)shared_bytes)

// Rounding stated, contraction excluded.
__device__ __forceinline__ float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fadd_rn(a, -b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div_(float a, float b) { return __fdiv_rn(a, b); }

// ------------------------------------------------------------------------------ reductions

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = add(x, __shfl_xor_sync(EVERY_LANE, x, step));
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(EVERY_LANE, x, step));
  return x;
}

__device__ float block_sum(float x, const Thread& t) {
  x = warp_sum(x);
  if (t.lane == 0) shared.partial[t.warp] = x;
  __syncthreads();
  x = warp_sum(t.lane < WORDS ? shared.partial[t.lane] : 0.f);
  __syncthreads();
  return x;
}

__device__ float block_max(float x, const Thread& t) {
  x = warp_max(x);
  if (t.lane == 0) shared.partial[t.warp] = x;
  __syncthreads();
  x = warp_max(t.lane < WORDS ? shared.partial[t.lane] : -HUGE_FLOAT);
  __syncthreads();
  return x;
}

// Counts up to 2^20 are exact in float32.
__device__ __forceinline__ int block_count(int n, const Thread& t) {
  return (int)block_sum((float)n, t);
}

// The first token for which something holds, or -1.
__device__ int block_first(bool holds, const Thread& t) {
  const u32 votes = __ballot_sync(EVERY_LANE, holds);
  if (t.lane == 0) shared.ballot[t.warp] = votes;
  __syncthreads();
  int first = -1;
  for (int w = WORDS - 1; w >= 0; --w)
    if (shared.ballot[w]) first = w * 32 + __ffs(shared.ballot[w]) - 1;
  __syncthreads();
  return first;
}

// ------------------------------------------------------------------------------ the graph

// Columns of a word that are tokens.
__device__ __forceinline__ u32 columns(int word) {
  return word * 32 + 32 <= N ? EVERY_LANE : (1u << (N & 31)) - 1u;
}

struct Graph {
  const u32* stored;  // [WORDS][THREADS], in shared memory where it fits

  __device__ __forceinline__ u32 row(int word, int token) const {
    return stored[word * THREADS + token];
  }
};

enum : int { UNSEEN = -1, EDGELESS = -2, LONE = -4, NO_TOKEN = -3 };

struct Components {
  int label;     // of this thread's token: the number of its component, or one of the above
  int count;     // components of two tokens and more
  int lone;      // tokens that are joined to themselves alone
  int edgeless;  // tokens without any edge: in no component, nothing binds them

  __device__ __forceinline__ int parts() const { return count + lone; }
};

// Walks the graph from the first unseen token, again and again. The front of the search is a bit
// set, so that one AND a word tells whether a token touches it.
__device__ Components find_components(const Graph& g, int degree, const Thread& t) {
  Components c{};
  const bool alone = t.token && degree == 1 && (g.row(t.warp, t.id) >> t.lane & 1u);
  c.label = !t.token ? NO_TOKEN : degree == 0 ? EDGELESS : alone ? LONE : UNSEEN;
  c.lone = block_count(c.label == LONE, t);
  c.edgeless = block_count(c.label == EDGELESS, t);
  for (int seed; (seed = block_first(c.label == UNSEEN, t)) >= 0; ++c.count) {
    if (t.id == seed) c.label = c.count;
    if (t.lane == 0) shared.front[t.warp] = t.warp == seed / 32 ? 1u << (seed & 31) : 0u;
    if (t.id == 0) shared.degrees[c.count] = 0;
    __syncthreads();
    for (;;) {
      bool touched = false;
      if (c.label == UNSEEN)
        for (int w = 0; w < WORDS; ++w) touched |= (g.row(w, t.id) & shared.front[w]) != 0u;
      if (touched) c.label = c.count;
      if (!__syncthreads_or(touched)) break;
      const u32 reached = __ballot_sync(EVERY_LANE, c.label == c.count);
      if (t.lane == 0) shared.front[t.warp] = reached;
      __syncthreads();
    }
    if (c.label == c.count) atomicAdd(&shared.degrees[c.count], degree);
    if (t.id == 0) {
      int size = 0;
      for (int w = 0; w < WORDS; ++w) size += __popc(shared.front[w]);
      shared.size[c.count] = size;
    }
    __syncthreads();
  }
  return c;
}

// ------------------------------------------------------------------------------ graphs in parts

// Degree of a token with its absent edges, and so of the mean token of a component.
__device__ __forceinline__ double with_absent(double degree) {
  return (1.0 - (double)NCUT_EPS) * degree + (double)NCUT_EPS * N;
}

// The entry of the second eigenvector, not normalised; false where it does not exist.
//
// To first order in eps it is sqrt(d_i) / (N - mu a_k) on component k of mean degree a_k, with mu
// between the two lowest poles of h(mu) = sum_k n_k a_k / (N - mu a_k) = 0. Components that share
// the largest mean degree exactly, in integers, stand for themselves: two of them are opposite,
// three have no second eigenvector of their own.
__device__ bool cut_parts(const Components& c, double degree, float* entry, const Thread& t) {
  if (c.count == 0) return false;
  int densest = 0, ties = 0, other = -1;
  for (int k = 1; k < c.count; ++k)
    if (shared.degrees[k] * shared.size[densest] > shared.degrees[densest] * shared.size[k])
      densest = k;
  for (int k = 0; k < c.count; ++k)
    if (shared.degrees[k] * shared.size[densest] == shared.degrees[densest] * shared.size[k]) {
      ++ties;
      if (k != densest) other = k;
    }
  if (ties > 2) return false;
  const double root = sqrt(degree);
  if (ties == 2) {
    const double side = c.label == densest ? 1.0 / shared.size[densest]
                        : c.label == other ? -1.0 / shared.size[other]
                                           : 0.0;
    *entry = (float)(root * side);
    return true;
  }
  auto mean_degree = [&](int k) { return with_absent((double)shared.degrees[k] / shared.size[k]); };
  const double lone_degree = with_absent(1.0);
  double second = c.lone ? lone_degree : 0.0;
  for (int k = 0; k < c.count; ++k)
    if (k != densest) second = fmax(second, mean_degree(k));
  double low = N / mean_degree(densest), high = N / second;
  for (int round = 0; round < (THREADS < 128 ? 8 : 6); ++round) {  // one point of h a thread
    const double width = (high - low) / (THREADS + 1), mu = low + width * (t.id + 1);
    double h = c.lone ? c.lone * lone_degree / (N - mu * lone_degree) : 0.0;
    for (int k = 0; k < c.count; ++k)
      h += shared.size[k] * mean_degree(k) / (N - mu * mean_degree(k));
    const int below = __syncthreads_count(h < 0.0);
    if (below < THREADS) high = low + width * (below + 1);
    low = low + width * below;
  }
  const double mu = 0.5 * (low + high);
  const double own = c.label >= 0 ? mean_degree(c.label) : lone_degree;
  *entry = c.label >= 0 || c.label == LONE ? (float)(root / (N - mu * own)) : 0.f;
  return true;
}

// ------------------------------------------------------------------------------ the tridiagonal

// How many eigenvalues of the leading `steps` rows of the tridiagonal matrix are x or more: as many
// as x - T has pivots that are not positive.
__device__ int eigenvalues_from(float x, int steps) {
  float pivot = sub(x, shared.alpha[0]);
  int count = !(pivot > 0.f);
  for (int i = 1; i < steps; ++i) {
    if (pivot == 0.f) pivot = -1e-30f;
    pivot = sub(sub(x, shared.alpha[i]), div_(mul(shared.beta[i - 1], shared.beta[i - 1]), pivot));
    count += !(pivot > 0.f);
  }
  return count;
}

// Scales T into [-1, 1]; returns its centre in *centre and the factor in *scale.
__device__ void scale_tridiagonal(int steps, float* centre, float* scale, const Thread& t) {
  float high = -HUGE_FLOAT, minus_low = -HUGE_FLOAT, alpha = 0.f;
  if (t.id < steps) {  // Gershgorin's discs
    alpha = shared.alpha[t.id];
    const float radius =
        add(t.id ? shared.beta[t.id - 1] : 0.f, t.id < steps - 1 ? shared.beta[t.id] : 0.f);
    high = add(alpha, radius);
    minus_low = sub(radius, alpha);
  }
  high = block_max(high, t);
  const float low = -block_max(minus_low, t), width = sub(high, low);
  *centre = mul(0.5f, add(high, low));
  *scale = width > 0.f ? div_(2.f, width) : 1.f;
  if (t.id < steps) {
    shared.diagonal[t.id] = mul(sub(alpha, *centre), *scale);
    const float off = mul(shared.beta[t.id], *scale);
    shared.off[t.id] = off;
    shared.off2[t.id] = mul(off, off);
  }
}

// A number just above the largest eigenvalue of the scaled T. Every thread tries one point of the
// bracket; the leading minors of x - T are all positive above every eigenvalue.
__device__ float above_largest(int steps, const Thread& t) {
  float low = block_max(t.id < steps ? shared.diagonal[t.id] : -HUGE_FLOAT, t), high = 1.000001f;
  for (int round = 0; round < (THREADS < 128 ? 4 : 3); ++round) {
    const float width = sub(high, low), piece = 1.f / (THREADS + 1);
    const float x = fma_(mul((float)(t.id + 1), piece), width, low);
    float before = 1.f, minor = sub(x, shared.diagonal[0]);
    bool positive = minor > 0.f;
    for (int i = 1; i < steps; ++i) {
      const float next = fma_(sub(x, shared.diagonal[i]), minor, -mul(shared.off2[i - 1], before));
      before = minor;
      minor = next;
      positive = positive && minor > 0.f;
      if ((i & 3) == 3) {  // an exact power of two keeps the minors in range
        u32 exponent = __float_as_uint(fmaxf(fabsf(before), fabsf(minor))) >> 23 & 255u;
        exponent = exponent < 1u ? 1u : exponent > 253u ? 253u : exponent;
        const float factor = __uint_as_float((254u - exponent) << 23);
        before = mul(before, factor);
        minor = mul(minor, factor);
      }
    }
    const int below = __syncthreads_count(!positive);
    if (below < THREADS) high = fma_(mul((float)(below + 1), piece), width, low);
    if (below) low = fma_(mul((float)below, piece), width, low);
  }
  return high;
}

// Leaves the eigenvector of the largest eigenvalue in shared.ritz, unit length, the eigenvalue in
// shared.theta and the last entry's magnitude in shared.last.
//
// Slightly above the eigenvalue x - T is a Stieltjes matrix: LDL^T needs no pivoting and inverse
// iteration from ones adds positive numbers only, so that nothing cancels.
__device__ void top_of_tridiagonal(int steps, const Thread& t) {
  constexpr float NUDGE = 9.5367431640625e-07f, SMALLEST = 2.4e-7f;  // 2^-20; about 2 ulp of 1
  float centre, scale;
  scale_tridiagonal(steps, &centre, &scale, t);
  const float top = above_largest(steps, t);
  if (t.warp == 0) {
    if (t.lane == 0) {
      const float x = add(top, NUDGE);
      float pivot = fmaxf(sub(x, shared.diagonal[0]), SMALLEST);
      shared.pivot[0] = pivot;
      for (int i = 1; i < steps; ++i) {
        const float off = shared.off[i - 1], factor = div_(off, pivot);
        pivot = fmaxf(fma_(-factor, off, sub(x, shared.diagonal[i])), SMALLEST);
        shared.pivot[i] = pivot;
        shared.factor[i - 1] = factor;
      }
    }
    __syncwarp();
    for (int i = t.lane; i < steps; i += 32) {
      shared.pivot[i] =
          div_(NUDGE, shared.pivot[i]);  // the factor keeps the growth of each iteration small
      shared.ritz[i] = 1.f;
    }
    __syncwarp();
    if (t.lane == 0) {
      float square = 0.f;
      for (int iteration = 0; iteration < 3; ++iteration) {
        float y = shared.ritz[0];
#pragma unroll 4
        for (int i = 1; i < steps; ++i)
          shared.ritz[i] = y = fma_(shared.factor[i - 1], y, shared.ritz[i]);
        shared.ritz[steps - 1] = y = mul(y, shared.pivot[steps - 1]);
        square = mul(y, y);
#pragma unroll 4
        for (int i = steps - 2; i >= 0; --i) {
          shared.ritz[i] = y = fma_(shared.factor[i], y, mul(shared.ritz[i], shared.pivot[i]));
          square = fma_(y, y, square);
        }
      }
      shared.partial[0] = div_(1.f, __fsqrt_rn(square));
      shared.theta = add(centre, div_(top, scale));
    }
    __syncwarp();
    for (int i = t.lane; i < steps; i += 32)
      shared.ritz[i] = mul(shared.ritz[i], shared.partial[0]);
    __syncwarp();
    if (t.lane == 0) shared.last = shared.ritz[steps - 1];
  }
  __syncthreads();
}

// ------------------------------------------------------------------------------ Lanczos

// What thread i knows of S = 1 - L, the matrix whose second eigenvector is wanted.
struct Operator {
  Graph graph;
  bool complement;     // multiply by the absent edges: on dense graphs rounding is then relative to
                       // the spread of the spectrum, not to 1
  float inverse_root;  // 1 / (sqrt(d_i) + eps)
  float self;          // what the eps inside the root leaves on the diagonal
  float balance;  // sum_j z_j = sum_j balance_j q_j for q without the null vector: no cancellation
};

__device__ Operator make_operator(const Graph& graph, double degree, bool complement, float* null,
                                  const Thread& t) {
  Operator op{graph, complement, 0.f, 0.f, 0.f};
  const double root = sqrt(degree) + (double)NCUT_EPS;
  const float square = t.token ? (float)(root * root) : 0.f;
  const float mean = div_(block_sum(square, t), (float)N);
  if (t.token) {
    op.inverse_root = (float)(1.0 / root);
    op.self = (float)(1.0 - degree / (root * root));
    op.balance = mul(div_(sub(mean, square), mean), op.inverse_root);
  }
  *null = t.token ? (float)root : 0.f;
  const float norm = __fsqrt_rn(block_sum(mul(*null, *null), t));
  *null = div_(*null, norm);
  return op;
}

// (S q)_i, where `total` is the sum of z = q * inverse_root over all tokens.
//
// A row times z is a sum over its nibbles: each picks one of the 16 subset sums of 4 entries of z.
// All lanes read one table of 16 neighbouring banks, so that no two collide.
__device__ __forceinline__ float apply(const Operator& op, float q, float total, const Thread& t) {
  const float z = mul(q, op.inverse_root);
  const int first = t.lane & 28, high = t.lane & 3;
  const float z0 = __shfl_sync(EVERY_LANE, z, first), z1 = __shfl_sync(EVERY_LANE, z, first + 1);
  const float z2 = __shfl_sync(EVERY_LANE, z, first + 2),
              z3 = __shfl_sync(EVERY_LANE, z, first + 3);
  const float base = add(high & 1 ? z2 : 0.f, high & 2 ? z3 : 0.f);
  float4 sums;
  sums.x = base;
  sums.y = add(base, z0);
  sums.z = add(base, z1);
  sums.w = add(base, add(z0, z1));
  ((float4*)shared.sums)[t.id] = sums;
  __syncthreads();
  float even = 0.f, odd = 0.f;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    const u32 row = op.graph.row(w, t.id) ^ (op.complement ? columns(w) : 0u);
    const char* table =
        (const char*)(shared.sums + w * 8 * 16);  // byte offsets save a shift a nibble
    even = add(even, *(const float*)(table + (row << 2 & 60u)));
#pragma unroll
    for (int nibble = 1; nibble < 8; ++nibble) {
      const float sum = *(const float*)(table + nibble * 64 + (row >> (4 * nibble - 2) & 60u));
      if (nibble & 1) odd = add(odd, sum);
      else even = add(even, sum);
    }
  }
  const float joined = (float)(1.0 - (double)NCUT_EPS), absent = (float)NCUT_EPS;
  const float over = add(even, odd);
  const float product =
      op.complement ? fma_(-joined, over, total) : fma_(joined, over, mul(absent, total));
  return t.token ? fma_(op.inverse_root, product, mul(op.self, q)) : 0.f;
}

// Basis rows: the known vectors first (the null vector, later the cut as well), then the Krylov
// space. Rows that do not fit into shared memory lie in a workspace of this block.
struct Basis {
  float* spilled;

  __device__ __forceinline__ float get(int row, const Thread& t) const {
    if (SHARED_ROWS >= BASIS_ROWS || row < SHARED_ROWS) return shared.basis[row * ROW + t.id];
    return spilled[(row - SHARED_ROWS) * THREADS + t.id];
  }

  __device__ __forceinline__ void set(int row, float entry, const Thread& t) const {
    if (SHARED_ROWS >= BASIS_ROWS || row < SHARED_ROWS) shared.basis[row * ROW + t.id] = entry;
    else spilled[(row - SHARED_ROWS) * THREADS + t.id] = entry;
  }

  // This lane's share of the inner product of a row and the probe.
  __device__ __forceinline__ float dot(int row, int lane) const {
    if (SHARED_ROWS >= BASIS_ROWS || row < SHARED_ROWS)
      return partial_dot((const float4*)(shared.basis + row * ROW), lane);
    return partial_dot((const float4*)(spilled + (row - SHARED_ROWS) * THREADS), lane);
  }

 private:
  static __device__ __forceinline__ float partial_dot(const float4* row, int lane) {
    const float4* probe = (const float4*)shared.probe;
    float x = 0.f, y = 0.f, z = 0.f, w = 0.f;
#pragma unroll
    for (int i = 0; i < THREADS / 4 / LANES; ++i) {
      const float4 p = row[i * LANES + lane], q = probe[i * LANES + lane];
      x = fma_(p.x, q.x, x);
      y = fma_(p.y, q.y, y);
      z = fma_(p.z, q.z, z);
      w = fma_(p.w, q.w, w);
    }
    return add(add(x, y), add(z, w));
  }
};

struct Next {
  float vector, norm, total;  // total: sum of vector * balance
};

// Removes the first `rows` basis rows from w (classical Gram-Schmidt); coefficients stay in
// shared.coefficient.
__device__ __forceinline__ Next orthogonalise(float w, int rows, float balance, const Basis& basis,
                                              const Thread& t) {
  shared.probe[t.id] = w;
  __syncthreads();
  const u32 group = LANES == 16  ? 0xffffu << (t.lane & 16)
                    : LANES == 8 ? 0xffu << (t.lane & 24)
                                 : 0xfu << (t.lane & 28);
  for (int k = t.id / LANES; k < rows; k += THREADS / LANES) {
    float dot = basis.dot(k, t.id % LANES);
#pragma unroll
    for (int step = LANES / 2; step; step >>= 1) dot = add(dot, __shfl_xor_sync(group, dot, step));
    if (t.id % LANES == 0) shared.coefficient[k] = dot;
  }
  __syncthreads();
#pragma unroll 4
  for (int k = 0; k < rows; ++k) w = fma_(-shared.coefficient[k], basis.get(k, t), w);
  // Two sums at once; every warp adds the parts up for itself.
  float square = warp_sum(mul(w, w)), total = warp_sum(mul(balance, w));
  if (t.lane == 0) {
    shared.pair[t.warp] = square;
    shared.pair[32 + t.warp] = total;
  }
  __syncthreads();
  square = total = 0.f;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    square = add(square, shared.pair[i]);
    total = add(total, shared.pair[32 + i]);
  }
  return {w, __fsqrt_rn(square), total};
}

// A start vector: the token's number, hashed into [-0.5, 0.5). Every image gets the same one.
__device__ float hashed(const Thread& t, u32 seed) {
  u32 h = ((u32)t.id + seed) * 2654435761u;
  h ^= h >> 15;
  h *= 2246822519u;
  h ^= h >> 13;
  return t.token ? sub(mul((float)(h >> 8), 5.9604644775390625e-08f), 0.5f) : 0.f;
}

struct Krylov {
  int steps;
  bool converged;
  float theta, residual, lowest;  // largest Ritz value, its residual, and the smallest alpha
};

// When to look again: the residual has lost `bits` bits so far and will go on losing them as fast.
// A look costs as much as some steps; two or three of those are too many at most.
__device__ __forceinline__ int next_check(const Krylov& k) {
  const float spread = sub(k.theta, k.lowest);
  const auto exponent = [](float x) { return (int)(__float_as_uint(x) >> 23 & 255u); };
  const int wanted = exponent(1.f) - exponent((float)NCUT_RESIDUAL) + 1;
  const int bits = exponent(spread) - exponent(k.residual);
  const int most = 2 * k.steps, needed = bits > 0 ? (k.steps * wanted + bits - 1) / bits : most;
  const int least = k.steps + 3;
  return needed < least ? least : needed > most ? most : needed;
}

// Runs Lanczos from q, orthogonal to the `known` rows in front of the basis. With `limit` 0 it
// stops when the largest Ritz pair has converged; otherwise after `limit` steps, unchecked.
__device__ __forceinline__ Krylov lanczos(const Operator& op, float q, int known, int limit,
                                          float lowest, const Basis& basis, const Thread& t) {
  Next next = {q, 0.f, 0.f};
  for (int twice = 0; twice < 2; ++twice) {
    next = orthogonalise(next.vector, known, op.balance, basis, t);
    const float inverse = next.norm > 0.f ? div_(1.f, next.norm) : 0.f;
    next.vector = mul(next.vector, inverse);
    next.total = mul(next.total, inverse);
  }
  Krylov k{0, false, 0.f, 0.f, lowest};
  float scale = 0.f;
  int check = NCUT_FIRST_CHECK;
  const int most = limit ? limit : BASIS_ROWS - known;
  while (k.steps < most) {
    const int row = known + k.steps;
    basis.set(row, next.vector, t);
    const float w = apply(op, next.vector, next.total, t);
    next.vector = w;
    float alpha = 0.f;
    for (int twice = 0; twice < 2; ++twice) {
      next = orthogonalise(next.vector, row + 1, op.balance, basis, t);
      alpha = add(alpha, shared.coefficient[row]);
      scale = fmaxf(scale, fmaxf(fabsf(alpha), next.norm));
      if (next.norm > mul(CANCELLED, scale)) break;
    }
    if (t.id == 0) {
      shared.alpha[k.steps] = alpha;
      shared.beta[k.steps] = next.norm;
    }
    k.lowest = fminf(k.lowest, alpha);
    ++k.steps;
    const bool ended = !(next.norm > mul(ENDED, scale));
    const bool last = ended || k.steps == most;
    if (limit ? last : last || next.norm <= mul(DOUBTFUL, scale) || k.steps == check) {
      __syncthreads();
      if (limit) break;
      top_of_tridiagonal(k.steps, t);
      k.theta = shared.theta;
      k.residual = fabsf(mul(next.norm, shared.last));
      k.converged = ended || k.residual <= mul((float)NCUT_RESIDUAL, sub(k.theta, k.lowest));
      if (last || k.converged) break;
      check = next_check(k);
    }
    const float inverse = div_(1.f, next.norm);
    next.vector = mul(next.vector, inverse);
    next.total = mul(next.total, inverse);
  }
  return k;
}

struct Eigenvector {
  float entry;     // unit length
  bool simple;     // no second eigenvector belongs to the same eigenvalue
  float residual;  // relative to the spread of the spectrum
  int steps;
};

// The sum of all squared eigenvalues of S: of all its squared entries.
__device__ __forceinline__ float energy(const Operator& op, const Thread& t) {
  const float total = block_sum(mul(op.inverse_root, op.inverse_root), t);
  return block_sum(mul(op.inverse_root, apply(op, op.inverse_root, total, t)), t);
}

// Whether too little energy is left for a twin of the largest Ritz vector.
//
// A Krylov space holds one vector of each eigenspace; a twin, of the same eigenvalue theta, lies
// outside of it, but for what rounding let in. If every other Ritz value is below `near` * theta,
// the part inside is at most beta / (theta - near theta) of the part outside, beta being the norm
// of the vector that comes next. The part outside alone then needs the energy below.
__device__ __forceinline__ bool excludes_twin(float all, const Krylov& k) {
  constexpr float NEAR = 0.9f;
  if (!(k.theta > 0.f) || eigenvalues_from(mul(NEAR, k.theta), k.steps) > 1) return false;
  float inside = 1.f;  // the null vector's
  for (int i = 0; i < k.steps; ++i) {
    inside = fma_(shared.alpha[i], shared.alpha[i], inside);
    inside = fma_(mul(2.f, shared.beta[i]), shared.beta[i], inside);
  }
  const float beta = shared.beta[k.steps - 1], away = mul(1.f - NEAR, k.theta);
  const float needed = fmaxf(sub(k.theta, div_(mul(beta, beta), away)), 0.f);
  return add(sub(all, inside), SLACK) < mul(needed, needed);
}

// The second eigenvector of a connected graph.
//
// It has to be the only one of its eigenvalue. Mostly energy says so; otherwise a second Krylov
// space, from another start and without the vector found, reaches the same eigenvalue again, or
// not.
__device__ __forceinline__ Eigenvector second_eigenvector(const Operator& op, float null,
                                                          const Basis& basis, const Thread& t) {
  const float all = energy(op, t);
  basis.set(0, null, t);
  Eigenvector found{0.f, false, 0.f, 0};
  Krylov first{}, k{0, false, 0.f, 0.f, HUGE_FLOAT};
  int known = 1, limit = 0, spaces = 0;
  float q = hashed(t, 12345u);
  for (;;) {
    k = lanczos(op, q, known, limit, k.lowest, basis, t);
    found.steps += k.steps;
    ++spaces;
    if (limit) break;
    q = 0.f;
    for (int i = 0; i < k.steps; ++i) q = fma_(shared.ritz[i], basis.get(known + i, t), q);
    const bool done = k.converged || spaces == NCUT_RESTARTS;
    if (done && known == 2) break;
    if (done) {
      first = k;
      found.entry = q;
      found.simple = k.converged && excludes_twin(all, k);
      if (found.simple || !k.converged) break;
    }
    __syncthreads();  // all have read what is overwritten now
    if (done) {
      // The twin takes as many steps. Where one space was not enough it is sought until it has
      // converged.
      limit = spaces > 1 ? 0 : k.steps < BASIS ? k.steps : BASIS - 1;
      spaces = 0;
      basis.set(1, q, t);
      known = 2;
      q = hashed(t, 54321u);
    }
  }
  found.residual = div_(first.residual, fmaxf(sub(first.theta, first.lowest), 1e-30f));
  if (known == 2) {
    const float spread = sub(1.f, k.lowest);  // about the largest of L
    const float twin = sub(first.theta, mul((float)NCUT_GAP, spread));
    found.simple = eigenvalues_from(twin, k.steps) == 0;
  }
  return found;
}

// ------------------------------------------------------------------------------ foreground

// The entry just above which a split leaves most variance between both sides. Every warp sorts its
// entries and sums them from the top; then every token asks all warps for what lies above its own.
__device__ float otsu_level(float z, float mean, const Thread& t) {
  float *sorted = shared.probe, *from_top = shared.sums;  // of the eigenvector no more is needed
  const float own = t.token ? sub(z, mean) : -HUGE_FLOAT;
  float x = own;
#pragma unroll
  for (int size = 2; size <= 32; size <<= 1)
#pragma unroll
    for (int stride = size >> 1; stride; stride >>= 1) {
      const float other = __shfl_xor_sync(EVERY_LANE, x, stride);
      const bool ascending = (t.lane & size) == 0, lower = (t.lane & stride) == 0;
      x = ascending == lower ? fminf(x, other) : fmaxf(x, other);
    }
  float sum = x;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const float higher = __shfl_sync(EVERY_LANE, sum, (t.lane + step) & 31);
    if (t.lane + step < 32) sum = add(sum, higher);
  }
  sorted[t.id] = x;
  from_top[t.id] = sum;
  __syncthreads();
  const float limit = add(own, (float)NCUT_TIE);
  float total = 0.f;
  int count = 0;
#pragma unroll 4
  for (int w = 0; w < WORDS; ++w) {
    int below = 0;  // entries of that warp that do not lie above
#pragma unroll
    for (int step = 16; step; step >>= 1)
      if (!(sorted[32 * w + below + step - 1] > limit)) below += step;
    if (!(sorted[32 * w + below] > limit)) ++below;
    if (below < 32) total = add(total, from_top[32 * w + below]);
    count += 32 - below;
  }
  const float sides = (float)(count * (N - count));
  const float between = t.token && sides > 0.f ? div_(mul(total, total), sides) : 0.f;
  const float best = block_max(between, t);
  return block_max(t.token && between >= best ? z : -HUGE_FLOAT, t);
}

// By how much the rule prefers the tokens inside to the others: mean agreement with [CLS], less the
// share of the border.
__device__ float preference(bool inside, const float* agreement, const Thread& t) {
  float score = 0.f;
#if NCUT_ASKS_CLS
  const int count = __syncthreads_count(inside);
  const float own = t.token ? agreement[t.id] : 0.f;
  score = block_sum(div_(own, (float)(inside ? count : count - N)), t);
#endif
#if NCUT_BORDER_SIDE
  constexpr int SIDE = NCUT_BORDER_SIDE, BORDER = 4 * (SIDE - 1);
  const int row = t.id / SIDE, column = t.id % SIDE;
  const bool border = row == 0 || row == SIDE - 1 || column == 0 || column == SIDE - 1;
  const int held = __syncthreads_count(inside && border);
  score = sub(score, div_((float)(2 * held - BORDER), (float)BORDER));
#endif
  return score;
}

// Orients the vector, splits it, chooses the side, and says whether the result is defined. `entry`
// comes back oriented and of unit length.
__device__ bool foreground(float* entry, bool* selected, const float* agreement, const Thread& t) {
  const float high = block_max(t.token ? *entry : -HUGE_FLOAT, t);
  const float low = -block_max(t.token ? -*entry : -HUGE_FLOAT, t);
  const float peak = high >= -low ? high : low;
  float z =
      div_(t.token ? *entry : 0.f, peak);  // first to a peak of 1, so that squares stay finite
  const float norm = __fsqrt_rn(block_sum(mul(z, z), t));
  z = div_(z, norm);
  const float mean = div_(block_sum(z, t), (float)N);
  float level = mean;
#if NCUT_THRESHOLD == NCUT_STD
  const float deviation = t.token ? sub(z, mean) : 0.f;
  level = __fsqrt_rn(div_(block_sum(mul(deviation, deviation), t), (float)(N - 1)));
#elif NCUT_THRESHOLD == NCUT_OTSU
  level = otsu_level(z, mean, t);
#endif
  const float imbalance = div_(fabsf(div_(add(high, low), peak)), norm);
  *entry = z;
  const bool inside = t.token && z > add(level, (float)NCUT_TIE);
  const bool any = __syncthreads_or(inside) != 0;
  const bool others = preference(inside, agreement, t) < 0.f;
  *selected = t.token && inside != others;
  return any && imbalance > (float)NCUT_TIE;  // false for a vector of NaN, too
}

// ------------------------------------------------------------------------------ the kernel

struct Results {
  u8* mask;         // [B][N]
  float* vector;    // [B][N], unit length, oriented; 0 where degenerate
  u8* degenerate;   // [B]: every token is foreground
  u8* complete;     // [B]: every pair is joined
  float* residual;  // [B], relative to the spread of the spectrum
  int* count;       // [B]: tokens in the foreground
  u16* rows;        // [B][N]: their numbers, ascending; what follows is not written
  int* steps;       // [B]: of Lanczos
  int* components;  // [B]
};

__device__ void write(const Results& out, int image, bool selected, float entry, const Thread& t) {
  const u32 votes = __ballot_sync(EVERY_LANE, selected);
  if (t.lane == 0) shared.ballot[t.warp] = votes;
  __syncthreads();
  int before = 0, count = 0;
  for (int w = 0; w < WORDS; ++w) {
    if (w == t.warp) before = count;
    count += __popc(shared.ballot[w]);
  }
  const size_t row = (size_t)image * N;
  if (t.token) {
    out.mask[row + t.id] = selected;
    out.vector[row + t.id] = entry;
  }
  if (selected) out.rows[row + before + __popc(votes & ((1u << t.lane) - 1u))] = (u16)t.id;
  if (t.id == 0) out.count[image] = count;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    ncut_cut(const u32* __restrict__ edges,    // [B][WORDS][THREADS]; bits past N are 0
             const int* __restrict__ defects,  // [B][NCUT_TILES]: not 0 where tokens are no numbers
             float* __restrict__ spilled,      // [B][rows past SHARED_ROWS][THREADS]
             const float* __restrict__ agreement,  // [B][N], of each token with [CLS]
             u8* mask, float* vector, u8* degenerate, u8* complete, float* residual, int* count,
             u16* rows, int* steps, int* components) {
  const int id = threadIdx.x, image = blockIdx.x;
  const Thread t{id, id & 31, id >> 5, id < N};
  const Results out{mask, vector, degenerate, complete, residual, count, rows, steps, components};
  const u32* own = edges + (size_t)image * WORDS * THREADS;
  const Basis basis{spilled + (size_t)image * (BASIS_ROWS - SHARED_ROWS) * THREADS};

  int degree = 0, loop = 0;
  for (int w = 0; w < WORDS; ++w) {
    const u32 row = own[w * THREADS + t.id];
    degree += __popc(row);
    if (w == t.warp) loop = row >> t.lane & 1u;
#if NCUT_EDGES_SHARED
    shared.edges[w * THREADS + t.id] = row;
#endif
  }
  __syncthreads();
#if NCUT_EDGES_SHARED
  const Graph graph{shared.edges};
#else
  const Graph graph{own};
#endif
  const int joined = block_count(degree, t), pairs = joined - block_count(loop, t);
  bool finite = true;
  for (int tile = 0; tile < NCUT_TILES; ++tile)
    finite = finite && defects[image * NCUT_TILES + tile] == 0;
  const bool full = pairs == N * (N - 1);

  bool defined = finite && !full && pairs > 0, selected = false;
  float entry = 0.f;
  Eigenvector found{0.f, true, 0.f, 0};
  int parts = 1;
  if (defined) {
    const double d = with_absent(degree);
    const Components c = find_components(graph, degree, t);
    parts = c.parts();
    if (parts > 1) {
      defined = cut_parts(c, d, &entry, t);
    } else {
      // Tokens without any edge make rows of the complement longer than their degree: cancellation.
      const bool complement = 2 * joined > N * N && c.edgeless == 0;
      float null;
      const Operator op = make_operator(graph, d, complement, &null, t);
      found = second_eigenvector(op, null, basis, t);
      entry = found.entry;
      defined = found.simple;
    }
    if (defined) defined = foreground(&entry, &selected, agreement + (size_t)image * N, t);
  }
  write(out, image, defined ? selected : t.token, defined ? entry : 0.f, t);
  if (t.id == 0) {
    out.degenerate[image] = !defined;
    out.complete[image] = full;
    out.residual[image] = found.residual;
    out.steps[image] = found.steps;
    out.components[image] = parts;
  }
}
