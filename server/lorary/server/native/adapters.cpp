// Row-wise mixed-adapter product for CPUs: decoding has few rows per adapter and is bound by the
// bytes of A and B, which are read here exactly once per row, straight from the pool's pages.
//
// Semantics, for the i-th listed row b = rows[i] with adapter k = entry[i]:
//   t[m, j]  = x[b] . A[m, rank_rows[j]]                      float32 accumulation
//   y[b, o_m + :] += sum_j rank_scales[j] * t[m, j] * B_m[rank_rows[j], :]
// for j in [rank_indptr[k], rank_indptr[k + 1]). Rows are sorted by adapter, so neighbours find the
// adapter's pages in cache. Each row's result depends on that row alone: the order of summation is
// fixed, whatever else is in the batch.

#include <vector>

#include "common.h"

namespace {

template <typename T>
void one_row(const T* x, T* y, const T* a, const T* const* b, const int64_t* outs, int64_t members,
             int64_t cap, int64_t in, const int32_t* rank_rows, const float* scales, int32_t rank,
             std::vector<float>& scratch) {
    int64_t widest = 0;
    for (int64_t m = 0; m < members; ++m) widest = outs[m] > widest ? outs[m] : widest;
    scratch.resize(in + widest + rank);
    float* xf = scratch.data();
    float* acc = xf + in;
    float* t = acc + widest;
    for (int64_t i = 0; i < in; ++i) xf[i] = load(x + i);
    T* target = y;
    for (int64_t m = 0; m < members; ++m) {
        const T* a_m = a + m * cap * in;
        for (int32_t j = 0; j < rank; ++j) t[j] = scales[j] * dot(xf, a_m + rank_rows[j] * in, in);
        const int64_t out = outs[m];
        for (int64_t o = 0; o < out; ++o) acc[o] = load(target + o);
        int32_t j = 0;
        for (; j + 4 <= rank; j += 4) {
            const T* b0 = b[m] + rank_rows[j] * out;
            const T* b1 = b[m] + rank_rows[j + 1] * out;
            const T* b2 = b[m] + rank_rows[j + 2] * out;
            const T* b3 = b[m] + rank_rows[j + 3] * out;
            const float t0 = t[j], t1 = t[j + 1], t2 = t[j + 2], t3 = t[j + 3];
#pragma omp simd
            for (int64_t o = 0; o < out; ++o)
                acc[o] += t0 * load(b0 + o) + t1 * load(b1 + o) + t2 * load(b2 + o) + t3 * load(b3 + o);
        }
        for (; j < rank; ++j) {
            const T* b0 = b[m] + rank_rows[j] * out;
            const float t0 = t[j];
#pragma omp simd
            for (int64_t o = 0; o < out; ++o) acc[o] += t0 * load(b0 + o);
        }
        for (int64_t o = 0; o < out; ++o) store(target + o, acc[o]);
        target += out;
    }
}

template <typename T>
void add_rows(const T* x, T* y, const T* a, const T* const* b, const int64_t* outs, int64_t members,
              int64_t cap, int64_t in, int64_t y_stride, const int32_t* rows, const int32_t* entry,
              const int32_t* rank_indptr, const int32_t* rank_rows, const float* rank_scales,
              int64_t num_rows, int threads) {
#pragma omp parallel num_threads(threads) if (num_rows > 1 && threads > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_rows; ++i) {
            const int32_t k = entry[i];
            const int32_t begin = rank_indptr[k];
            one_row(x + rows[i] * in, y + rows[i] * y_stride, a, b, outs, members, cap, in,
                    rank_rows + begin, rank_scales + begin, rank_indptr[k + 1] - begin, scratch);
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
