// A decoder of the Llama kind but for its head, in one call: embeddings, layers, last norm; per layer
// RMSNorm, q/k/v, rotary embedding, attention over the paged cache, output projection, RMSNorm, gated SiLU; every
// projection with its rows' adapters.
//
// The residual stream and everything between products is float32; only what enters a product is
// rounded to the weights' dtype, and keys and values to what the cache keeps. Called once per step, so that a step costs no interpreter time per
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

// What a model with weights of T keeps keys and values in; decoder.py says why.
template <typename T>
struct CacheOf {
    using Kept = T;
};
#ifdef __AVX512F__
template <>
struct CacheOf<uint16_t> {
    using Kept = Half;
};
#endif

struct Model {
    const Layer* const* layers;
    int64_t count;
    const void* embeddings;   // [vocabulary, hidden]
    const float *cos, *sin;   // [positions, dim]
    const float* norm;        // [hidden]
};

struct Step {
    int64_t rows, num_decode;
    const int64_t* tokens;     // [rows]
    const int64_t* angles;     // [rows], whose row of cos and sin; null: each has its own
    const int32_t* slots;      // [rows]
    const int32_t* positions;  // [rows], in the sequence
    const int32_t* lengths;    // [num_decode]
    const Chunk* chunks;
    int64_t num_chunks;
    const int64_t* wanted;     // [num_wanted], rows that the head reads
    int64_t num_wanted;
    float* out;                // [num_wanted, hidden]
    Mix mix;
    float* hidden;     // [rows, hidden], the residual stream
    void* rounded;     // [rows, widest input], what enters a product
    Rest* rests;       // [rows, kRests], what rounding it left
    float* qkv;        // [rows, qkv.out]
    float* attended;   // [rows, o.in]
    float* gate_up;    // [rows, 2 * inner]
    uint8_t* bytes;    // [rows, widest input], where weights are 8-bit
    float* scales;     // [rows, their groups], likewise
    float* aside;      // [rows, hidden], of rows with column scales: the residual stream meanwhile
    int32_t threads;
};

// x / rms(x) * weight (Zhang & Sennrich 2019, arXiv:1910.07467).
void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    Lanes squares = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) squares += widen(x + i) * widen(x + i);
    for (; i < n; ++i) squares[i % kLanes] += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(n) + eps);
    for (i = 0; i + kLanes <= n; i += kLanes) narrow(out + i, widen(x + i) * scale * widen(weight + i));
    for (; i < n; ++i) out[i] = x[i] * scale * weight[i];
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

// gate / (1 + e^-gate) * up, into `gate`
void gated_silu(float* gate, const float* up, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Lanes g = widen(gate + i);
        narrow(gate + i, g / (exp_of(-g) + 1.0f) * widen(up + i));
    }
    for (; i < n; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

// Called by every thread of a parallel region; they share the rows. make(r) returns row r, float32 [n],
// which then is what enters the next product.
template <typename T, typename Make>
void enter(const Step& step, int64_t n, Make make) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < step.rows; ++r)
        round_row(make(r), n, static_cast<T*>(step.rounded) + r * n, step.rests + r * kRests);
}

// Likewise, of the residual stream.
template <typename T>
void normalize(const Layer& layer, const float* weight, const Step& step, const float* hidden) {
    enter<T>(step, layer.hidden, [&](int64_t r) {
        float* row = scratch(layer.hidden);
        rms_norm(hidden + r * layer.hidden, weight, layer.hidden, layer.eps, row);
        return row;
    });
}

template <typename S>
GroupPool<S> pool_of(const Projection& p) {
    return {static_cast<const S*>(p.a), reinterpret_cast<const S* const*>(p.b), p.outs, p.members, p.cap, p.in,
            p.row_scales, p.bias};
}

// Called by every thread of a parallel region. Rows with column scales get a product of their own to scale:
// the residual stream, which others are added to, waits aside.
void set_aside(const Step& step, float* y, int64_t n) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < step.mix.num_rows; ++i) {
        if (!has_columns(step.mix, i)) continue;
        const int64_t at = step.mix.rows[i] * n;
        std::memcpy(step.aside + at, y + at, n * sizeof *y);
        std::memset(y + at, 0, n * sizeof *y);
    }
}

