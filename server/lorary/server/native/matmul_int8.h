// The base's matrix products with 8-bit weights and, made for each call, 8-bit rows (AVX512-VNNI).
//
// Semantics: inputs in groups G of 64, q and w in [-127, 127]:
//   y[m, n] = sum_G s[m, G] * t[n, G] * sum_{k in G} q[m, k] * w[n, k]  (+ bias[n])
// with s[m, G] = max_{k in G} |x[m, k]| / 127, t likewise of the weights: symmetric, and one outlier
// spoils its own group only. Sums within a group are exact integers, groups are added in float32 in
// ascending order: a row's bits do not depend on the other rows.
//
// Packed layout: panels of 32 outputs; for each four inputs, 32 outputs x 4. vpdpbusd multiplies
// unsigned by signed bytes, so rows are stored as q + 128, and 128 * sum_k w[n, k] is taken off.
#pragma once

#include <cmath>

#include "matmul.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

constexpr int64_t kQuad = 4;
constexpr int64_t kGroup = 64;
// Rows of one register tile: an integer and a float32 sum for each of 6 x 2 registers of outputs.
constexpr int kInt8Tile = 6;
inline int64_t quads(int64_t k) { return (k + kQuad - 1) / kQuad * kQuad; }
inline int64_t groups(int64_t k) { return (k + kGroup - 1) / kGroup; }

// A weight in this form; scales and offsets (128 times a group's sum) are [panels, groups, 32].
struct Int8Weight {
    const int8_t* packed;
    const float* scales;
    const int32_t* offsets;
};

// At most 64 elements to bytes around 128; returns their scale.
template <typename T>
float quantize_group(const T* x, int64_t n, uint8_t* q) {
    Lanes largest = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Lanes v = widen(x + i), magnitude = v < 0.0f ? -v : v;
        largest = magnitude > largest ? magnitude : largest;
    }
    float most = 0.0f;
    for (int64_t l = 0; l < kLanes; ++l) most = largest[l] > most ? largest[l] : most;
    for (; i < n; ++i) most = std::fabs(load(x + i)) > most ? std::fabs(load(x + i)) : most;
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
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
    return most / 127.0f;
}

// Called by every thread of a parallel region. q is [rows, quads(k)], scales [rows, groups(k)].
template <typename T>
void quantize(const T* x, int64_t x_row, int64_t rows, int64_t k, uint8_t* q, float* scales) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        uint8_t* to = q + r * quads(k);
        for (int64_t g = 0; g < groups(k); ++g) {
            const int64_t from = g * kGroup, n = k - from < kGroup ? k - from : kGroup;
            scales[r * groups(k) + g] = quantize_group(x + r * x_row + from, n, to + from);
        }
        for (int64_t i = k; i < quads(k); ++i) to[i] = 128;
    }
}

// sums[r, 0:32] = x[r] . one panel, for R rows; scales and offsets are the panel's. `ahead` is fetched on the way, as
// much as is read of w.
template <int R>
void tile(const uint8_t* x, const float* x_scales, int64_t k, const int8_t* w, const float* w_scales,
          const int32_t* w_offsets, float* sums, const int8_t* ahead) {
    __m512 total[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
    const int64_t depth = quads(k), num_groups = groups(k);
    for (int64_t g = 0; g < num_groups; ++g) {
        __m512i acc[R][2];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
        const int64_t last = (g + 1) * kGroup < depth ? (g + 1) * kGroup : depth;
        for (int64_t i = g * kGroup; i < last; i += kQuad) {
            const __m512i w0 = _mm512_loadu_si512(w + i * kPanel);
            const __m512i w1 = _mm512_loadu_si512(w + i * kPanel + 64);
            __builtin_prefetch(ahead + i * kPanel, 0, 2);
            __builtin_prefetch(ahead + i * kPanel + 64, 0, 2);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                int32_t four;
                std::memcpy(&four, x + r * depth + i, sizeof four);
                const __m512i all = _mm512_set1_epi32(four);
                acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], all, w0);
                acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], all, w1);
            }
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const __m512i offset = _mm512_loadu_si512(w_offsets + g * kPanel + h * kLanes);
            const __m512 scale = _mm512_loadu_ps(w_scales + g * kPanel + h * kLanes);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][h], offset));
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[r * num_groups + g]));
                total[r][h] = _mm512_fmadd_ps(exact, both, total[r][h]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
        _mm512_storeu_ps(sums + r * kPanel, total[r][0]);
        _mm512_storeu_ps(sums + r * kPanel + kLanes, total[r][1]);
    }
}

using Int8Tile = void (*)(const uint8_t*, const float*, int64_t, const int8_t*, const float*,
                          const int32_t*, float*, const int8_t*);

template <int R = kInt8Tile>
Int8Tile int8_tile_of(int64_t rows) {
    if constexpr (R == 0) return nullptr;
    else return rows == R ? static_cast<Int8Tile>(tile<R>) : int8_tile_of<R - 1>(rows);
}

// Called by every thread of a parallel region, after `quantize`; they share the panels. `later` is this thread's, or
// null.
template <Into kInto, typename Y>
void multiply_int8(const uint8_t* q, const float* row_scales, int64_t rows, const Int8Weight& w,
                   const float* bias, int64_t n, int64_t k, Y* y, int64_t y_row, Later* later = nullptr) {
    const int64_t tiles = (rows + kInt8Tile - 1) / kInt8Tile;
    const auto panel_of = [&](int64_t p) { return w.packed + p * kPanel * quads(k); };
    share(panels(n), 1, [&](int64_t p, int64_t following) {
        if (p < 0) return;
        float* sums = scratch(rows * kPanel);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = t * rows / tiles, last = (t + 1) * rows / tiles;
            // As all_tiles does.
            const void* ahead = panel_of(p);
            if (t == (tiles > 1)) {
                if (following >= 0) ahead = panel_of(following);
            } else if (later && tiles > 1) {
                ahead = later->take(kPanel * quads(k), ahead);
            }
            int8_tile_of(last - first)(q + first * quads(k), row_scales + first * groups(k), k,
                                       panel_of(p), w.scales + p * groups(k) * kPanel,
                                       w.offsets + p * groups(k) * kPanel, sums + first * kPanel,
                                       static_cast<const int8_t*>(ahead));
        }
        put_panel<kInto>(sums, rows, bias, n, p, y, y_row);
    });
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
