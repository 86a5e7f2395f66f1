// Loads and stores of the two dtypes; all arithmetic is float32.
#pragma once

#include <cstdint>
#include <cstring>

inline float load(const float* p) { return *p; }
inline float load(const uint16_t* p) {
    uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
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

inline Lanes widen(const float* p) {
    Lanes lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
}
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

template <typename T>
float dot(const float* x, const T* a, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += x[i] * load(a + i);
    return sum;
}
