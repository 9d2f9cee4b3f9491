#pragma once

#include "nvlink/group.h"

namespace moe_ep::nvlink {

// Counts that a rank has of its own tokens, and which travel with its routing, behind the ids; so it must
// have fewer tokens than there is room for. (deep_ep's V1 has them where its callers can see them.)
struct Notes {
  const int* per_rank;    // [R] tokens for each rank; or null: there are no notes
  const int* per_expert;  // [num_experts] rows for each expert; those of a rank are told to that rank alone
  int num_experts;        // a multiple of R; not the group's, whose experts may stand for ranks
  int max_tokens;         // of any rank; what routing there is of one with more is left out
  int* before;            // out [R + 1][R]: tokens of all ranks before s for each rank
  int* places;            // out [T, K]: the token's place among those for the rank of (t, k); -1: for none
  // out, pinned, with a ticket: most tokens of any rank; rows of each expert of this rank
  volatile int64_t* host;

  __host__ __device__ int experts_of_rank(const Group& group) const { return num_experts / group.size; }
  __host__ __device__ int64_t bytes(const Group& group) const {
    return align16(4 * (static_cast<int64_t>(group.size) + experts_of_rank(group)));
  }
};

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
  Notes notes{};
  bool meets = false;  // as in Dispatch
};

Status launch_plan(const Group& group, const Plan& plan);

}  // namespace moe_ep::nvlink
