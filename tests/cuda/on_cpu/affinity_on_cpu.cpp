// affinity.cu on a CPU, with its three instructions by their documented layout.
#include "token_on_cpu.h"

static void copy16(void* to, const void* from, bool valid) {
  if (valid) memcpy(to, from, 16);
  else memset(to, 0, 16);
}
static void close_group() {}
template <int pending>
static void await_groups() {}

// m16n8k16: lane 4 g + t holds of A rows g and g + 8, columns 2 t and 2 t + 8 (two each); of B the
// same columns of row g; of C row g (two columns) and row g + 8.
static void multiply(float* c, const uint32_t* a, const uint32_t* b) {
  static float a_rows[1024 / 32][16][16], b_rows[1024 / 32][8][16];
  const int warp = cpu::current / 32, lane = cpu::current & 31, group = lane / 4, pair = lane % 4;
  __syncwarp();
  for (int part = 0; part < 4; ++part)
    for (int e = 0; e < 2; ++e) {
      const int column = 2 * pair + e + (part >= 2 ? 8 : 0);
      a_rows[warp][group + part % 2 * 8][column] = to_float((uint16_t)(a[part] >> 16 * e));
      if (part % 2 == 0) b_rows[warp][group][column] = to_float((uint16_t)(b[part / 2] >> 16 * e));
    }
  __syncwarp();
  for (int e = 0; e < 4; ++e) {
    const float* row = a_rows[warp][group + (e >= 2 ? 8 : 0)];
    const float* column = b_rows[warp][2 * pair + (e & 1)];
    double sum = c[e];
    for (int k = 0; k < 16; ++k) sum += (double)row[k] * column[k];
    c[e] = (float)sum;
  }
}

#include "affinity.cu"

LAUNCHED_ON_CPU(ncut_lengths)
LAUNCHED_ON_CPU(ncut_affinity)
