#pragma once

#include <cstdint>
#include <cstring>

namespace moe_ep {

// N elements that move as one access: at most 16 bytes, aligned to their own size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16 && (sizeof(T) * N & (sizeof(T) * N - 1)) == 0,
                "one access moves 1, 2, 4, 8 or 16 bytes");
  T at[N];
};

namespace detail {

template <int Bytes>
struct Word;
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

}  // namespace detail

// A load of data that is read once: first to be evicted from the caches.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load_once(const T* from) {
  using Word = typename detail::Word<sizeof(T) * N>::type;
  const Word word = __ldcs(reinterpret_cast<const Word*>(from));
  Vector<T, N> vector;
  memcpy(&vector, &word, sizeof(word));
  return vector;
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& vector) {
  using Word = typename detail::Word<sizeof(T) * N>::type;
  Word word;
  memcpy(&word, &vector, sizeof(word));
  *reinterpret_cast<Word*>(to) = word;
}

// The largest value among `Lanes` neighbouring lanes (a power of two), given to each of them; NaN is ignored.
template <int Lanes>
__device__ __forceinline__ float max_over_lanes(float value) {
#pragma unroll
  for (int distance = Lanes / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
  }
  return value;
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace moe_ep
