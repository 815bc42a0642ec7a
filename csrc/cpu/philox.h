// Dropout masks from a counter: Philox4x32-10 (Salmon et al. 2011), keyed with the seed, at (column / 4, row, 0, 0); its four
// words belong to four neighbouring columns. The same elements are dropped as by kernels/_tiles.py.
#pragma once
#include "vec.h"

namespace vf::VF_ISA {

typedef uint64_t Words __attribute__((vector_size(64)));  // each in a lane of 64 bits, as products want them

// factor[i] = 1 / (1 - p), or 0 with probability p, of columns [0, D) of a row; D rounded up to 64 are written.
[[maybe_unused]] static void dropout_factors(uint64_t seed, uint32_t row, float p, int64_t D, float* factor) {
  constexpr int kQuads = 8, kSide = 2;  // two blocks of quads side by side hide the latency of products
  constexpr uint64_t kLow = 0xffffffffu;
  const float grow = 1.f / (1.f - p);
  for (int64_t first = 0; first < D; first += 4 * kQuads * kSide) {
    Words c[kSide][4];
    for (int s = 0; s < kSide; ++s) {
      for (int i = 0; i < kQuads; ++i) c[s][0][i] = (uint64_t)(first / 4 + s * kQuads + i);
      c[s][1] = Words{} + row, c[s][2] = c[s][3] = Words{};
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
      for (int s = 0; s < kSide; ++s) {
        const Words a = (c[s][0] & kLow) * 0xD2511F53u, b = (c[s][2] & kLow) * 0xCD9E8D57u;
        c[s][0] = (b >> 32) ^ c[s][1] ^ k0, c[s][1] = b;
        c[s][2] = (a >> 32) ^ c[s][3] ^ k1, c[s][3] = a;
      }
    for (int s = 0; s < kSide; ++s)
      for (int i = 0; i < kQuads; ++i)
        for (int j = 0; j < 4; ++j) {  // as Triton makes a float of [0, 1) of a word
          const int32_t word = (int32_t)c[s][j][i], magnitude = word < 0 ? ~word : word;
          factor[first + 4 * (s * kQuads + i) + j] = (float)magnitude * 4.6566127342e-10f >= p ? grow : 0.f;
        }
  }
}

}  // namespace vf::VF_ISA
