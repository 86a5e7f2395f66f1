// Packed products by themselves (matmul.h, matmul_int8.h); layer.cpp uses them inside whole layers.

#include "matmul_int8.h"

namespace {

template <typename T, typename Y>
void linear(const T* x, int64_t x_row, int64_t rows, const T* packed, const float* bias, int64_t n,
            int64_t k, Y* y, int64_t y_row, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    multiply<Into::replace>(x, x_row, nullptr, rows, packed, bias, n, k, y, y_row);
}

// Round float32 rows to T; every thread of a team then calls take(rounded [rows, k], rests [rows, kRests]).
template <typename T, typename Take>
void with_rounded(const float* x, int64_t x_row, int64_t rows, int64_t k, int threads, Take take) {
    std::vector<T> rounded(rows * k);
    std::vector<Rest> rests(rows * kRests);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r)
            round_row(x + r * x_row, k, rounded.data() + r * k, rests.data() + r * kRests);
        take(rounded.data(), rests.data());
    }
}

#ifdef __AVX512BF16__
void linear_with_rests(const float* x, int64_t x_row, int64_t rows, const uint16_t* packed,
                       const float* bias, int64_t n, int64_t k, float* y, int64_t y_row, int threads) {
    with_rounded<uint16_t>(x, x_row, rows, k, threads, [&](const uint16_t* rounded, const Rest* rests) {
        multiply<Into::replace>(rounded, k, rests, rows, packed, bias, n, k, y, y_row);
    });
}
#endif

// x float32, rounded to the weights' dtype -> the column of each row's largest product
template <typename T>
void largest(const float* x, int64_t x_row, int64_t rows, const T* packed, const float* bias, int64_t n,
             int64_t k, int64_t* found, int threads) {
    std::vector<Largest> best(rows);
    with_rounded<T>(x, x_row, rows, k, threads, [&](const T* rounded, const Rest* rests) {
        find_largest(rounded, k, rests, rows, packed, bias, n, k, best.data());
    });
    for (int64_t r = 0; r < rows; ++r) found[r] = best[r].column;
}

#ifdef __AVX512VNNI__
template <typename T, typename Y>
void linear_int8(const T* x, int64_t x_row, int64_t rows, const Int8Weight& weight, const float* bias,
                 int64_t n, int64_t k, Y* y, int64_t y_row, int threads) {
    std::vector<uint8_t> bytes(rows * quads(k));
    std::vector<float> scales(rows * groups(k));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        quantize(x, x_row, rows, k, bytes.data(), scales.data());
        multiply_int8<Into::replace>(bytes.data(), scales.data(), rows, weight, bias, n, k, y, y_row);
    }
}
#endif

}  // namespace

extern "C" {

// Whether this build has the product in bfloat16; without it the caller keeps to torch.
int lorary_has_bf16() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

int lorary_has_int8() {
#ifdef __AVX512VNNI__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512VNNI__
void lorary_pack_int8(const int8_t* w, int64_t n, int64_t k, int8_t* packed, int threads) {
    pack_int8(w, n, k, packed, threads);
}

void lorary_linear_int8_bf16(const uint16_t* x, int64_t x_row, int64_t rows, const int8_t* packed,
                             const float* scales, const int32_t* offsets, const float* bias, int64_t n,
                             int64_t k, uint16_t* y, int64_t y_row, int threads) {
    linear_int8(x, x_row, rows, {packed, scales, offsets}, bias, n, k, y, y_row, threads);
}

void lorary_linear_int8_f32(const float* x, int64_t x_row, int64_t rows, const int8_t* packed,
                            const float* scales, const int32_t* offsets, const float* bias, int64_t n,
                            int64_t k, float* y, int64_t y_row, int threads) {
    linear_int8(x, x_row, rows, {packed, scales, offsets}, bias, n, k, y, y_row, threads);
}
#endif

void lorary_pack_f32(const float* w, int64_t w_row, int64_t n, int64_t k, float* packed, int threads) {
    pack(w, w_row, n, k, packed, threads);
}

void lorary_linear_f32(const float* x, int64_t x_row, int64_t rows, const float* packed,
                       const float* bias, int64_t n, int64_t k, float* y, int64_t y_row, int threads) {
    linear(x, x_row, rows, packed, bias, n, k, y, y_row, threads);
}

// The product is made as lorary_linear_f32 makes it, and not kept: found [rows] is where it is largest first.
void lorary_largest_f32(const float* x, int64_t x_row, int64_t rows, const float* packed, const float* bias,
                        int64_t n, int64_t k, int64_t* found, int threads) {
    largest(x, x_row, rows, packed, bias, n, k, found, threads);
}

#ifdef __AVX512BF16__
// Likewise, as lorary_linear_f32_bf16 does.
void lorary_largest_bf16(const float* x, int64_t x_row, int64_t rows, const uint16_t* packed,
                         const float* bias, int64_t n, int64_t k, int64_t* found, int threads) {
    largest(x, x_row, rows, packed, bias, n, k, found, threads);
}

void lorary_pack_bf16(const uint16_t* w, int64_t w_row, int64_t n, int64_t k, uint16_t* packed,
                      int threads) {
    pack(w, w_row, n, k, packed, threads);
}

void lorary_linear_bf16(const uint16_t* x, int64_t x_row, int64_t rows, const uint16_t* packed,
                        const float* bias, int64_t n, int64_t k, uint16_t* y, int64_t y_row,
                        int threads) {
    linear(x, x_row, rows, packed, bias, n, k, y, y_row, threads);
}

// The weights are bfloat16, the rows are not.
void lorary_linear_f32_bf16(const float* x, int64_t x_row, int64_t rows, const uint16_t* packed,
                            const float* bias, int64_t n, int64_t k, float* y, int64_t y_row,
                            int threads) {
    linear_with_rests(x, x_row, rows, packed, bias, n, k, y, y_row, threads);
}
#endif

}  // extern "C"
