#pragma once

#include <cstdint>

#include "fp8/byte_tile.cuh"

namespace moe_ep::fp8 {

// The bytes of four words, each of four neighbouring columns of one row, as four words of one column each.
__device__ __forceinline__ void transpose_bytes(const unsigned int (&rows)[4], unsigned int (&columns)[4]) {
  const unsigned int low01 = __byte_perm(rows[0], rows[1], 0x5140);   // r0c0 r1c0 r0c1 r1c1
  const unsigned int high01 = __byte_perm(rows[0], rows[1], 0x7362);  // r0c2 r1c2 r0c3 r1c3
  const unsigned int low23 = __byte_perm(rows[2], rows[3], 0x5140);
  const unsigned int high23 = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(low01, low23, 0x5410);
  columns[1] = __byte_perm(low01, low23, 0x7632);
  columns[2] = __byte_perm(high01, high23, 0x5410);
  columns[3] = __byte_perm(high01, high23, 0x7632);
}

// Writes this thread's share of a tile column by column: columns begin at `out` and lie `stride` bytes apart.
__device__ __forceinline__ void store_turned(ByteTile& tile, const ColumnShare& share, uint8_t* out,
                                             int64_t stride) {
  unsigned int columns[ColumnShare::kColumns][ColumnShare::kRows / 4];
#pragma unroll
  for (int i = 0; i < ColumnShare::kRows / 4; ++i) {
    unsigned int words[4], turned[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = tile.word(share.row + 4 * i + j, share.column);
    transpose_bytes(words, turned);
#pragma unroll
    for (int c = 0; c < ColumnShare::kColumns; ++c) columns[c][i] = turned[c];
  }
  out += share.column * stride + share.row;
#pragma unroll
  for (int c = 0; c < ColumnShare::kColumns; ++c) {
    *reinterpret_cast<uint4*>(out) = make_uint4(columns[c][0], columns[c][1], columns[c][2], columns[c][3]);
    out += stride;
  }
}

}  // namespace moe_ep::fp8
