// The base's matrix products: weights packed once, rows in few or many.
//
// Semantics: y[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n]); x and w bfloat16 or float32, sums in
// float32. A row's sums run in one order whatever other rows are in the call, so its bits do not
// depend on its company.
//
// Packed layout: panels of 32 outputs, each one stream of memory, because decoding is bound by the
// bytes of w. float32: for each input, 32 outputs. bfloat16: for each pair of inputs, 32 outputs x 2,
// so that each of two registers meets one broadcast pair of x in a vdpbf16ps.
#pragma once

#include "common.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr int64_t kPanel = 32;
// Rows of one register tile: with 32 registers 14 x 2 accumulators, 2 of weights, 1 of x.
#ifdef __AVX512F__
constexpr int kTile = 14;
#else
constexpr int kTile = 3;
#endif
// Inputs of one pass: a panel's part stays in the second-level cache for all row tiles.
constexpr int64_t kDepth = 1024;

inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// sums[r, 0:32] (+)= x[r, 0:depth] . one panel, for R rows; rows of sums are `sums_row` apart.
template <int R>
void tile(const float* x, int64_t x_row, const float* w, int64_t depth, float* sums, int64_t sums_row,
          bool is_first) {
    Lanes acc[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h)
            acc[r][h] = is_first ? Lanes{} : widen(sums + r * sums_row + h * kLanes);
    for (int64_t k = 0; k < depth; ++k) {
        const Lanes w0 = widen(w + k * kPanel), w1 = widen(w + k * kPanel + kLanes);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
            acc[r][0] += w0 * x[r * x_row + k];
            acc[r][1] += w1 * x[r * x_row + k];
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) narrow(sums + r * sums_row + h * kLanes, acc[r][h]);
}

#ifdef __AVX512BF16__
template <int R>
void tile(const uint16_t* x, int64_t x_row, const uint16_t* w, int64_t depth, float* sums,
          int64_t sums_row, bool is_first) {
    __m512 acc[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h)
            acc[r][h] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * sums_row + h * kLanes);
    for (int64_t k = 0; k < depth; k += 2) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w + k * kPanel);
        const __m512bh w1 = (__m512bh)_mm512_loadu_si512(w + k * kPanel + kPanel);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
            int32_t pair;
            std::memcpy(&pair, x + r * x_row + k, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w0, both);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w1, both);
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) _mm512_storeu_ps(sums + r * sums_row + h * kLanes, acc[r][h]);
}
#endif

template <typename T>
using Tile = void (*)(const T*, int64_t, const T*, int64_t, float*, int64_t, bool);

template <typename T, int R = kTile>
Tile<T> tile_of(int64_t rows) {
    if constexpr (R == 0) return nullptr;
    else return rows == R ? static_cast<Tile<T>>(tile<R>) : tile_of<T, R - 1>(rows);
}

// All rows against one panel: tiles of nearly equal height (15 rows are 8 + 7, not 14 + 1).
template <typename T>
void all_tiles(const T* x, int64_t x_row, int64_t rows, const T* w, int64_t depth, float* sums,
               int64_t sums_row, bool is_first) {
    const int64_t tiles = (rows + kTile - 1) / kTile;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = t * rows / tiles, last = (t + 1) * rows / tiles;
        tile_of<T>(last - first)(x + first * x_row, x_row, w, depth, sums + first * sums_row, sums_row,
                                 is_first);
    }
}

// What becomes of a product: it replaces y, or is added to it (a residual stream).
enum class Into { replace, add };

// What one panel's sums become in y; sums [rows, 32] may be changed.
template <Into kInto, typename Y>
void put_panel(float* sums, int64_t rows, const float* bias, int64_t n, int64_t panel, Y* y,
               int64_t y_row) {
    const int64_t column = panel * kPanel, width = n - column < kPanel ? n - column : kPanel;
    for (int64_t r = 0; r < rows; ++r) {
        float* sum = sums + r * kPanel;
        Y* to = y + r * y_row + column;
        if (bias)
            for (int64_t c = 0; c < width; ++c) sum[c] += bias[column + c];
        if (width == kPanel) {
            for (int64_t c = 0; c < kPanel; c += kLanes) {
                Lanes lanes = widen(sum + c);
                if (kInto == Into::add) lanes += widen(to + c);
                narrow(to + c, lanes);
            }
        } else {
            for (int64_t c = 0; c < width; ++c)
                store(to + c, kInto == Into::add ? load(to + c) + sum[c] : sum[c]);
        }
    }
}

// Called by every thread of a parallel region; they share the panels.
template <Into kInto, typename T, typename Y>
void multiply(const T* x, int64_t x_row, int64_t rows, const T* packed, const float* bias, int64_t n,
              int64_t k, Y* y, int64_t y_row) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < panels(n); ++p) {
        float* sums = scratch(rows * kPanel);
        const T* panel = packed + p * kPanel * k;
        for (int64_t from = 0; from < k; from += kDepth)
            all_tiles(x + from, x_row, rows, panel + from * kPanel, k - from < kDepth ? k - from : kDepth,
                      sums, kPanel, from == 0);
        put_panel<kInto>(sums, rows, bias, n, p, y, y_row);
    }
}

// Where element (row, i) of a panel lies in it.
inline int64_t in_panel(const float*, int64_t row, int64_t i) { return i * kPanel + row; }
inline int64_t in_panel(const uint16_t*, int64_t row, int64_t i) {
    return i / 2 * 2 * kPanel + row * 2 + i % 2;
}

// Write w [n, k], rows `w_row` apart, into `packed`; what is beyond n becomes 0.
template <typename T>
void pack(const T* w, int64_t w_row, int64_t n, int64_t k, T* packed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < panels(n); ++p) {
        T* panel = packed + p * kPanel * k;
        for (int64_t i = 0; i < k; ++i)
            for (int64_t c = 0; c < kPanel; ++c) {
                const int64_t row = p * kPanel + c;
                panel[in_panel(w, c, i)] = row < n ? w[row * w_row + i] : T{};
            }
    }
}
