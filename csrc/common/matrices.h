// A stack of matrices (B, m, n) as one block of memory, row after row or column after column. A
// tensor that lies in neither way is copied.
#pragma once
#include "multi_tensor.h"

namespace deepopt {

struct DEEPOPT_HIDDEN Matrices {
  Tensor kept;  // owns the memory
  int64_t batch, rows, columns;
  bool transposed;  // column after column

  explicit Matrices(const Tensor& given)
      : kept(given), batch(given.size(0)), rows(1), columns(1), transposed(false) {
    const int64_t dims = given.dim();
    if (dims > 1) columns = given.size(dims - 1);
    for (int64_t d = 1; d < dims - 1; ++d) rows *= given.size(d);
    if (given.is_contiguous()) return;
    transposed = dims == 3 && rows > 1 && columns > 1 && given.stride(1) == 1 &&
                 given.stride(2) == rows && (batch == 1 || given.stride(0) == rows * columns);
    if (!transposed) kept = torch::stable::contiguous(given);
  }

  int64_t entries() const { return rows * columns; }  // of one matrix
  const void* data() const { return kept.const_data_ptr(); }
};

inline int64_t chunks_of(int64_t entries) { return (entries + kChunk - 1) / kChunk; }

// Calls f(b, begin, end, c) in parallel for the entries of every matrix b, in chunks of at most
// kChunk. Chunks are counted through all matrices: the first of matrix b is c = b *
// chunks_of(entries). A thread takes at least `worth` entries.
template <class F>
void for_pieces(int64_t batch, int64_t entries, const F& f, int64_t worth = kWorth) {
  const int64_t each = chunks_of(entries);
  const int64_t grain =
      std::max<int64_t>(1, worth / std::max<int64_t>(1, std::min(entries, kChunk)));
  torch::stable::parallel_for(0, batch * each, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t from = c % each * kChunk;
      f(c / each, from, std::min(from + kChunk, entries), c);
    }
  });
}

}  // namespace deepopt
