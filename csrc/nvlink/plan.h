#pragma once

#include "nvlink/group.h"

namespace moe_ep::nvlink {

// Exchanges the routing of all ranks and numbers the rows of a dispatch: by source rank and token, and in the
// expert layout by expert before that. Prefix sums only: every run gives the same numbers.
struct Plan {
  const void* topk_idx;  // [T, K]
  bool is_int64;         // else int32
  int num_tokens;        // T
  bool expert_layout;
  int alignment;                      // of each expert's first row
  int64_t max_rows;                   // rows past it are dropped
  bool fixed_rows;                    // fill ids up to max_rows
  int* tables;                        // out: PlanTables
  int64_t* tokens_per_expert;         // out [L]
  int64_t* padded_tokens_per_expert;  // out [L]
  int64_t* rows_needed;               // out [1]
  int64_t* ids;                       // out, rank layout: [max_rows, K] local expert ids, -1 for none
  int64_t ticket;                     // not 0: report to the host
  int num_sms;
  cudaStream_t stream;
};

Status launch_plan(const Group& group, const Plan& plan);

}  // namespace moe_ep::nvlink
