// The base's matrix products with 8-bit weights and, made for each call, 8-bit rows (AVX512-VNNI).
//
// Semantics: y[m, n] = s[m] * t[n] * sum_k q[m, k] * w[n, k] (+ bias[n]), q and w in [-127, 127],
// s[m] = max_k |x[m, k]| / 127 (symmetric, one scale a row: Dettmers et al. 2022, arXiv:2208.07339,
// without its outlier columns), t[n] the weight row's. Sums are exact integers.
//
// Packed layout: panels of 32 outputs; for each four inputs, 32 outputs x 4. vpdpbusd multiplies
// unsigned by signed bytes, so rows are stored as q + 128, and 128 * sum_k w[n, k] is taken off.
#pragma once

#include <cmath>

#include "matmul.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

constexpr int64_t kQuad = 4;
inline int64_t quads(int64_t k) { return (k + kQuad - 1) / kQuad * kQuad; }

// A weight in this form: bytes, and per output its scale and 128 times its sum.
struct Int8Weight {
    const int8_t* packed;
    const float* scales;
    const int32_t* offsets;
};

// One row of n elements to bytes around 128, quads(n) of them; returns its scale.
template <typename T>
float quantize_row(const T* x, int64_t n, uint8_t* q) {
    Lanes largest = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Lanes v = widen(x + i), magnitude = v < 0.0f ? -v : v;
        largest = magnitude > largest ? magnitude : largest;
    }
    float most = 0.0f;
    for (int64_t l = 0; l < kLanes; ++l) most = largest[l] > most ? largest[l] : most;
    for (; i < n; ++i) most = std::fabs(load(x + i)) > most ? std::fabs(load(x + i)) : most;
    const float scale = most / 127.0f, inverse = most > 0.0f ? 127.0f / most : 0.0f;
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    for (i = 0; i + kLanes <= n; i += kLanes) {
        // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, into the low bits.
        const Lanes shifted = widen(x + i) * inverse + (12582912.0f + 128.0f);
        LaneBits bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        const Bytes bytes = __builtin_convertvector(bits, Bytes);
        std::memcpy(q + i, &bytes, sizeof bytes);
    }
    for (; i < n; ++i) q[i] = static_cast<uint8_t>(std::nearbyint(load(x + i) * inverse) + 128.0f);
    for (; i < quads(n); ++i) q[i] = 128;
    return scale;
}

// Called by every thread of a parallel region.
template <typename T>
void quantize(const T* x, int64_t x_row, int64_t rows, int64_t k, uint8_t* q, float* scales) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) scales[r] = quantize_row(x + r * x_row, k, q + r * quads(k));
}

template <int R>
void tile(const uint8_t* x, int64_t x_row, const int8_t* w, int64_t depth, int32_t* sums) {
    __m512i acc[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < depth; k += kQuad) {
        const __m512i w0 = _mm512_loadu_si512(w + k * kPanel);
        const __m512i w1 = _mm512_loadu_si512(w + k * kPanel + 64);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
            int32_t four;
            std::memcpy(&four, x + r * x_row + k, sizeof four);
            const __m512i all = _mm512_set1_epi32(four);
            acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], all, w0);
            acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], all, w1);
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
        _mm512_storeu_si512(sums + r * kPanel, acc[r][0]);
        _mm512_storeu_si512(sums + r * kPanel + kLanes, acc[r][1]);
    }
}

using Int8Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);

template <int R = kTile>
Int8Tile int8_tile_of(int64_t rows) {
    if constexpr (R == 0) return nullptr;
    else return rows == R ? static_cast<Int8Tile>(tile<R>) : int8_tile_of<R - 1>(rows);
}

// Called by every thread of a parallel region, after `quantize`; they share the panels.
template <Into kInto, typename Y>
void multiply_int8(const uint8_t* q, const float* row_scales, int64_t rows, const Int8Weight& w,
                   const float* bias, int64_t n, int64_t k, Y* y, int64_t y_row) {
    const int64_t depth = quads(k), tiles = (rows + kTile - 1) / kTile;
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < panels(n); ++p) {
        int32_t* sums = reinterpret_cast<int32_t*>(scratch(kTile * kPanel));
        const int64_t column = p * kPanel, width = n - column < kPanel ? n - column : kPanel;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = t * rows / tiles, last = (t + 1) * rows / tiles;
            int8_tile_of(last - first)(q + first * depth, depth, w.packed + p * kPanel * depth, depth, sums);
            for (int64_t r = first; r < last; ++r) {
                const int32_t* sum = sums + (r - first) * kPanel;
                Y* to = y + r * y_row + column;
                for (int64_t c = 0; c < width; ++c) {
                    float value = static_cast<float>(sum[c] - w.offsets[column + c]) * row_scales[r] *
                                  w.scales[column + c];
                    if (bias) value += bias[column + c];
                    store(to + c, kInto == Into::add ? load(to + c) + value : value);
                }
            }
        }
    }
}

// Write w [n, k] into `packed`, panels(n) * 32 * quads(k) bytes; what is beyond n and k becomes 0.
inline void pack_int8(const int8_t* w, int64_t n, int64_t k, int8_t* packed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < panels(n); ++p)
        for (int64_t i = 0; i < quads(k); ++i)
            for (int64_t c = 0; c < kPanel; ++c) {
                const int64_t row = p * kPanel + c;
                packed[(p * quads(k) + i / kQuad * kQuad) * kPanel + c * kQuad + i % kQuad] =
                    row < n && i < k ? w[row * k + i] : int8_t{0};
            }
}

#endif
