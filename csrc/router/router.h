#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/status.h"

namespace moe_ep::router {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopk = 32;
constexpr int kTokensPerTerm = 16;  // of the balance loss

// What all kernels of a routing have in common; moe_ep.layers.routing states the rule.
struct Routing {
  int64_t tokens;           // >= 0
  int64_t sequence_length;  // >= 1: tokens that a balance loss counts together
  int experts;              // 1 to kMaxExperts
  int topk;                 // 1 to kMaxTopk, at most the experts that are eligible
  bool softmax;             // scores by softmax, not normalised; else by sigmoid, normalised
  float scaling;            // of the weights
};

// Logits to chosen experts, their weights, and counts.
struct Choose {
  Routing routing;
  const float* pieces;  // [slices, tokens, parts, experts]: the numbers that a logit is the sum of
  int slices;           // >= 1
  int parts;            // 1, or 3 with the largest part last
  const float* bias;    // [experts]; null: 0
  int groups;           // >= 1, divides experts
  int topk_groups;      // 1 to groups
  float* logits;        // out [tokens, experts]; null: not wanted
  int64_t* topk_idx;    // out [tokens, topk]
  float* topk_weights;  // out [tokens, topk]
  int64_t* load;        // [experts], raised by how often each is chosen; null: not wanted
  int* highest;  // [sequences, experts], raised by how often a score is among a token's topk highest; null
  cudaStream_t stream;
};

// The balance loss, in terms to be added up: one of each kTokensPerTerm tokens.
struct Balance {
  Routing routing;
  const float* logits;  // [tokens, experts]
  const int* highest;   // [sequences, experts], from Choose
  float factor;         // of the sum over tokens of sum_i(highest_i s_i) / sum_i(s_i)
  float* terms;         // out [ceil(tokens / kTokensPerTerm)]
  cudaStream_t stream;
};

// The gradient of the logits from those of the weights and of the balance loss.
struct Differentiate {
  Routing routing;
  const float* logits;        // [tokens, experts]
  const int64_t* topk_idx;    // [tokens, topk]
  const float* grad_weights;  // [tokens, topk]; null: 0
  const int* highest;         // as in Balance; null without grad_loss
  const float* grad_loss;     // one number; null: 0
  float factor;               // as in Balance
  float* grad;                // out [tokens, experts]; null with parts
  __nv_bfloat16* parts;       // out [tokens, 4, experts]: first, first, second, third part; null with grad
  cudaStream_t stream;
};

// Float32 numbers as sums of three bfloat16 numbers.
struct Split {
  const float* x;        // [count], 16-byte aligned
  int64_t count;         // >= 0, a multiple of 4
  __nv_bfloat16* parts;  // out [4, count], 16-byte aligned: third, second, first, first part
  cudaStream_t stream;
};

// All launch on the stream and return.
Status choose(const Choose& launch);
Status balance(const Balance& launch);
Status differentiate(const Differentiate& launch);
Status split(const Split& launch);

}  // namespace moe_ep::router
