// Times and checks the low-latency kernels by themselves, in CUDA graphs: 1 or 2 GPUs from one process,
// without Python, over numbers of tokens. For work on the kernels; users have `moe-ep bench --low-latency`.
//
//   nvcc -O3 -std=c++20 -gencode=arch=compute_90a,code=sm_90a -Icsrc -cudart static -o low_latency_sweep
//     tests/gpu/low_latency_sweep.cu csrc/low_latency/*.cu && ./low_latency_sweep 1 128
//
// Microseconds of the slower GPU. "in a row": of a call among many, one behind the other; "parts": with
// hooks. "warm" and "cold": both GPUs wait for each other before each kernel, which events time, and cold
// caches are flushed as well; the events' own cost an empty kernel shows.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "low_latency/combine.h"
#include "low_latency/dispatch.h"
#include "sweep.h"

using namespace moe_ep;
using namespace moe_ep::low_latency;

constexpr int kHidden = 7168, kExperts = 288, kTopk = 8, kScales = kHidden / 128;
constexpr int kCalls = 20, kRounds = 12;
constexpr size_t kCacheBytes = 128 << 20;

template <typename T>
std::vector<T> fetch(const T* from, size_t count) {
  std::vector<T> values(count);
  check(cudaMemcpy(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

// A number for each element of the experts' rows.
__host__ __device__ float made_up(int rank, int64_t slot, int channel) {
  uint32_t bits = static_cast<uint32_t>(slot * 7919 + channel * 104729 + rank * 31);
  bits ^= bits >> 13;
  bits *= 0x5bd1e995u;
  return static_cast<float>(static_cast<int>(bits >> 24) - 128) / 64;
}

__global__ void make_up(__nv_bfloat16* rows, int64_t elements, int rank) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements; i += stride) {
    rows[i] = __float2bfloat16_rn(made_up(rank, i / kHidden, static_cast<int>(i % kHidden)));
  }
}

__global__ void do_nothing(const __grid_constant__ Group) {}

// Ends on all GPUs at nearly the same time.
__global__ void meet(volatile unsigned int* mine, volatile unsigned int* theirs, unsigned int* round) {
  const unsigned int number = ++*round;
  *theirs = number;
  __threadfence_system();
  while (*mine < number) {
  }
}

struct Rank {
  cudaStream_t stream;
  Group group{};
  std::vector<__nv_bfloat16> x;
  std::vector<int64_t> ids;
  std::vector<float> weights;
  __nv_bfloat16 *x_there, *expert_rows;
  int64_t *ids_there, *ranges;
  float *weights_there, *scales;
  char *rows, *out, *cache;
  int *tables, *counts, *source_token;
  Peer* peers;
  unsigned int *meeting, *round;
};

using Launch = std::function<void(Rank&)>;

class Sweep {
 public:
  Sweep(int size, int tokens) : size_(size), tokens_(tokens), local_(kExperts / size), ranks_(size) {
    for (int r = 0; r < size; ++r) make_rank(r);
    for (Rank& rank : ranks_) {
      for (int r = 0; r < size; ++r) rank.group.windows[r] = ranks_[r].group.windows[r];
    }
    synchronize();
  }

  ~Sweep() {
    for (Rank& rank : ranks_) {
      check(cudaSetDevice(rank.group.rank));
      for (void* memory : allocated_[rank.group.rank]) check(cudaFree(memory));
      check(cudaStreamDestroy(rank.stream));
    }
  }

  void run() {
    const Launch fp8 = dispatch(Format::fp8), bfloat16 = dispatch(Format::bfloat16), back = combine();
    const Launch nothing = [](Rank& rank) {
      do_nothing<<<rank.group.num_blocks, kThreads, 0, rank.stream>>>(rank.group);
    };
    run_once({fp8, back});
    const Launch send = dispatch(Format::fp8, true, false), receive = dispatch(Format::fp8, false, true);
    const Launch send_back = combine(true, false), receive_back = combine(false, true);
    std::printf("T %3d | in a row:", tokens_);
    const float empty = in_a_row({nothing}), dispatched = in_a_row({fp8}), wide = in_a_row({bfloat16});
    std::printf(" empty %.1f, dispatch fp8 %.1f, bf16 %.1f,", empty, dispatched, wide);
    const float combined = in_a_row({back}), both = in_a_row({fp8, back});
    std::printf(" combine %.1f, both %.1f; parts:", combined, both);
    // Sending alone waits for nothing but other ranks' weights, if tokens of each go to all: else one would
    // run away from the others.
    const float parts = in_a_row({send, receive}), parts_back = in_a_row({send_back, receive_back});
    const float alone = tokens_ < 8 ? 0 : in_a_row({send_back});
    std::printf(" dispatch %.1f, combine %.1f (sending %.1f)\n", parts, parts_back, alone);
    for (const bool flush : {false, true}) {
      const std::vector<float> us =
          one_by_one({nothing, fp8, back, send, receive, send_back, receive_back}, flush);
      std::printf("      | %s: empty %.1f, dispatch %.1f, combine %.1f; parts: dispatch %.1f + %.1f,",
                  flush ? "cold" : "warm", us[0], us[1], us[2], us[3], us[4]);
      std::printf(" combine %.1f + %.1f\n", us[5], us[6]);
    }
    int wrong = 0;
    for (const Format format : {Format::bfloat16, Format::fp8, Format::fp8_rounded, Format::fp8_exponents}) {
      run_once({dispatch(format), back});
      for (Rank& rank : ranks_) wrong += count_wrong(rank, format);
    }
    run_once({send, receive, send_back, receive_back});
    for (Rank& rank : ranks_) wrong += count_wrong(rank, Format::fp8);
    std::printf("      | results: %s (%d wrong)\n", wrong ? "WRONG" : "right", wrong);
    std::fflush(stdout);
  }

 private:
  template <typename T>
  T* take(int rank, size_t count, int byte = 0) {
    T* memory = allocate<T>(count, byte);
    allocated_[rank].push_back(memory);
    return memory;
  }

  void make_rank(int r) {
    Rank& rank = ranks_[r];
    check(cudaSetDevice(r));
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, r));
    check(cudaStreamCreate(&rank.stream));
    Group& group = rank.group;
    group.rank = r;
    group.size = size_;
    group.hidden = kHidden;
    group.max_tokens = tokens_;
    group.num_experts = kExperts;
    group.num_local = local_;
    group.num_blocks = kBlocksPerSm * properties.multiProcessorCount;
    group.timeout_ns = 2'000'000'000;
    group.at = window_layout(size_, tokens_, local_, kHidden);
    group.masked = take<unsigned int>(r, size_);
    group.failed = take<unsigned int>(r, 1);
    group.calls = take<unsigned int>(r, 2 * size_ * group.num_blocks);
    void* host;
    check(cudaHostAlloc(&host, sizeof(HostRecord), cudaHostAllocPortable));
    std::memset(host, 0, sizeof(HostRecord));
    group.host = static_cast<HostRecord*>(host);
    group.windows[r] = take<char>(r, group.at.bytes);

    std::mt19937 random(r + 10 * tokens_);
    std::normal_distribution<float> normal;
    std::vector<int64_t> experts(kExperts);
    std::iota(experts.begin(), experts.end(), 0);
    for (int token = 0; token < tokens_; ++token) {
      std::shuffle(experts.begin(), experts.end(), random);
      for (int k = 0; k < kTopk; ++k) {
        rank.ids.push_back(tokens_ > 1 && random() % 50 == 0 ? -1 : experts[k]);
        rank.weights.push_back(std::fabs(normal(random)));
      }
      for (int i = 0; i < kHidden; ++i) rank.x.push_back(__float2bfloat16_rn(normal(random)));
    }
    const size_t slots = static_cast<size_t>(local_) * group.capacity();
    rank.x_there = take<__nv_bfloat16>(r, rank.x.size());
    rank.ids_there = take<int64_t>(r, rank.ids.size());
    rank.weights_there = take<float>(r, rank.weights.size());
    check(cudaMemcpy(rank.x_there, rank.x.data(), rank.x.size() * 2, cudaMemcpyHostToDevice));
    check(cudaMemcpy(rank.ids_there, rank.ids.data(), rank.ids.size() * 8, cudaMemcpyHostToDevice));
    check(
        cudaMemcpy(rank.weights_there, rank.weights.data(), rank.weights.size() * 4, cudaMemcpyHostToDevice));
    rank.expert_rows = take<__nv_bfloat16>(r, slots * kHidden);
    make_up<<<4096, 256>>>(rank.expert_rows, slots * kHidden, r);
    rank.rows = take<char>(r, slots * kHidden * 2, 0xAB);
    rank.scales = take<float>(r, slots * kScales, 0xAB);
    rank.out = take<char>(r, tokens_ * kHidden * 2, 0xAB);
    rank.cache = take<char>(r, kCacheBytes);
    rank.tables = take<int>(r, Tables::words(group, kTopk), 0xAB);
    rank.counts = take<int>(r, local_, 0xAB);
    rank.source_token = take<int>(r, slots, 0xAB);
    rank.ranges = take<int64_t>(r, local_ * size_, 0xAB);
    rank.peers = take<Peer>(r, size_);
    rank.meeting = take<unsigned int>(r, 1);
    rank.round = take<unsigned int>(r, 1);
  }

  Launch dispatch(Format format, bool send = true, bool receive = true) {
    return [=, this](Rank& rank) {
      check(launch_dispatch(
          rank.group, Dispatch{send, receive, rank.x_there, rank.ids_there, true, tokens_, kTopk, format,
                               rank.tables, rank.rows, rank.scales, rank.counts, rank.source_token,
                               rank.ranges, nullptr, rank.stream}));
    };
  }

  Launch combine(bool send = true, bool receive = true) {
    return [=, this](Rank& rank) {
      check(launch_combine(rank.group, Combine{send, receive, reinterpret_cast<char*>(rank.expert_rows),
                                               rank.ids_there, true, rank.weights_there, tokens_, kTopk,
                                               rank.tables, rank.peers, rank.out, rank.stream}));
    };
  }

  void meet_all(Rank& rank) {
    meet<<<1, 1, 0, rank.stream>>>(rank.meeting, ranks_[size_ - 1 - rank.group.rank].meeting, rank.round);
  }

  // Records a graph for each rank, and launches them.
  template <typename Record>
  void in_graphs(int launches, Record&& record) {
    std::vector<cudaGraphExec_t> graphs(size_);
    for (Rank& rank : ranks_) {
      check(cudaSetDevice(rank.group.rank));
      cudaGraph_t graph;
      check(cudaStreamBeginCapture(rank.stream, cudaStreamCaptureModeThreadLocal));
      record(rank);
      check(cudaStreamEndCapture(rank.stream, &graph));
      check(cudaGraphInstantiate(&graphs[rank.group.rank], graph, 0));
      check(cudaGraphDestroy(graph));
    }
    for (int i = 0; i < launches; ++i) {
      for (Rank& rank : ranks_) {
        check(cudaSetDevice(rank.group.rank));
        check(cudaGraphLaunch(graphs[rank.group.rank], rank.stream));
      }
    }
    synchronize();
    for (const cudaGraphExec_t graph : graphs) check(cudaGraphExecDestroy(graph));
  }

  void run_once(const std::vector<Launch>& calls) {
    in_graphs(1, [&](Rank& rank) {
      for (const Launch& call : calls) call(rank);
    });
  }

  float in_a_row(const std::vector<Launch>& calls) {
    std::vector<cudaEvent_t> begin = events(1), end = events(1);
    in_graphs(3, [&](Rank& rank) {
      meet_all(rank);
      record(begin[rank.group.rank], rank);
      for (int i = 0; i < kCalls; ++i) {
        for (const Launch& call : calls) call(rank);
      }
      record(end[rank.group.rank], rank);
    });
    float slowest = 0;
    for (int r = 0; r < size_; ++r) slowest = std::max(slowest, elapsed_us(begin[r], end[r]) / kCalls);
    return slowest;
  }

  // The median of each.
  std::vector<float> one_by_one(const std::vector<Launch>& calls, bool flush) {
    const int count = kRounds * static_cast<int>(calls.size());
    std::vector<cudaEvent_t> begin = events(count), end = events(count);
    in_graphs(2, [&](Rank& rank) {
      for (int i = 0; i < count; ++i) {
        if (flush) check(cudaMemsetAsync(rank.cache, i, kCacheBytes, rank.stream));
        meet_all(rank);
        record(begin[rank.group.rank * count + i], rank);
        calls[i % calls.size()](rank);
        record(end[rank.group.rank * count + i], rank);
      }
    });
    std::vector<float> medians;
    for (size_t call = 0; call < calls.size(); ++call) {
      std::vector<float> times;
      for (int i = static_cast<int>(call); i < count; i += static_cast<int>(calls.size())) {
        float slowest = 0;
        for (int r = 0; r < size_; ++r) {
          slowest = std::max(slowest, elapsed_us(begin[r * count + i], end[r * count + i]));
        }
        times.push_back(slowest);
      }
      std::sort(times.begin(), times.end());
      medians.push_back(times[times.size() / 2]);
    }
    return medians;
  }

  std::vector<cudaEvent_t> events(int per_rank) {
    std::vector<cudaEvent_t> events(size_ * per_rank);
    for (size_t i = 0; i < events.size(); ++i) {
      check(cudaSetDevice(static_cast<int>(i) / per_rank));
      check(cudaEventCreate(&events[i]));
    }
    return events;
  }

  static void record(cudaEvent_t event, Rank& rank) {
    check(cudaEventRecordWithFlags(event, rank.stream, cudaEventRecordExternal));
  }

  static float elapsed_us(cudaEvent_t begin, cudaEvent_t end) {
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end));
    return ms * 1000;
  }

  // The (rank, token) of each row of each of a rank's experts.
  std::vector<std::vector<std::pair<int, int>>> rows_of(int rank) const {
    std::vector<std::vector<std::pair<int, int>>> rows(local_);
    for (int from = 0; from < size_; ++from) {
      for (int i = 0; i < tokens_ * kTopk; ++i) {
        const int64_t expert = ranks_[from].ids[i];
        if (expert >= 0 && expert / local_ == rank) rows[expert % local_].push_back({from, i / kTopk});
      }
    }
    return rows;
  }

  int count_wrong(Rank& rank, Format format) {
    check(cudaSetDevice(rank.group.rank));
    int wrong = 0;
    const auto rows = rows_of(rank.group.rank);
    const std::vector<int> counts = fetch(rank.counts, local_);
    const std::vector<int64_t> ranges = fetch(rank.ranges, local_ * size_);
    const int capacity = rank.group.capacity();
    const bool fp8 = format != Format::bfloat16;
    const size_t row_bytes = fp8 ? kHidden : 2 * kHidden;
    const int columns = format == Format::fp8_exponents ? kScales / 4 : kScales;
    for (int expert = 0; expert < local_; ++expert) {
      const size_t count = rows[expert].size();
      wrong += counts[expert] != static_cast<int>(count);
      int64_t begin = 0;
      for (int from = 0; from < size_; ++from) {
        const int64_t number = std::count_if(rows[expert].begin(), rows[expert].end(),
                                             [&](const auto& row) { return row.first == from; });
        wrong += ranges[expert * size_ + from] != (begin << 32 | number);
        begin += number;
      }
      if (count == 0) continue;
      const size_t slot = static_cast<size_t>(expert) * capacity;
      const auto tokens = fetch(rank.source_token + slot, count);
      const auto got = fetch(rank.rows + slot * row_bytes, count * row_bytes);
      const auto scales = fetch(reinterpret_cast<unsigned int*>(rank.scales) + slot * columns,
                                static_cast<size_t>(columns) * capacity);
      for (size_t i = 0; i < count; ++i) {
        const auto [from, token] = rows[expert][i];
        wrong += tokens[i] != token;
        const __nv_bfloat16* x = ranks_[from].x.data() + static_cast<size_t>(token) * kHidden;
        if (!fp8) {
          wrong += std::memcmp(x, got.data() + i * row_bytes, row_bytes) != 0;
        } else {
          wrong += !is_quantized(x, got.data() + i * row_bytes, scales.data() + i, capacity, format);
        }
      }
    }
    return wrong + count_wrong_sums(rank);
  }

  static bool is_quantized(const __nv_bfloat16* x, const char* data, const unsigned int* scales, int capacity,
                           Format format) {
    bool right = true;
    for (int block = 0; block < kScales; ++block) {
      float amax = 1e-4f;
      for (int i = 0; i < 128; ++i) amax = std::max(amax, std::fabs(__bfloat162float(x[128 * block + i])));
      float scale = amax * static_cast<float>(1.0 / 448), by = 448.0f / amax;
      if (format != Format::fp8) {
        scale = std::exp2(std::ceil(std::log2(static_cast<double>(scale))));
        by = 1 / scale;
      }
      uint32_t bits;
      std::memcpy(&bits, &scale, 4);
      if (format == Format::fp8_exponents) {
        right &= (scales[static_cast<size_t>(block / 4) * capacity] >> 8 * (block % 4) & 255) == bits >> 23;
      } else {
        right &= scales[static_cast<size_t>(block) * capacity] == bits;
      }
      for (int i = 0; i < 128; ++i) {
        const float value = __bfloat162float(x[128 * block + i]) * by;
        right &= static_cast<uint8_t>(data[128 * block + i]) ==
                 __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
      }
    }
    return right;
  }

  int count_wrong_sums(Rank& rank) {
    const auto out =
        fetch(reinterpret_cast<__nv_bfloat16*>(rank.out), static_cast<size_t>(tokens_) * kHidden);
    int wrong = 0;
    std::vector<float> total(kHidden), partial(kHidden);
    for (int server = 0; server < size_; ++server) slots_[server] = rows_of(server);
    for (int token = 0; token < tokens_; ++token) {
      std::fill(total.begin(), total.end(), 0.0f);
      for (int server = 0; server < size_; ++server) {
        std::fill(partial.begin(), partial.end(), 0.0f);
        for (int k = 0; k < kTopk; ++k) {
          const int64_t expert = rank.ids[token * kTopk + k];
          if (expert < 0 || expert / local_ != server) continue;
          const auto& rows = slots_[server][expert % local_];
          const auto place = std::find(rows.begin(), rows.end(), std::pair(rank.group.rank, token));
          const int64_t slot = expert % local_ * rank.group.capacity() + (place - rows.begin());
          for (int i = 0; i < kHidden; ++i) {
            const float term = made_up(server, slot, i) * rank.weights[token * kTopk + k];
            partial[i] = partial[i] + term;
          }
        }
        for (int i = 0; i < kHidden; ++i) total[i] += __bfloat162float(__float2bfloat16_rn(partial[i]));
      }
      for (int i = 0; i < kHidden; ++i) {
        wrong += __bfloat162float(out[static_cast<size_t>(token) * kHidden + i]) !=
                 __bfloat162float(__float2bfloat16_rn(total[i]));
      }
    }
    return wrong;
  }

  void synchronize() {
    for (Rank& rank : ranks_) {
      check(cudaSetDevice(rank.group.rank));
      check(cudaDeviceSynchronize());
      const HostRecord* host = rank.group.host;
      if (!host->failed) continue;
      std::fprintf(stderr, "rank %d waited in vain: phase %d, peer %d, turn %d expected, %d seen\n",
                   rank.group.rank, static_cast<int>(host->phase), static_cast<int>(host->peer),
                   static_cast<int>(host->expected), static_cast<int>(host->seen));
      std::exit(1);
    }
  }

  const int size_, tokens_, local_;
  std::vector<Rank> ranks_;
  std::vector<void*> allocated_[2];
  std::vector<std::vector<std::pair<int, int>>> slots_[2];
};

int main(int argc, char** argv) {
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);  // a kernel's first launch would wait for those that wait for it
  int count = 0;
  check(cudaGetDeviceCount(&count));
  const int size = std::min(count, 2);
  for (int r = 0; r < size && size > 1; ++r) {
    check(cudaSetDevice(r));
    check(cudaDeviceEnablePeerAccess(1 - r, 0));
  }
  std::vector<int> tokens;
  for (int i = 1; i < argc; ++i) tokens.push_back(std::atoi(argv[i]));
  if (tokens.empty()) tokens = {1, 8, 32, 64, 128, 256};
  for (const int number : tokens) Sweep(size, number).run();
}
