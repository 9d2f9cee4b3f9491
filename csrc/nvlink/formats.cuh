#pragma once

#include <cstdint>
#include <cstring>

#include "common/vector.cuh"
#include "fp8/blocks.cuh"
#include "fp8/formulas.cuh"
#include "nvlink/belt.cuh"

// How rows leave a belt: `write(scale_words, stage, begin, bytes, copies, place_of)` writes the segment that
// lies at `stage` and begins at byte `begin` of its row to place_of(0), place_of(1)..., by the whole warp.
namespace moe_ep::nvlink {

constexpr int kVectors = 7;  // 16-byte words that a lane moves at once
constexpr int kWordsBytes = 32 * 16 * kVectors;

// Where a row goes.
struct Place {
  char* row;
  float* scales;
};

// As they are.
struct Copying {
  template <typename PlaceOf>
  static __device__ __forceinline__ void write(int, SharedAddress stage, int begin, int bytes, int copies,
                                               PlaceOf&& place_of) {
    const int lane = threadIdx.x % 32;
    stage += 16 * lane;
    begin += 16 * lane;
    for (; bytes >= kWordsBytes; bytes -= kWordsBytes, begin += kWordsBytes, stage += kWordsBytes) {
      uint4 words[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) words[v] = load_shared(stage + 512 * v);
      for (int copy = 0; copy < copies; ++copy) {
        char* to = place_of(copy).row + begin;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) *reinterpret_cast<uint4*>(to + 512 * v) = words[v];
      }
    }
    for (; bytes > 0; bytes -= 512, begin += 512, stage += 512) {
      uint4 word;
      if (16 * lane < bytes) word = load_shared(stage);
      for (int copy = 0; copy < copies; ++copy) {
        char* to = place_of(copy).row + begin;
        if (16 * lane < bytes) *reinterpret_cast<uint4*>(to) = word;
      }
    }
  }
};

// As FP8, with their scales: neighbouring lanes have 16 bytes each of a block of 128 numbers of type T.
template <typename T>
struct Quantising {
  static constexpr int kNumbers = 16 / sizeof(T);  // that a lane has of a block
  static constexpr int kLanes = fp8::kBlock / kNumbers;
  static constexpr int kBlocks = 32 / kLanes;  // that a warp has at a time
  static_assert(kVectors <= kLanes);

  template <typename PlaceOf>
  static __device__ __forceinline__ void write(int scale_words, SharedAddress stage, int begin, int bytes,
                                               int copies, PlaceOf&& place_of) {
    const int lane = threadIdx.x % 32;
    for (; bytes > 0; bytes -= kWordsBytes, begin += kWordsBytes, stage += kWordsBytes) {
      Vector<uint8_t, kNumbers> data[kVectors];
      float own_inverse = 1.0f;  // of one of this lane's blocks: the `lane % kLanes`-th
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        Vector<T, kNumbers> numbers{};
        if (512 * v + 16 * lane < bytes) {
          const uint4 word = load_shared(stage + 512 * v + 16 * lane);
          memcpy(&numbers, &word, sizeof(word));
        }
        const fp8::Scale scale = fp8::scale_from_amax(max_over_lanes<kLanes>(fp8::amax_of(numbers)));
        float values[kNumbers];
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) values[i] = to_float(numbers.at[i]);
        data[v] = fp8::quantize(values, scale.multiply);
        if (lane % kLanes == v) own_inverse = scale.inverse;
      }
      const int first = begin / static_cast<int>(sizeof(T));
      const int own_block = first / fp8::kBlock + lane % kLanes * kBlocks + lane / kLanes;
      const bool has_block = lane % kLanes < kVectors && own_block < scale_words;
      for (int copy = 0; copy < copies; ++copy) {
        const Place place = place_of(copy);
        uint8_t* to = reinterpret_cast<uint8_t*>(place.row) + first + kNumbers * lane;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          if (512 * v + 16 * lane < bytes) store(to + 32 * kNumbers * v, data[v]);
        }
        if (has_block) place.scales[own_block] = own_inverse;
      }
    }
  }
};

}  // namespace moe_ep::nvlink
