#pragma once

#include <cstdint>

namespace moe_ep::fp8 {

// How the rows of a matrix belong to experts: consecutive rows of each, in order. Kernels work on tiles of up
// to 128 rows of one expert. Counts stay on the device; those past `rows` are cut off.
struct Experts {
  const int64_t* counts;  // [num]: rows of each expert, on the current device
  int num;
  int64_t rows;  // of the matrix

  // Tiles that there can be, whatever the counts: the sum of ceil(count / 128) is at most that.
  int64_t max_tiles() const { return rows / 128 + num; }
};

}  // namespace moe_ep::fp8
