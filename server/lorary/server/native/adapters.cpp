// The mixed-adapter product by itself (adapters.h); layer.cpp uses it inside whole layers.

#include "adapters.h"

namespace {

template <typename T>
void add_rows(const T* x, T* y, const void* a, const void* const* b, const int64_t* outs, int64_t members,
              int64_t cap, int64_t in, int64_t y_row, const float* row_scales, int64_t storage,
              const float* bias, const Mix& mix, int threads) {
    const bool is_one = mix.num_rows * members == 1;
    with_storage<T>(storage, [&](auto* kind) {
        using Pointer = decltype(kind);
        using S = std::remove_const_t<std::remove_pointer_t<Pointer>>;
        const GroupPool<S> pool{static_cast<Pointer>(a), reinterpret_cast<const Pointer*>(b), outs, members,
                                cap, in, row_scales, bias};
#pragma omp parallel num_threads(threads) if (threads > 1 && !is_one)
        add_adapters(Parts<S>(pool, mix), x, y, y_row);
    });
}

}  // namespace

extern "C" {

// Bumped whenever a signature in this folder changes; the loader refuses any other.
int lorary_abi() { return 16; }

void lorary_add_rows_bf16(const uint16_t* x, uint16_t* y, const void* a, const void* const* b,
                          const int64_t* outs, int64_t members, int64_t cap, int64_t in, int64_t y_row,
                          const float* row_scales, int64_t storage, const float* bias, const int32_t* rows,
                          const int32_t* entry, const int32_t* rank_indptr, const int32_t* rank_rows,
                          const float* rank_scales, const int32_t* columns, int64_t num_rows, int threads) {
    const Mix mix{rows, entry, rank_indptr, rank_rows, rank_scales, columns, num_rows};
    add_rows(x, y, a, b, outs, members, cap, in, y_row, row_scales, storage, bias, mix, threads);
}

void lorary_add_rows_f32(const float* x, float* y, const void* a, const void* const* b,
                         const int64_t* outs, int64_t members, int64_t cap, int64_t in, int64_t y_row,
                         const float* row_scales, int64_t storage, const float* bias, const int32_t* rows,
                         const int32_t* entry, const int32_t* rank_indptr, const int32_t* rank_rows,
                         const float* rank_scales, const int32_t* columns, int64_t num_rows, int threads) {
    const Mix mix{rows, entry, rank_indptr, rank_rows, rank_scales, columns, num_rows};
    add_rows(x, y, a, b, outs, members, cap, in, y_row, row_scales, storage, bias, mix, threads);
}

}  // extern "C"
