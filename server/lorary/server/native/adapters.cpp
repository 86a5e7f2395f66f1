// Mixed-adapter product for CPUs, straight from the pool's pages. Decoding has few rows per adapter
// and is bound by the bytes of A and B; prompts have many, and go through them in blocks.
//
// Semantics, for the i-th listed row b = rows[i] with adapter k = entry[i]:
//   t[m, j]  = x[b] . A[m, rank_rows[j]]                      float32 accumulation
//   y[b, o_m + :] += sum_j rank_scales[j] * t[m, j] * B_m[rank_rows[j], :]
// for j in [rank_indptr[k], rank_indptr[k + 1]). Rows are sorted by adapter. Each row's result depends on that row alone: the order of summation is
// fixed, whatever else is in the batch.

#include <type_traits>
#include <vector>

#include "common.h"

namespace {

// Rows that share an adapter go through it in blocks, so that A and B are loaded and widened once
// for all of them. Every row's sums run in one order, 16 lanes side by side, whatever the block.
constexpr int kBlock = 8;

template <typename T, int R>
void dots(const float* const* x, const T* a, int64_t n, float* sums) {
    Lanes lane[R] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Lanes wide = widen(a + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) lane[r] += widen(x[r] + i) * wide;
    }
    for (int r = 0; r < R; ++r) {
        for (int64_t k = i; k < n; ++k) lane[r][k - i] += x[r][k] * load(a + k);
        float sum = 0.0f;
        for (int64_t l = 0; l < kLanes; ++l) sum += lane[r][l];
        sums[r] = sum;
    }
}

// acc[r, :] += sum_j t[r, j] * B[rank_rows[j], :], j in ascending order.
template <typename T, int R>
void expand(float* const* acc, const float* const* t, const T* b, const int32_t* rank_rows, int32_t rank,
            int64_t out) {
    int64_t o = 0;
    for (; o + kLanes <= out; o += kLanes) {
        Lanes sum[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r] = widen(acc[r] + o);
        for (int32_t j = 0; j < rank; ++j) {
            const Lanes wide = widen(b + rank_rows[j] * out + o);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[r] += t[r][j] * wide;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) std::memcpy(acc[r] + o, &sum[r], sizeof sum[r]);
    }
    for (; o < out; ++o)
        for (int32_t j = 0; j < rank; ++j)
            for (int r = 0; r < R; ++r) acc[r][o] += t[r][j] * load(b + rank_rows[j] * out + o);
}

template <typename T, int R>
void block(const T* x, T* y, const T* a, const T* const* b, const int64_t* outs, int64_t members,
           int64_t cap, int64_t in, int64_t y_stride, const int32_t* rows, const int32_t* rank_rows,
           const float* scales, int32_t rank, std::vector<float>& scratch) {
    int64_t widest = 0;
    for (int64_t m = 0; m < members; ++m) widest = outs[m] > widest ? outs[m] : widest;
    scratch.resize(R * (in + widest + rank));
    float *xf[R], *acc[R], *t[R];
    T* target[R];
    for (int r = 0; r < R; ++r) {
        xf[r] = scratch.data() + r * (in + widest + rank);
        acc[r] = xf[r] + in;
        t[r] = acc[r] + widest;
        target[r] = y + rows[r] * y_stride;
        for (int64_t i = 0; i < in; ++i) xf[r][i] = load(x + rows[r] * in + i);
    }
    for (int64_t m = 0; m < members; ++m) {
        for (int32_t j = 0; j < rank; ++j) {
            float sums[R];
            dots<T, R>(xf, a + (m * cap + rank_rows[j]) * in, in, sums);
            for (int r = 0; r < R; ++r) t[r][j] = scales[j] * sums[r];
        }
        const int64_t out = outs[m];
        for (int r = 0; r < R; ++r)
            for (int64_t o = 0; o < out; ++o) acc[r][o] = load(target[r] + o);
        expand<T, R>(acc, t, b[m], rank_rows, rank, out);
        for (int r = 0; r < R; ++r) {
            for (int64_t o = 0; o < out; ++o) store(target[r] + o, acc[r][o]);
            target[r] += out;
        }
    }
}

template <typename T>
void add_rows(const T* x, T* y, const T* a, const T* const* b, const int64_t* outs, int64_t members,
              int64_t cap, int64_t in, int64_t y_stride, const int32_t* rows, const int32_t* entry,
              const int32_t* rank_indptr, const int32_t* rank_rows, const float* rank_scales,
              int64_t num_rows, int threads) {
    // Blocks of neighbours with one adapter; the last of a run may be narrower.
    std::vector<int64_t> starts;
    for (int64_t i = 0, begin = 0; i <= num_rows; ++i) {
        const bool is_end = i == num_rows || entry[i] != entry[begin] || i - begin == kBlock;
        if (is_end && i > begin) {
            starts.push_back(begin);
            begin = i;
        }
    }
    starts.push_back(num_rows);
    const int64_t blocks = static_cast<int64_t>(starts.size()) - 1;
#pragma omp parallel num_threads(threads) if (blocks > 1 && threads > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t k = 0; k < blocks; ++k) {
            const int64_t first = starts[k];
            const int32_t begin = rank_indptr[entry[first]];
            const int32_t rank = rank_indptr[entry[first] + 1] - begin;
            auto run = [&](auto width) {
                block<T, decltype(width)::value>(x, y, a, b, outs, members, cap, in, y_stride,
                                                 rows + first, rank_rows + begin, rank_scales + begin,
                                                 rank, scratch);
            };
            switch (starts[k + 1] - first) {
                case 1: run(std::integral_constant<int, 1>{}); break;
                case 2: run(std::integral_constant<int, 2>{}); break;
                case 3: run(std::integral_constant<int, 3>{}); break;
                case 4: run(std::integral_constant<int, 4>{}); break;
                case 5: run(std::integral_constant<int, 5>{}); break;
                case 6: run(std::integral_constant<int, 6>{}); break;
                case 7: run(std::integral_constant<int, 7>{}); break;
                default: run(std::integral_constant<int, kBlock>{}); break;
            }
        }
    }
}

}  // namespace

extern "C" {

// Bumped whenever a signature in this folder changes; the loader refuses any other.
int lorary_abi() { return 3; }

void lorary_add_rows_bf16(const uint16_t* x, uint16_t* y, const uint16_t* a, const uint16_t* const* b,
                          const int64_t* outs, int64_t members, int64_t cap, int64_t in,
                          int64_t y_stride, const int32_t* rows, const int32_t* entry,
                          const int32_t* rank_indptr, const int32_t* rank_rows,
                          const float* rank_scales, int64_t num_rows, int threads) {
    add_rows(x, y, a, b, outs, members, cap, in, y_stride, rows, entry, rank_indptr, rank_rows,
             rank_scales, num_rows, threads);
}

void lorary_add_rows_f32(const float* x, float* y, const float* a, const float* const* b,
                         const int64_t* outs, int64_t members, int64_t cap, int64_t in,
                         int64_t y_stride, const int32_t* rows, const int32_t* entry,
                         const int32_t* rank_indptr, const int32_t* rank_rows,
                         const float* rank_scales, int64_t num_rows, int threads) {
    add_rows(x, y, a, b, outs, members, cap, in, y_stride, rows, entry, rank_indptr, rank_rows,
             rank_scales, num_rows, threads);
}

}  // extern "C"
