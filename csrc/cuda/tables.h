// The arguments of a launch, passed by value: nothing is copied to the device before, and nothing
// waits.
#pragma once
#include <cstdint>

namespace deepopt {

enum class Kind { f32, f64, bf16, fp16 };

// Entries of a chunk, which is a block's work: 32 KB of bf16. A tensor of a million entries has 64
// chunks, enough for half the processors of the largest device; a block runs for microseconds,
// which hides the search for its tensor.
constexpr int kChunkEntries = 1 << 14;
constexpr unsigned kMostArgument = 4000;  // bytes; 4096 are what every driver takes
constexpr int kMostStridedDims = 16;

// For a number of parameters N tensors each, whose entries lie one after the other in the same
// order. Own is what else differs from parameter to parameter.
template <int N, class Own>
struct Table {
  static constexpr int kMost = int((kMostArgument - 128) / (8 * N + 8 + 4 + sizeof(Own)));

  char* at[kMost][N];
  int64_t entries[kMost];
  Own own[kMost];
  uint32_t first[kMost + 1];  // first chunk of each parameter; at the end the number of chunks
  int tensors = 0;

  Table() { first[0] = 0; }
  bool full() const { return tensors == kMost; }
  uint32_t chunks() const { return first[tensors]; }

  void add(char* const* places, int64_t count, const Own& its) {
    for (int k = 0; k < N; ++k) at[tensors][k] = places[k];
    entries[tensors] = count;
    own[tensors] = its;
    const int64_t chunks = (count + kChunkEntries - 1) / kChunkEntries;
    first[tensors + 1] = first[tensors] + uint32_t(chunks);
    ++tensors;
  }
};

// N tensors of one parameter that lie in different orders, or with gaps: walked by strides.
template <int N, class Own>
struct Strided {
  char* at[N];
  int64_t entries;
  Own own;
  int dims;
  int64_t size[kMostStridedDims];
  int64_t stride[kMostStridedDims][N];  // in bytes

  int64_t chunks() const { return (entries + kChunkEntries - 1) / kChunkEntries; }
};

}  // namespace deepopt
