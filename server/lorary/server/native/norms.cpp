// Lengths of a packed weight's rows with a change of low rank: what DoRA's magnitudes are divided by.
//
// Semantics: norms[i] = |w[first + i, :] + sum_r b[i, r] * a[r, :]|, in float32, with w as it is multiplied.
// A panel is 32 outputs side by side in registers, so that the sum is never written anywhere.

#include <algorithm>
#include <cmath>

#include "matmul_int8.h"

namespace {

// Inputs that are under way at once; a multiple of what a packed layout keeps together.
constexpr int64_t kInputs = 8;
// Inputs that share a scale in 8 bits, as in matmul_int8.h, which is not there on every CPU.
constexpr int64_t kScaled = 64;

// Outputs h * 16 to h * 16 + 15 of a panel at input i. In bfloat16 a pair of inputs, in 8 bits four of
// them, are one 32-bit number for each output.
inline Lanes at(const float* panel, int64_t i, int64_t h) { return widen(panel + i * kPanel + h * kLanes); }
inline LaneBits together(const void* panel, int64_t number, int64_t h) {
    LaneBits bits;
    std::memcpy(&bits, static_cast<const int32_t*>(panel) + number * kPanel + h * kLanes, sizeof bits);
    return bits;
}
inline Lanes at(const uint16_t* panel, int64_t i, int64_t h) {
    const LaneBits both = together(panel, i / 2, h);
    const LaneBits bits = i % 2 ? both & static_cast<int32_t>(0xffff0000) : both << 16;
    Lanes lanes;
    std::memcpy(&lanes, &bits, sizeof lanes);
    return lanes;
}
inline Lanes at(const int8_t* panel, int64_t i, int64_t h) {
    const LaneBits four = together(panel, i / 4, h);
    return __builtin_convertvector(four << (24 - i % 4 * 8) >> 24, Lanes);
}

// Squares of N inputs from i on, summed into total[2].
template <int N, typename W>
void add_squares(const W* panel, const float* scales, int64_t i, const float* a, int64_t k, const float* b,
                 int64_t rank, Lanes* total) {
    Lanes sum[N][2];
    for (int j = 0; j < N; ++j)
        for (int h = 0; h < 2; ++h) {
            sum[j][h] = at(panel, i + j, h);
            if (scales) sum[j][h] *= widen(scales + (i + j) / kScaled * kPanel + h * kLanes);
        }
    for (int64_t r = 0; r < rank; ++r) {
        const Lanes b0 = widen(b + r * kPanel), b1 = widen(b + r * kPanel + kLanes);
        const float* some_a = a + r * k + i;
        for (int j = 0; j < N; ++j) {
            sum[j][0] += b0 * some_a[j];
            sum[j][1] += b1 * some_a[j];
        }
    }
    for (int h = 0; h < 2; ++h) {
        Lanes squares = {};
        for (int j = 0; j < N; ++j) squares += sum[j][h] * sum[j][h];
        total[h] += squares;
    }
}

// Rows [first, first + count) of w, whose panels are `depth` inputs long; scales [panels, groups, 32] or null.
template <typename W>
void norms(const W* packed, const float* scales, int64_t depth, int64_t k, int64_t first, int64_t count,
           const float* a, const float* b, int64_t rank, float* out, int threads) {
    const int64_t from = first / kPanel, to = panels(first + count);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = from; p < to; ++p) {
        // Columns of this panel; those that belong to others stay zeros, and their lengths are dropped.
        float* columns = scratch(rank * kPanel);
        std::fill(columns, columns + rank * kPanel, 0.0f);
        const int64_t low = std::max(first, p * kPanel), high = std::min(first + count, (p + 1) * kPanel);
        for (int64_t row = low; row < high; ++row)
            for (int64_t r = 0; r < rank; ++r)
                columns[r * kPanel + row - p * kPanel] = b[(row - first) * rank + r];
        const W* panel = packed + p * kPanel * depth;
        const float* own = scales ? scales + p * ((k + kScaled - 1) / kScaled) * kPanel : nullptr;
        Lanes total[2] = {};
        int64_t i = 0;
        for (; i + kInputs <= k; i += kInputs)
            add_squares<kInputs>(panel, own, i, a, k, columns, rank, total);
        for (; i < k; ++i) add_squares<1>(panel, own, i, a, k, columns, rank, total);
        float squares[kPanel];
        for (int h = 0; h < 2; ++h) narrow(squares + h * kLanes, total[h]);
        for (int64_t row = low; row < high; ++row) out[row - first] = std::sqrt(squares[row - p * kPanel]);
    }
}

}  // namespace

extern "C" {

void lorary_norms_f32(const float* packed, const float*, int64_t k, int64_t first, int64_t count,
                      const float* a, const float* b, int64_t rank, float* out, int threads) {
    norms(packed, nullptr, k, k, first, count, a, b, rank, out, threads);
}

void lorary_norms_bf16(const uint16_t* packed, const float*, int64_t k, int64_t first, int64_t count,
                       const float* a, const float* b, int64_t rank, float* out, int threads) {
    norms(packed, nullptr, k, k, first, count, a, b, rank, out, threads);
}

void lorary_norms_int8(const int8_t* packed, const float* scales, int64_t k, int64_t first, int64_t count,
                       const float* a, const float* b, int64_t rank, float* out, int threads) {
    norms(packed, scales, (k + 3) / 4 * 4, k, first, count, a, b, rank, out, threads);
}

}  // extern "C"
