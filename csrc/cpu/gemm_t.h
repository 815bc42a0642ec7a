// Products whose operands do not lie along the reduction, for gradients: c[rows, columns] = left right, both given block by
// block of the reduction as the microkernel of gemm.h wants them: left [rows][units], right [units][64] a panel.
//
//   turn       [units][columns] -> [columns][units]: 32-bit units across, through registers
//   pair_rows  rows that are summed over -> units: copied (float32), or two rows interleaved (bf16)
#pragma once
#include "attention.h"

namespace vf::VF_ISA {

// in [rows][columns] -> out [columns][rows]; whole chunks are read: rows up to kLanes, columns up to kChunk.
static void turn(const uint32_t* in, int64_t ld, int64_t rows, int64_t columns, uint32_t* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kChunk) {
      const uint32_t* from = in + r * ld + c;
      I t[kChunk];
#pragma GCC unroll 8
      for (int i = 0; i < kChunk; ++i)
        t[i] = join(load_chunk(from + i * ld), kLanes > kChunk ? load_chunk(from + (i + kChunk) * ld) : Chunk{});
      transpose(t);
#pragma GCC unroll 8
      for (int i = 0; i < kChunk; ++i) storei(out + (c + i) * ldo + r, t[i]);
    }
}

// Rows [0, n) of x, `width` values each, as [ceil(n/u)][ld] units, zeros where there is no row; of T's own dtype, or float32
// that is rounded. Whole vectors are written.
template <class T>
static void pair_rows(const void* x, int dtype, int64_t ldx, int64_t n, int64_t width, uint32_t* out, int64_t ld) {
  for (int64_t i = 0; i * T::kUnit < n; ++i) {
    const char* row = (const char*)advance(x, dtype, i * T::kUnit * ldx);
    const bool both = i * T::kUnit + 1 < n;
    for (int64_t c = 0; c < width; c += kLanes) {
      const int w = (int)min64(kLanes, width - c);
      if constexpr (T::kUnit == 1) {
        store((float*)(out + i * ld + c), load_any(row, dtype, c, w));
      } else {
        alignas(64) bf16 even[kLanes] = {}, odd[kLanes] = {};
        const bf16 *a = even, *b = odd;
        if (dtype == BF16 && w == kLanes) {
          a = (const bf16*)row + c;
          if (both) b = a + ldx;
        } else {
          store(even, load_any(row, dtype, c, w));
          if (both) store(odd, load_any(row, dtype, ldx + c, w));
        }
        storei(out + i * ld + c, interleave_bf16(a, b));
      }
    }
  }
}

struct Operand {  // [rows][units]
  const uint32_t* data;
  int64_t ld;
};

// Units that are summed at once, so many that the blocks are about equal.
VF_INLINE int64_t sum_block(int64_t units) {
  return units ? round_up(ceil_div(units, ceil_div(units, kMaxUnits)), kLanes) : kLanes;
}

// c (+)= left right over all units, at most kMaxUnits at a time. left(u0, u1) gives rows [0, rows) of those units;
// right(u0, u1, column, panel) fills a panel; epi.row(r), epi(row, column, x, n) take what is done, as in gemm.h.
// panel [kMaxUnits][64]; acc [columns / 64][rows rounded up to tiles][64].
template <class T, class Left, class Right, class Epi>
static void product(int64_t rows, int64_t columns, int64_t units, const Left& left, const Right& right, uint32_t* panel,
                    float* acc, const Epi& epi) {
  const int64_t block = sum_block(units);
  const int64_t area = round_up(rows, kTileRows) * kPanel;
  for (int64_t u0 = 0; u0 < units; u0 += block) {
    const int64_t u1 = min64(units, u0 + block);
    const Operand a = left(u0, u1);
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int width = (int)min64(kPanel, columns - j);
      right(u0, u1, j, panel);
      for (int64_t r0 = 0; r0 < rows; r0 += kTileRows) {
        const int count = (int)min64(kTileRows, rows - r0);
        float* c = acc + j / kPanel * area + r0 * kPanel;
        tile_any<T>(count, width, a.data + r0 * a.ld, a.ld, panel, u1 - u0, c, kPanel, u0 > 0);
        if (u1 < units) continue;
        for (int r = 0; r < count; ++r) {
          const auto row = epi.row(r0 + r);
          for (int i = 0; i < width; i += kLanes)
            epi(row, j + i, load(c + r * kPanel + i), (int)min64(kLanes, width - i));
        }
      }
    }
  }
}

}  // namespace vf::VF_ISA
