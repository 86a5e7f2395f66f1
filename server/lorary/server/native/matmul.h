// The base's matrix products: weights packed once, rows in few or many.
//
// Semantics: y[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n]); x and w bfloat16 or float32, sums in
// float32. A row's sums run in one order whatever other rows are in the call, so its bits do not
// depend on its company.
//
// Rests: a float32 row is rounded to bfloat16 to be multiplied, and a few of its elements are so much
// larger than the others that most of what rounding changes is theirs. What it leaves of those few is
// multiplied, too, for a few percent of the product's time: much of the way to a float32 row, which
// would take twice the time.
//
// Packed layout: panels of 32 outputs, each one stream of memory, because decoding is bound by the
// bytes of w. float32: for each input, 32 outputs. bfloat16: for each pair of inputs, 32 outputs x 2,
// so that each of two registers meets one broadcast pair of x in a vdpbf16ps.
#pragma once

#include <type_traits>

#include "common.h"
#include "share.h"

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

// sums[r, 0:32] (+)= x[r, 0:depth] . one panel, for R rows; rows of sums are `sums_row` apart. `ahead` is what
// will be read next, fetched on the way.
template <int R>
void tile(const float* x, int64_t x_row, const float* w, int64_t depth, float* sums, int64_t sums_row,
          bool is_first, const float* ahead) {
    Lanes acc[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h)
            acc[r][h] = is_first ? Lanes{} : widen(sums + r * sums_row + h * kLanes);
    for (int64_t k = 0; k < depth; ++k) {
        const Lanes w0 = widen(w + k * kPanel), w1 = widen(w + k * kPanel + kLanes);
        __builtin_prefetch(ahead + k * kPanel, 0, 2);
        __builtin_prefetch(ahead + k * kPanel + kLanes, 0, 2);
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
          int64_t sums_row, bool is_first, const uint16_t* ahead) {
    __m512 acc[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h)
            acc[r][h] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * sums_row + h * kLanes);
    for (int64_t k = 0; k < depth; k += 2) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w + k * kPanel);
        const __m512bh w1 = (__m512bh)_mm512_loadu_si512(w + k * kPanel + kPanel);
        __builtin_prefetch(ahead + k * kPanel, 0, 2);
        __builtin_prefetch(ahead + k * kPanel + kPanel, 0, 2);
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

// One input's rest: bfloat16 halves of a pair of inputs, the other of which is 0.
struct Rest {
    int32_t pair, halves;
};
constexpr int64_t kRests = 4;

// Round a row to T and find its rests: the largest of what is left in each of 16 lanes, and of these the
// largest, so that one pass finds them. With T float32 nothing is left.
inline void round_row(const float* x, int64_t n, float* rounded, Rest*) {
    if (rounded != x) std::memcpy(rounded, x, n * sizeof *x);
}
#ifdef __AVX512BF16__
inline void round_row(const float* x, int64_t n, uint16_t* rounded, Rest* rests) {
    Lanes best = {}, rest = {};
    LaneBits where = {}, here = {};
    for (int i = 0; i < kLanes; ++i) here[i] = i;
    const auto visit = [&](Lanes value, uint16_t* to) {
        LaneBits bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) & static_cast<int32_t>(0xffff0000);
        Lanes kept;
        std::memcpy(&kept, &bits, sizeof kept);
        narrow(to, kept);
        const Lanes left = value - kept, size = left < 0.0f ? -left : left;
        const LaneBits is_larger = size > best;
        best = is_larger ? size : best;
        rest = is_larger ? left : rest;
        where = is_larger ? here : where;
        here += static_cast<int32_t>(kLanes);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) visit(widen(x + i), rounded + i);
    if (i < n) {
        float last[kLanes] = {};
        uint16_t to[kLanes];
        std::memcpy(last, x + i, (n - i) * sizeof *x);
        visit(widen(last), to);
        std::memcpy(rounded + i, to, (n - i) * sizeof *to);
    }
    uint16_t halves[kLanes];
    narrow(halves, rest);
    for (int r = 0; r < kRests; ++r) {
        const float most = _mm512_reduce_max_ps((__m512)best);
        const int lane = __builtin_ctz(_mm512_cmpeq_ps_mask((__m512)best, _mm512_set1_ps(most)));
        best[lane] = -1.0f;
        rests[r] = {where[lane] / 2, static_cast<int32_t>(halves[lane]) << (where[lane] % 2 * 16)};
    }
}

// sums[r, 0:32] += rests of row r . one panel
inline void add_rests(const Rest* rests, int64_t rows, const uint16_t* panel, float* sums) {
    for (int64_t r = 0; r < rows; ++r, rests += kRests, sums += kPanel) {
        __m512 acc0 = _mm512_loadu_ps(sums), acc1 = _mm512_loadu_ps(sums + kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kRests; ++i) {
            const uint16_t* w = panel + static_cast<int64_t>(rests[i].pair) * 2 * kPanel;
            const __m512bh both = (__m512bh)_mm512_set1_epi32(rests[i].halves);
            acc0 = _mm512_dpbf16_ps(acc0, (__m512bh)_mm512_loadu_si512(w), both);
            acc1 = _mm512_dpbf16_ps(acc1, (__m512bh)_mm512_loadu_si512(w + kPanel), both);
        }
        _mm512_storeu_ps(sums, acc0);
        _mm512_storeu_ps(sums + kLanes, acc1);
    }
}
#endif