// y (+)= x . w + bias + adapters, x being what has entered
template <Into kInto, typename T>
void project(const Projection& p, const Step& step, float* y) {
    const T* x = static_cast<const T*>(step.rounded);
    const bool is_aside = kInto == Into::add && step.mix.columns;
    if (is_aside) set_aside(step, y, p.out);
    if (p.scales) {
#ifdef __AVX512VNNI__
        const Int8Weight weight{static_cast<const int8_t*>(p.packed), p.scales, p.offsets};
        quantize(x, p.in, step.rows, p.in, step.bytes, step.scales);
        multiply_int8<kInto>(step.bytes, step.scales, step.rows, weight, p.bias, p.out, p.in, y, p.out);
#endif
    } else {
        multiply<kInto>(x, p.in, step.rests, step.rows, static_cast<const T*>(p.packed), p.bias, p.out, p.in, y, p.out);
    }
    if (step.mix.num_rows)
        with_storage<T>(p.storage, [&](auto* kind) {
            using S = std::remove_const_t<std::remove_pointer_t<decltype(kind)>>;
            add_adapters(pool_of<S>(p), step.mix, x, y, p.out, is_aside ? step.aside : nullptr);
        });
}

// Called by every thread of a parallel region.
template <typename T>
void run(const Layer& layer, const Model& model, const Step& step) {
    float* hidden = step.hidden;
    const int64_t rows = step.rows, dim = layer.dim, width = layer.qkv.out;
    const int64_t heads = layer.kv_heads * layer.group;
    const AttentionShape shape{layer.kv_heads, layer.group,   dim,
                               layer.scale,    layer.softcap, layer.window};
    using Kept = typename CacheOf<T>::Kept;
    const LayerCache<Kept> cache{static_cast<Kept*>(layer.k), static_cast<Kept*>(layer.v), layer.tables,
                                 layer.width};
    const LayerCache<const Kept> seen{cache.k, cache.v, cache.tables, cache.width};
    normalize<T>(layer, layer.attention_norm, step, hidden);
    project<Into::replace, T>(layer.qkv, step, step.qkv);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        float* row = step.qkv + r * width;
        const int64_t angle = (step.angles ? step.angles[r] : r) * dim;
        for (int64_t h = 0; h < heads + layer.kv_heads; ++h) {
            const float* norm = h < heads ? layer.q_norm : layer.k_norm;
            if (norm) rms_norm(row + h * dim, norm, dim, layer.eps, row + h * dim);
            rotate(row + h * dim, model.cos + angle, model.sin + angle, dim);
        }
        for (int64_t h = 0; h < layer.kv_heads; ++h) {
            const float *key = row + (heads + h) * dim, *value = key + layer.kv_heads * dim;
            const int64_t slot = step.slots[r], position = step.positions[r];
            convert(key, dim, cache.keys(slot, h, shape).at(position));
            convert(value, dim, cache.values(slot, h, shape).at(position));
        }
    }
    attend_decode(step.qkv, width, dim, seen, step.attended, step.slots, step.lengths, step.num_decode,
                  shape);
    attend_chunks(step.chunks, step.num_chunks, step.qkv, width, seen, step.attended, layer.o.in, shape);
    enter<T>(step, layer.o.in, [&](int64_t r) { return step.attended + r * layer.o.in; });
    project<Into::add, T>(layer.o, step, hidden);
    normalize<T>(layer, layer.mlp_norm, step, hidden);
    project<Into::replace, T>(layer.gate_up, step, step.gate_up);
    enter<T>(step, layer.inner, [&](int64_t r) {
        float* gate = step.gate_up + r * 2 * layer.inner;
        gated_silu(gate, gate + layer.inner, layer.inner);
        return gate;
    });
    project<Into::add, T>(layer.down, step, hidden);
}

template <typename T>
void run_all(const Model& model, const Step& step) {
    const int64_t width = model.layers[0]->hidden;
    const float eps = model.layers[0]->eps;
    const T* embeddings = static_cast<const T*>(model.embeddings);
#pragma omp parallel num_threads(step.threads) if (step.threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < step.rows; ++r)
            convert(embeddings + step.tokens[r] * width, width, step.hidden + r * width);
        for (int64_t i = 0; i < model.count; ++i) run<T>(*model.layers[i], model, step);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < step.num_wanted; ++r)
            rms_norm(step.hidden + step.wanted[r] * width, model.norm, width, eps, step.out + r * width);
    }
}

}  // namespace

extern "C" {

// Size of the structures, for the caller to compare with its own.
int64_t lorary_layer_bytes() { return sizeof(Layer); }
int64_t lorary_model_bytes() { return sizeof(Model); }
int64_t lorary_step_bytes() { return sizeof(Step); }

// Run a step, with the model's weights in float32 or bfloat16: writes `out` and the rows' keys and values.
void lorary_layers_f32(const Model* model, const Step* step) { run_all<float>(*model, *step); }

#ifdef __AVX512BF16__
void lorary_layers_bf16(const Model* model, const Step* step) { run_all<uint16_t>(*model, *step); }
#endif

}  // extern "C"
