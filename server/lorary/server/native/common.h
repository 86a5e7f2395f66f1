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

template <typename T>
float dot(const float* x, const T* a, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += x[i] * load(a + i);
    return sum;
}
