#include "cpu/rows.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace moe_ep::cpu {
namespace {

// Results larger than this are written past the caches: reading a line only to overwrite it costs as much as
// writing it, and they would push out what is still needed.
constexpr int64_t kStreamingBytes = 4 << 20;

inline bool can_stream(const char* target, int64_t row_bytes, int64_t total_bytes) {
  return total_bytes >= kStreamingBytes && row_bytes % 16 == 0 &&
         reinterpret_cast<uintptr_t>(target) % 16 == 0;
}

// `next` is what will be read after `source`: rows lie far apart, where the hardware does not look ahead.
inline void copy_streaming(char* target, const char* source, int64_t bytes, const char* next) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64, kAhead = 512;
  for (int64_t line = 0; line < bytes; line += kLine) {
    __builtin_prefetch(line + kAhead < bytes ? source + line + kAhead : next + line + kAhead - bytes);
    for (int64_t at = line; at < bytes && at < line + kLine; at += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + at),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at)));
    }
  }
#else
  std::memcpy(target, source, bytes);
#endif
}

inline void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

struct Float32 {
  using Element = float;
  using Accumulator = float;
  static float load(float value) { return value; }
  static float round(float value) { return value; }
};

struct Float64 {
  using Element = double;
  using Accumulator = double;
  static double load(double value) { return value; }
  static double round(double value) { return value; }
};

struct BFloat16 {
  using Element = uint16_t;
  using Accumulator = float;
  static float load(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  static uint16_t round(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7FC0 : rounded);
  }
};

// Elements of a row that are summed at a time, in the fastest cache.
constexpr int64_t kTile = 512;

template <typename Type>
void sum_tile(typename Type::Element* out, const std::vector<const char*>& rows, int64_t begin,
              int64_t length) {
  using Element = typename Type::Element;
  typename Type::Accumulator total[kTile];
  const Element* first = reinterpret_cast<const Element*>(rows[0]) + begin;
  for (int64_t i = 0; i < length; ++i) total[i] = Type::load(first[i]);
  for (size_t term = 1; term < rows.size(); ++term) {
    const Element* next = reinterpret_cast<const Element*>(rows[term]) + begin;
    for (int64_t i = 0; i < length; ++i) total[i] += Type::load(next[i]);
  }
  for (int64_t i = 0; i < length; ++i) out[i] = Type::round(total[i]);
}

template <typename Type>
void sum_rows_as(const Sum& sum) {
  using Element = typename Type::Element;
  const int64_t row_bytes = sum.width * static_cast<int64_t>(sizeof(Element));
  const bool streaming = can_stream(sum.out, row_bytes, sum.rows * row_bytes);
  std::vector<int64_t> at(sum.lists.size(), 0);
  std::vector<const char*> terms;
  Element finished[kTile];
  for (int64_t row = 0; row < sum.rows; ++row) {
    terms.clear();
    for (size_t i = 0; i < sum.lists.size(); ++i) {
      const Terms& list = sum.lists[i];
      if (at[i] == list.count || list.targets[at[i]] != row) continue;
      terms.push_back(list.rows + list.sources[at[i]] * row_bytes);
      ++at[i];
    }
    char* out = sum.out + row * row_bytes;
    if (terms.empty()) {
      std::memset(out, 0, row_bytes);
    } else if (terms.size() == 1) {
      streaming ? copy_streaming(out, terms[0], row_bytes, terms[0] + row_bytes)
                : static_cast<void>(std::memcpy(out, terms[0], row_bytes));
    } else {
      for (int64_t begin = 0; begin < sum.width; begin += kTile) {
        const int64_t length = sum.width - begin < kTile ? sum.width - begin : kTile;
        const int64_t bytes = length * static_cast<int64_t>(sizeof(Element));
        Element* to = reinterpret_cast<Element*>(out) + begin;
        if (streaming && bytes % 16 == 0) {
          sum_tile<Type>(finished, terms, begin, length);
          const char* from = reinterpret_cast<const char*>(finished);
          copy_streaming(reinterpret_cast<char*>(to), from, bytes, from);
        } else {
          sum_tile<Type>(to, terms, begin, length);
        }
      }
    }
  }
  end_streaming();
}

}  // namespace

void gather_rows(const Gather& gather) {
  const int64_t bytes = gather.row_bytes;
  const bool streaming = can_stream(gather.target, bytes, gather.result_bytes);
  for (int64_t i = 0; i < gather.count; ++i) {
    const char* from = gather.source + gather.index[i] * bytes;
    if (streaming) {
      const char* next = gather.source + gather.index[i + 1 < gather.count ? i + 1 : i] * bytes;
      copy_streaming(gather.target + i * bytes, from, bytes, next);
    } else {
      std::memcpy(gather.target + i * bytes, from, bytes);
    }
  }
  end_streaming();
}

void sum_rows(const Sum& sum) {
  switch (sum.dtype) {
    case DType::float32:
      return sum_rows_as<Float32>(sum);
    case DType::float64:
      return sum_rows_as<Float64>(sum);
    case DType::bfloat16:
      return sum_rows_as<BFloat16>(sum);
  }
}

}  // namespace moe_ep::cpu
