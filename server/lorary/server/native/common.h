// Loads and stores of the dtypes, loads of 8-bit numbers, and 16 floats side by side; all arithmetic is
// float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

inline float load(const float* p) { return *p; }
inline float load(const uint16_t* p) {
    uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float load(const int8_t* p) { return *p; }
inline void store(float* p, float value) { *p = value; }
inline void store(uint16_t* p, float value) {  // round to nearest, ties to even; inputs are finite
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    *p = static_cast<uint16_t>(bits >> 16);
}

// 16 floats side by side: one AVX-512 register, or whatever the compiler makes of it elsewhere.
constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t LaneBits __attribute__((vector_size(64)));

inline Lanes widen(const float* p) {
    Lanes lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
}
#ifdef __AVX512F__
// Said outright where the compiler would make each of two halves, which takes three times the instructions.
inline Lanes widen(const uint16_t* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return (Lanes)_mm512_slli_epi32(bits, 16);
}
inline Lanes widen(const int8_t* p) {
    return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#else
inline Lanes widen(const uint16_t* p) {
    typedef uint16_t Halves __attribute__((vector_size(32)));
    typedef uint32_t Bits __attribute__((vector_size(64)));
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    const Bits bits = __builtin_convertvector(halves, Bits) << 16;
    Lanes lanes;
    std::memcpy(&lanes, &bits, sizeof lanes);
    return lanes;
}
inline Lanes widen(const int8_t* p) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, Lanes);
}
#endif
inline void narrow(float* p, Lanes lanes) { std::memcpy(p, &lanes, sizeof lanes); }
inline void narrow(uint16_t* p, Lanes lanes) {
    typedef uint16_t Halves __attribute__((vector_size(32)));
    typedef uint32_t Bits __attribute__((vector_size(64)));
    Bits bits;
    std::memcpy(&bits, &lanes, sizeof bits);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    const Halves halves = __builtin_convertvector(bits >> 16, Halves);
    std::memcpy(p, &halves, sizeof halves);
}

#ifdef __AVX512F__
// An IEEE float16, what keys and values of a bfloat16 base are kept in: 11 significant bits where
// bfloat16 has 8. What is beyond its range becomes the largest that it holds, 65504.
struct Half {
    uint16_t bits;
};
inline Lanes widen(const Half* p) {
    return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void narrow(Half* p, Lanes lanes) {
    const Lanes most = Lanes{} + 65504.0f;
    lanes = lanes > most ? most : lanes;
    lanes = lanes < -most ? -most : lanes;
    const __m256i halves = _mm512_cvtps_ph((__m512)lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
inline float load(const Half* p) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(p->bits))); }
inline void store(Half* p, float value) {
    Half all[kLanes];
    narrow(all, Lanes{} + value);
    *p = all[0];
}
#endif

template <typename From, typename To>
void convert(const From* from, int64_t n, To* to) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) narrow(to + i, widen(from + i));
    for (; i < n; ++i) store(to + i, load(from + i));
}

// Ask for memory that will be read soon: stretches of a few KB here and there are too short for the
// hardware to see them coming.
template <typename T>
void fetch(const T* from, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i, 0, 2);
}

// Whether any lane of a comparison is true.
inline bool is_any(LaneBits mask) {
    int64_t halves[8], all = 0;
    std::memcpy(halves, &mask, sizeof halves);
    for (const int64_t half : halves) all |= half;
    return all != 0;
}

// The sum of all lanes, halves upon halves.
inline float sum_of(Lanes lanes) {
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    Half h[2];
    std::memcpy(h, &lanes, sizeof h);
    const Half half = h[0] + h[1];
    Quarter q[2];
    std::memcpy(q, &half, sizeof q);
    const Quarter sum = q[0] + q[1];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// The sums of all lanes of four, each to the bit what sum_of makes of it: halves, quarters and pairs of all four
// are added side by side.
inline void sums_of(const Lanes* four, float* out) {
#ifdef __AVX512F__
    const auto fold = [](Lanes a, Lanes b) {
        return (Lanes)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44) +
               (Lanes)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee);
    };
    const __m512 low = (__m512)fold(four[0], four[1]), high = (__m512)fold(four[2], four[3]);
    Lanes quarters = (Lanes)_mm512_shuffle_f32x4(low, high, 0x88) + (Lanes)_mm512_shuffle_f32x4(low, high, 0xdd);
    quarters += (Lanes)_mm512_permute_ps((__m512)quarters, 0x4e);
    quarters += (Lanes)_mm512_permute_ps((__m512)quarters, 0xb1);
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, (__m512)quarters)));
#else
    for (int i = 0; i < 4; ++i) out[i] = sum_of(four[i]);
#endif
}

// The largest of n numbers; -infinity of none.
inline float largest_of(const float* x, int64_t n) {
    float most = -__builtin_inff();
    Lanes best = Lanes{} + most;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) best = widen(x + i) > best ? widen(x + i) : best;
    for (int lane = 0; lane < kLanes; ++lane) most = best[lane] > most ? best[lane] : most;
    for (; i < n; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

// e^x: 2^n times a polynomial of the rest (Cephes' expf), within 2 units of the last place; exactly 0
// below -87.3 (-infinity included), no more than e^88 above 88.
inline Lanes exp_of(Lanes x) {
    const Lanes low = Lanes{} - 87.3f, high = Lanes{} + 88.0f;
    const auto is_nothing = x < low;
    x = is_nothing ? low : x;
    x = x > high ? high : x;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    const Lanes shifted = x * 1.44269504088896341f + 12582912.0f;
    const Lanes n = shifted - 12582912.0f;
    const Lanes r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    LaneBits power;
    std::memcpy(&power, &shifted, sizeof power);
    LaneBits bits;
    std::memcpy(&bits, &p, sizeof bits);
    bits += power << 23;
    std::memcpy(&p, &bits, sizeof p);
    return is_nothing ? Lanes{} : p;
}

// tanh x (Cephes' tanhf), within 2 units of the last place: an odd polynomial near 0, where 1 - 2 / (e^2x + 1)
// would leave few digits.
inline Lanes tanh_of(Lanes x) {
    const Lanes size = x < 0.0f ? -x : x, square = x * x;
    Lanes p = square * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    p = p * square * x + x;
    const Lanes far = 1.0f - 2.0f / (exp_of(size + size) + 1.0f);
    return size < 0.625f ? p : x < 0.0f ? -far : far;
}

// x[i] = f(x[i]) for n elements, the last ones among zeros, so that a result does not depend on its place.
template <typename F>
void over_lanes(float* x, int64_t n, F f) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) narrow(x + i, f(widen(x + i)));
    if (i < n) {
        float last[kLanes] = {};
        std::memcpy(last, x + i, (n - i) * sizeof *x);
        narrow(last, f(widen(last)));
        std::memcpy(x + i, last, (n - i) * sizeof *x);
    }
}

// Memory of one thread that lives as long as the thread: 64-byte aligned, contents undefined.
inline float* scratch(int64_t floats) {
    static thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < floats + kLanes) memory.resize(floats + kLanes);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + ((64 - address % 64) % 64) / sizeof(float);
}
inline int64_t aligned(int64_t floats) { return (floats + kLanes - 1) / kLanes * kLanes; }