template <typename T>
using Tile = void (*)(const T*, int64_t, const T*, int64_t, float*, int64_t, bool, const T*);

template <typename T, int R = kTile>
Tile<T> tile_of(int64_t rows) {
    if constexpr (R == 0) return nullptr;
    else return rows == R ? static_cast<Tile<T>>(tile<R>) : tile_of<T, R - 1>(rows);
}

// All rows against one panel: tiles of nearly equal height (15 rows are 8 + 7, not 14 + 1). The second fetches the
// `next` panel's part on the way, if there is one; the first where it is all there is, and all that it reads was
// fetched by the last panel's. The others have time to fetch what will be read `later`, after the product.
template <typename T>
void all_tiles(const T* x, int64_t x_row, int64_t rows, const T* w, int64_t depth, float* sums,
               int64_t sums_row, bool is_first, const T* next = nullptr, Later* later = nullptr) {
    const int64_t bytes = depth * kPanel * static_cast<int64_t>(sizeof(T)), tiles = (rows + kTile - 1) / kTile;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = t * rows / tiles, last = (t + 1) * rows / tiles;
        const void* ahead = t == (tiles > 1) ? next : later && tiles > 1 ? later->take(bytes, w) : w;
        tile_of<T>(last - first)(x + first * x_row, x_row, w, depth, sums + first * sums_row, sums_row, is_first,
                                 static_cast<const T*>(ahead ? ahead : w));
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

// The first of the largest elements of a row that were seen; nothing is larger than -infinity at 0.
struct Largest {
    float value = -__builtin_inff();
    int64_t column = 0;
};

// What one panel's sums become where only each row's largest is wanted. A thread sees its panels from left
// to right, so that of equal ones it keeps the first; hardly any panel has a larger one.
inline void see_panel(float* sums, int64_t rows, const float* bias, int64_t n, int64_t panel, Largest* best) {
    const int64_t column = panel * kPanel, width = n - column < kPanel ? n - column : kPanel;
    for (int64_t r = 0; r < rows; ++r) {
        float* sum = sums + r * kPanel;
        if (bias)
            for (int64_t c = 0; c < width; ++c) sum[c] += bias[column + c];
        const Lanes top = Lanes{} + best[r].value;
        if (width == kPanel && !is_any((widen(sum) > top) | (widen(sum + kLanes) > top))) continue;
        for (int64_t c = 0; c < width; ++c)
            if (sum[c] > best[r].value) best[r] = {sum[c], column + c};
    }
}

// Called by every thread of a parallel region; they share the panels. take(sums [rows, 32], panel) gets each.
// rests [rows, kRests], or null; `later` is this thread's, or null.
template <typename T, typename Take>
void each_panel(const T* x, int64_t x_row, const Rest* rests, int64_t rows, const T* packed, int64_t n,
                int64_t k, Later* later, Take take) {
    share(panels(n), 1, [&](int64_t p, int64_t following) {
        if (p < 0) return;
        float* sums = scratch(rows * kPanel);
        const T *panel = packed + p * kPanel * k, *next = following < 0 ? nullptr : packed + following * kPanel * k;
        for (int64_t from = 0; from < k; from += kDepth)
            all_tiles(x + from, x_row, rows, panel + from * kPanel, k - from < kDepth ? k - from : kDepth,
                      sums, kPanel, from == 0, next ? next + from * kPanel : nullptr, later);
        if constexpr (!std::is_same_v<T, float>)
            if (rests) add_rests(rests, rows, panel, sums);
        take(sums, p);
    });
}

// Likewise.
template <Into kInto, typename T, typename Y>
void multiply(const T* x, int64_t x_row, const Rest* rests, int64_t rows, const T* packed,
              const float* bias, int64_t n, int64_t k, Y* y, int64_t y_row, Later* later = nullptr) {
    each_panel(x, x_row, rests, rows, packed, n, k, later, [&](float* sums, int64_t panel) {
        put_panel<kInto>(sums, rows, bias, n, panel, y, y_row);
    });
}

// Likewise, where each row's largest product is wanted and nothing else. `best` [rows] is the threads' together
// and starts as it is made.
template <typename T>
void find_largest(const T* x, int64_t x_row, const Rest* rests, int64_t rows, const T* packed,
                  const float* bias, int64_t n, int64_t k, Largest* best) {
    std::vector<Largest> own(rows);
    each_panel(x, x_row, rests, rows, packed, n, k, nullptr,
               [&](float* sums, int64_t panel) { see_panel(sums, rows, bias, n, panel, own.data()); });
#pragma omp critical(lorary_find_largest)
    for (int64_t r = 0; r < rows; ++r)
        if (own[r].value > best[r].value || (own[r].value == best[r].value && own[r].column < best[r].column))
            best[r] = own[r];
#pragma omp barrier
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
