// Decode attention by itself (attention.h); layer.cpp uses it inside whole layers.

#include "attention.h"

namespace {

template <typename T>
void decode(const T* q, LayerCache<const T> cache, T* out, const int32_t* slots,
            const int32_t* lengths, int64_t rows, int64_t q_row, int64_t q_head, const AttentionShape& s, int threads) {
#pragma omp parallel num_threads(threads) if (rows * s.kv_heads > 1 && threads > 1)
    attend_decode(q, q_row, q_head, cache, out, slots, lengths, rows, s);
}

}  // namespace

extern "C" {

void lorary_decode_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, const int32_t* tables,
                        int64_t width, const int32_t* slots, const int32_t* lengths, int64_t rows,
                        int64_t kv_heads, int64_t group, int64_t dim, int64_t q_row, int64_t q_head,
                        float scale, float softcap, int64_t window, int threads) {
    const AttentionShape s{kv_heads, group, dim, scale, softcap, window};
    decode(q, {k, v, tables, width}, out, slots, lengths, rows, q_row, q_head, s, threads);
}

void lorary_decode_f32(const float* q, const float* k, const float* v, float* out, const int32_t* tables,
                        int64_t width, const int32_t* slots, const int32_t* lengths, int64_t rows,
                        int64_t kv_heads, int64_t group, int64_t dim, int64_t q_row, int64_t q_head,
                        float scale, float softcap, int64_t window, int threads) {
    const AttentionShape s{kv_heads, group, dim, scale, softcap, window};
    decode(q, {k, v, tables, width}, out, slots, lengths, rows, q_row, q_head, s, threads);
}

}  // extern "C"
