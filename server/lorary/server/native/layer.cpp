// All decoder layers of the Llama kind in one call, and the norm behind them: per layer RMSNorm, q/k/v,
// rotary embedding, attention over the paged cache, output projection, RMSNorm, gated SiLU; every
// projection with its rows' adapters.
//
// The residual stream and everything between products is float32; only what enters a product is
// rounded to the weights' dtype. Called once per step, so that a step costs no interpreter time per
// operator or layer, and one team of threads goes through all of it.

#include "adapters.h"
#include "attention.h"
#include "matmul_int8.h"

namespace {

// Neighbouring projections that read the same input: packed weights, then their adapters.
struct Projection {
    const void* packed;
    const float* scales;     // of 8-bit weights, or null
    const int32_t* offsets;  // likewise
    const float* bias;       // or null
    int64_t in, out;
    const void* a;
    const void* const* b;
    const int64_t* outs;
    int64_t members, cap;
    const float* row_scales;  // or null
    int64_t storage;
};

struct Layer {
    Projection qkv, o, gate_up, down;
    const float *attention_norm, *mlp_norm;  // [hidden]
    const float *q_norm, *k_norm;            // [dim], or null
    void *k, *v;
    const int32_t* tables;  // [slots, width], every slot's blocks
    int64_t width, hidden, inner, kv_heads, group, dim, window;
    float eps, scale, softcap;
};

struct Step {
    int64_t rows, num_decode;
    const int32_t* slots;      // [rows]
    const int32_t* positions;  // [rows], in the sequence
    const int32_t* lengths;    // [num_decode]
    const Chunk* chunks;
    int64_t num_chunks;
    Mix mix;
    void* normed;      // [rows, hidden]
    float* qkv;        // [rows, qkv.out]
    void* attended;    // [rows, o.in]
    float* gate_up;    // [rows, 2 * inner]
    void* gated;       // [rows, inner]
    uint8_t* bytes;    // [rows, widest input], where weights are 8-bit
    float* scales;     // [rows, their groups], likewise
    int32_t threads;
};

// x / rms(x) * weight (Zhang & Sennrich 2019, arXiv:1910.07467).
template <typename O>
void rms_norm(const float* x, const float* weight, int64_t n, float eps, O* out) {
    Lanes squares = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) squares += widen(x + i) * widen(x + i);
    for (; i < n; ++i) squares[i % kLanes] += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(n) + eps);
    for (i = 0; i + kLanes <= n; i += kLanes) narrow(out + i, widen(x + i) * scale * widen(weight + i));
    for (; i < n; ++i) store(out + i, x[i] * scale * weight[i]);
}

// Rotary embedding of one head, in place (Su et al. 2021, arXiv:2104.09864; halves, as in Llama).
void rotate(float* x, const float* cos, const float* sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t d = 0; d < half; ++d) {
        const float a = x[d], b = x[d + half];
        x[d] = a * cos[d] - b * sin[d];
        x[d + half] = b * cos[d + half] + a * sin[d + half];
    }
}

// gate / (1 + e^-gate) * up
template <typename O>
void gated_silu(const float* gate, const float* up, int64_t n, O* out) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Lanes g = widen(gate + i);
        narrow(out + i, g / (exp_of(-g) + 1.0f) * widen(up + i));
    }
    for (; i < n; ++i) store(out + i, gate[i] / (1.0f + std::exp(-gate[i])) * up[i]);
}

// Called by every thread of a parallel region; they share the rows.
template <typename T>
void normalize(const Layer& layer, const float* weight, int64_t rows, const float* hidden, T* normed) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        rms_norm(hidden + r * layer.hidden, weight, layer.hidden, layer.eps, normed + r * layer.hidden);
}

template <typename S>
GroupPool<S> pool_of(const Projection& p) {
    return {static_cast<const S*>(p.a), reinterpret_cast<const S* const*>(p.b), p.outs, p.members, p.cap, p.in,
            p.row_scales};
}

// y (+)= x . w + bias + adapters
template <Into kInto, typename T>
void project(const Projection& p, const Step& step, const T* x, float* y) {
    if (p.scales) {
#ifdef __AVX512VNNI__
        const Int8Weight weight{static_cast<const int8_t*>(p.packed), p.scales, p.offsets};
        quantize(x, p.in, step.rows, p.in, step.bytes, step.scales);
        multiply_int8<kInto>(step.bytes, step.scales, step.rows, weight, p.bias, p.out, p.in, y, p.out);
#endif
    } else {
        multiply<kInto>(x, p.in, step.rows, static_cast<const T*>(p.packed), p.bias, p.out, p.in, y, p.out);
    }
    if (step.mix.num_rows)
        with_storage<T>(p.storage, [&](auto* kind) {
            using S = std::remove_const_t<std::remove_pointer_t<decltype(kind)>>;
            add_adapters(pool_of<S>(p), step.mix, x, y, p.out);
        });
}

