// Products whose operands do not lie along the reduction, for gradients: c[rows, columns] = left right, both packed beforehand
// as the microkernel of gemm.h wants them: left [rows][units], right [units][64] a panel.
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

// Rows [0, n) of x, `width` values each, as units, zeros where there is no row; of T's own dtype, or float32 that is
// rounded. Unit i of column c goes to out[c / 64 * area + i * ld + c % 64]. Whole vectors are written.
template <class T, int dtype>
static void pair_rows(const void* x, int64_t ldx, int64_t n, int64_t width, uint32_t* out, int64_t ld, int64_t area) {
  alignas(64) bf16 even[kLanes], odd[kLanes];
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t i = 0; i * T::kUnit < n; ++i, out += ld) {
    const char* row = (const char*)advance(x, dtype, i * T::kUnit * ldx);
    auto to = [&](int64_t c) { return out + c / kPanel * area + c % kPanel; };
    if constexpr (T::kUnit == 1) {
      for (int64_t c = 0; c < whole; c += kLanes) store((float*)to(c), load_any(row, dtype, c, kLanes));
      if (whole < width) store((float*)to(whole), load_any(row, dtype, whole, (int)(width - whole)));
    } else {
      const bool both = i * 2 + 1 < n;
      const char* next = (const char*)advance(row, dtype, ldx);
      auto apart = [&](int64_t c, int w) {
        store(even, load_any(row, dtype, c, w));
        store(odd, both ? load_any(next, dtype, c, w) : set1(0));
        storei(to(c), interleave_bf16(even, odd));
      };
      if (!both) {
        for (int64_t c = 0; c < whole; c += kLanes) apart(c, kLanes);
      } else if constexpr (dtype == BF16) {
        for (int64_t c = 0; c < whole; c += kLanes) storei(to(c), interleave_bf16((bf16*)row + c, (bf16*)next + c));
      } else {
        for (int64_t c = 0; c < whole; c += kLanes)
          storei(to(c), interleave_bf16(load((float*)row + c), load((float*)next + c)));
      }
      if (whole < width) apart(whole, (int)(width - whole));
    }
  }
}

// The same of either stored type.
template <class T>
static void pair_rows(const void* x, int dtype, int64_t ldx, int64_t n, int64_t width, uint32_t* out, int64_t ld,
                      int64_t area) {
  if (dtype == F32) pair_rows<T, F32>(x, ldx, n, width, out, ld, area);
  else pair_rows<T, BF16>(x, ldx, n, width, out, ld, area);
}

// Units that are summed at once, so many that the blocks are about equal.
VF_INLINE int64_t sum_block(int64_t units) {
  return units ? round_up(ceil_div(units, ceil_div(units, kMaxUnits)), kLanes) : kLanes;
}

struct Left {  // [units / block][rows][block], or [rows][ld] if a block lies `block` units behind the one before
  const uint32_t* data;
  int64_t ld, next;  // from row to row, from block to block
};

struct Right {  // [columns / 64][units][64]
  uint32_t* data;
  int64_t units;
  uint32_t* at(int64_t unit, int64_t column) const { return data + (column / kPanel * units + unit) * kPanel; }
};

// c (+)= left right over all units, sum_block(units) at a time, of columns [first, last). epi.row(r), epi(row, column, x, n)
// take what is done, as in gemm.h, columns counted from `first`. acc [columns / 64][rows rounded up to tiles][64].
template <class T, class Epi>
static void product(int64_t rows, int64_t first, int64_t last, const Left& left, const Right& right, float* acc,
                    const Epi& epi) {
  const int64_t units = right.units, block = sum_block(units), area = round_up(rows, kTileRows) * kPanel;
  const int64_t tiles = ceil_div(rows, kTileRows);
  for (int64_t u0 = 0; u0 < units; u0 += block) {
    const int64_t u1 = min64(units, u0 + block);
    const uint32_t* a = left.data + u0 / block * left.next;
    for (int64_t j = first; j < last; j += kPanel) {
      const int width = (int)min64(kPanel, last - j);
      const uint32_t* panel = right.at(u0, j);
      // The panel after this one, fetched into L2 a slice at a time while this one is being used.
      const bool more = j + kPanel < last;
      const uint32_t* then = more ? right.at(u0, j + kPanel) : u1 < units ? right.at(u1, first) : nullptr;
      const int64_t lines = (more ? u1 - u0 : min64(units, u1 + block) - u1) * (kPanel / 16),
                    slice = ceil_div(lines, tiles);
      int64_t fetched = then ? 0 : lines;
      for (int64_t r0 = 0; r0 < rows; r0 += kTileRows) {
        const int count = (int)min64(kTileRows, rows - r0);
        float* c = acc + (j - first) / kPanel * area + r0 * kPanel;
        for (const int64_t to = min64(lines, fetched + slice); fetched < to; ++fetched)
          __builtin_prefetch(then + fetched * 16, 0, 2);
        tile_any<T>(count, width, a + r0 * left.ld, left.ld, panel, u1 - u0, c, kPanel, u0 > 0);
        if (u1 < units) continue;
        for (int r = 0; r < count; ++r) {
          const auto row = epi.row(r0 + r);
          for (int i = 0; i < width; i += kLanes)
            epi(row, j - first + i, load(c + r * kPanel + i), (int)min64(kLanes, width - i));
        }
      }
    }
  }
}

}  // namespace vf::VF_ISA
