#pragma once

#include <cstdint>
#include <vector>

namespace moe_ep::cpu {

// Rows of `row_bytes` bytes: target[i] = source[index[i]]. `result_bytes`: of all that the caller writes, of
// which this may be a part.
struct Gather {
  const char* source;
  const int64_t* index;
  int64_t count;
  int64_t row_bytes;
  char* target;
  int64_t result_bytes;
};
void gather_rows(const Gather& gather);

enum class DType { float32, float64, bfloat16 };

// rows[sources[i]] is a term of the sum targets[i]; targets ascend, none occurs twice.
struct Terms {
  const char* rows;
  const int64_t* targets;
  const int64_t* sources;
  int64_t count;
};

// Sums over lists of terms, in the order of the lists, that start from their first term; a sum without terms
// is +0. bfloat16 is added in float32 and rounded once, to nearest even.
struct Sum {
  char* out;  // [rows, width]
  int64_t rows;
  int64_t width;
  DType dtype;
  std::vector<Terms> lists;
};
void sum_rows(const Sum& sum);

}  // namespace moe_ep::cpu
