// Attention of one query token per sequence over its slot of the cache: each key and value is read
// once for all query heads that share it, up to the row's own length, with nothing padded.
//
// Semantics, for row r with slot s = slots[r], length n = lengths[r], query head h of KV head g:
//   w[p]   = softmax_p(cap(scale * q[r, h] . K[s, g, p]))   for p in [max(0, n - window), n)
//   out[r, h] = sum_p w[p] * V[s, g, p]
// with cap(x) = softcap * tanh(x / softcap) where softcap > 0, and no window where window = 0.

#include <cmath>
#include <vector>

#include "common.h"

namespace {

struct Shape {
    int64_t kv_heads, group, dim, context;
    int64_t q_row, q_head;  // strides of q in elements; heads' values are contiguous
    float scale, softcap;
    int64_t window;
};

template <typename T>
void one_head(const T* q, const T* k, const T* v, T* out, int64_t length, const Shape& s,
              std::vector<float>& scratch) {
    const int64_t first = s.window > 0 && length > s.window ? length - s.window : 0;
    const int64_t count = length - first;
    scratch.resize(s.group * (2 * s.dim + count));
    float* query = scratch.data();
    float* acc = query + s.group * s.dim;
    float* weight = acc + s.group * s.dim;
    for (int64_t g = 0; g < s.group; ++g)
        for (int64_t d = 0; d < s.dim; ++d) query[g * s.dim + d] = load(q + g * s.q_head + d) * s.scale;
    for (int64_t p = 0; p < count; ++p)
        for (int64_t g = 0; g < s.group; ++g)
            weight[g * count + p] = dot(query + g * s.dim, k + (first + p) * s.dim, s.dim);
    for (int64_t g = 0; g < s.group; ++g) {
        float* w = weight + g * count;
        float* a = acc + g * s.dim;
        if (s.softcap > 0.0f)
            for (int64_t p = 0; p < count; ++p) w[p] = s.softcap * std::tanh(w[p] / s.softcap);
        float largest = w[0];
        for (int64_t p = 1; p < count; ++p) largest = w[p] > largest ? w[p] : largest;
        float sum = 0.0f;
        for (int64_t p = 0; p < count; ++p) {
            w[p] = std::exp(w[p] - largest);
            sum += w[p];
        }
        for (int64_t d = 0; d < s.dim; ++d) a[d] = 0.0f;
        for (int64_t p = 0; p < count; ++p) {
            const float share = w[p] / sum;
            const T* row = v + (first + p) * s.dim;
#pragma omp simd
            for (int64_t d = 0; d < s.dim; ++d) a[d] += share * load(row + d);
        }
        for (int64_t d = 0; d < s.dim; ++d) store(out + g * s.dim + d, a[d]);
    }
}

template <typename T>
void decode(const T* q, const T* k, const T* v, T* out, const int32_t* slots, const int32_t* lengths,
            int64_t rows, const Shape& s, int threads) {
    const int64_t items = rows * s.kv_heads;
#pragma omp parallel num_threads(threads) if (items > 1 && threads > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic, 2)
        for (int64_t i = 0; i < items; ++i) {
            const int64_t row = i / s.kv_heads, head = i % s.kv_heads;
            const int64_t at = (slots[row] * s.kv_heads + head) * s.context * s.dim;
            one_head(q + row * s.q_row + head * s.group * s.q_head, k + at, v + at,
                     out + (row * s.kv_heads + head) * s.group * s.dim, lengths[row], s, scratch);
        }
    }
}

}  // namespace

extern "C" {

void lorary_decode_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out,
                        const int32_t* slots, const int32_t* lengths, int64_t rows, int64_t kv_heads,
                        int64_t group, int64_t dim, int64_t context, int64_t q_row, int64_t q_head,
                        float scale, float softcap, int64_t window, int threads) {
    const Shape s{kv_heads, group, dim, context, q_row, q_head, scale, softcap, window};
    decode(q, k, v, out, slots, lengths, rows, s, threads);
}

void lorary_decode_f32(const float* q, const float* k, const float* v, float* out,
                       const int32_t* slots, const int32_t* lengths, int64_t rows, int64_t kv_heads,
                       int64_t group, int64_t dim, int64_t context, int64_t q_row, int64_t q_head,
                       float scale, float softcap, int64_t window, int threads) {
    const Shape s{kv_heads, group, dim, context, q_row, q_head, scale, softcap, window};
    decode(q, k, v, out, slots, lengths, rows, s, threads);
}

}  // extern "C"
