// The most likely token of every row of logits.

#include "common.h"

namespace {

// The first of the largest values; 0 where nothing is larger than -infinity.
int64_t largest(const float* x, int64_t n) {
    const Lanes none = Lanes{} - __builtin_inff();
    Lanes best = none;
    LaneBits where = {}, here = {};
    for (int i = 0; i < kLanes; ++i) here[i] = i;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Lanes value = widen(x + i);
        const LaneBits is_larger = value > best;
        best = is_larger ? value : best;
        where = is_larger ? here : where;
        here += static_cast<int32_t>(kLanes);
    }
    float top = -__builtin_inff();
    int64_t at = 0;
    for (int lane = 0; lane < kLanes; ++lane)
        if (best[lane] > top || (best[lane] == top && where[lane] < at)) top = best[lane], at = where[lane];
    for (; i < n; ++i)
        if (x[i] > top) top = x[i], at = i;
    return at;
}

}  // namespace

extern "C" {

// x float32 [rows, n] by its stride -> out [rows]
void lorary_argmax_f32(const float* x, int64_t stride, int64_t rows, int64_t n, int64_t* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1 && threads > 1)
    for (int64_t r = 0; r < rows; ++r) out[r] = largest(x + r * stride, n);
}

}  // extern "C"