// Called by every thread of a parallel region.
template <typename T>
void run(const Layer& layer, const Step& step, const float* cos, const float* sin, float* hidden) {
    const int64_t rows = step.rows, dim = layer.dim, width = layer.qkv.out;
    const int64_t heads = layer.kv_heads * layer.group;
    const AttentionShape shape{layer.kv_heads, layer.group,   dim,
                               layer.scale,    layer.softcap, layer.window};
    const LayerCache<T> cache{static_cast<T*>(layer.k), static_cast<T*>(layer.v), layer.tables,
                              layer.width};
    const LayerCache<const T> seen{cache.k, cache.v, cache.tables, cache.width};
    T* normed = static_cast<T*>(step.normed);
    T* attended = static_cast<T*>(step.attended);
    T* gated = static_cast<T*>(step.gated);
    normalize(layer, layer.attention_norm, rows, hidden, normed);
    project<Into::replace>(layer.qkv, step, normed, step.qkv);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        float* row = step.qkv + r * width;
        for (int64_t h = 0; h < heads + layer.kv_heads; ++h) {
            const float* norm = h < heads ? layer.q_norm : layer.k_norm;
            if (norm) rms_norm(row + h * dim, norm, dim, layer.eps, row + h * dim);
            rotate(row + h * dim, cos + r * dim, sin + r * dim, dim);
        }
        for (int64_t h = 0; h < layer.kv_heads; ++h) {
            const float *key = row + (heads + h) * dim, *value = key + layer.kv_heads * dim;
            const int64_t slot = step.slots[r], position = step.positions[r];
            convert(key, dim, cache.keys(slot, h, shape).at(position));
            convert(value, dim, cache.values(slot, h, shape).at(position));
        }
    }
    attend_decode(step.qkv, width, dim, seen, attended, step.slots, step.lengths, step.num_decode,
                  shape);
    attend_chunks(step.chunks, step.num_chunks, step.qkv, width, seen, attended, layer.o.in, shape);
    project<Into::add>(layer.o, step, attended, hidden);
    normalize(layer, layer.mlp_norm, rows, hidden, normed);
    project<Into::replace>(layer.gate_up, step, normed, step.gate_up);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float* gate = step.gate_up + r * 2 * layer.inner;
        gated_silu(gate, gate + layer.inner, layer.inner, gated + r * layer.inner);
    }
    project<Into::add>(layer.down, step, gated, hidden);
}

// The layers, then the last norm of the rows whose logits are wanted: out [num_wanted, hidden].
template <typename T>
void run_all(const Layer* const* layers, int64_t count, const Step& step, const float* cos, const float* sin,
             float* hidden, const float* norm, const int64_t* wanted, int64_t num_wanted, T* out) {
    const int64_t width = layers[0]->hidden;
    const float eps = layers[0]->eps;
#pragma omp parallel num_threads(step.threads) if (step.threads > 1)
    {
        for (int64_t i = 0; i < count; ++i) run<T>(*layers[i], step, cos, sin, hidden);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < num_wanted; ++r)
            rms_norm(hidden + wanted[r] * width, norm, width, eps, out + r * width);
    }
}

}  // namespace

extern "C" {

// Size of the two structures, for the caller to compare with its own.
int64_t lorary_layer_bytes() { return sizeof(Layer); }
int64_t lorary_step_bytes() { return sizeof(Step); }

// Run the layers over the step's rows: hidden float32 [rows, hidden], in place; cos and sin float32
// [rows, dim]. Writes the rows' keys and values into the layers' caches.
void lorary_layers_f32(const Layer* const* layers, int64_t count, const Step* step, const float* cos,
                       const float* sin, float* hidden, const float* norm, const int64_t* wanted,
                       int64_t num_wanted, float* out) {
    run_all(layers, count, *step, cos, sin, hidden, norm, wanted, num_wanted, out);
}

#ifdef __AVX512BF16__
void lorary_layers_bf16(const Layer* const* layers, int64_t count, const Step* step, const float* cos,
                        const float* sin, float* hidden, const float* norm, const int64_t* wanted,
                        int64_t num_wanted, uint16_t* out) {
    run_all(layers, count, *step, cos, sin, hidden, norm, wanted, num_wanted, out);
}
#endif

}  // extern "C"
