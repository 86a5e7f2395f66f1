// A decoder but for its head, in one call: embeddings (or what the cache keeps of a lower layer's output), layers,
// last norm; every projection with its rows' adapters. A layer is, with x the residual stream of a row:
//
//   h  = attention_norm(x)
//   x += residual * attention_after(o . attend(q_norm, k_norm, rotary, v of qkv . h))
//   h' = mlp_norm(x), or h where the two are parallel
//   x += residual * mlp_after(down . (f(gate . h') * (up . h')))      or f(up . h') without a gate
//
// A norm is RMSNorm or LayerNorm, and what a family has none of is left out: a null weight, rotation -1,
// softcap 0. families.py says what each family has; nothing here knows of families.
//
// The residual stream and everything between products is float32; only what enters a product is
// rounded to the weights' dtype, and keys and values to what the cache keeps. Called once per step, so that
// a step costs no interpreter time per operator or layer, and one team of threads goes through all of it.

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

// What enters is left as it is where `weight` is null.
struct Norm {
    const float *weight, *bias;  // [n]; bias null: none
    float eps;
    int32_t is_centred;  // LayerNorm; else RMSNorm
};

// f in the formula above; families.py has the same numbers.
enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kRelu = 2 };

struct Layer {
    Projection qkv, o, up, down;  // `up` has the gate's outputs first, where there is one
    Norm attention_norm, attention_after, mlp_norm, mlp_after;  // [hidden]
    Norm q_norm, k_norm;  // [dim]; [all heads' dims] where they are wide
    void *k, *v;
    const int32_t* tables;  // [slots, width], every slot's blocks
    int64_t width, hidden, inner, kv_heads, group, dim, window;
    int64_t rotation;  // which of the model's rotary tables
    int64_t activation, is_parallel, has_wide_norms;
    float scale, softcap, residual;
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

// Tables of a rotary embedding of each head's first `dim` elements.
struct Rotation {
    const float *cos, *sin;  // [positions, dim]
    int64_t dim;
    int64_t is_interleaved;  // pairs are neighbours, as in GPT-J; else halves apart, as in Llama
};

struct Model {
    const Layer* const* layers;
    int64_t count;
    const void* embeddings;  // [vocabulary, hidden]
    const void* positions;   // [positions, hidden], added to the embeddings; or null
    const Rotation* rotations;
    float* residuals;  // [blocks, kCacheBlock, hidden], the stream that layer `shared` reads; or null
    int64_t shared;
    Norm norm;  // [hidden]
    float embedding_scale;
};

struct Step {
    int64_t rows, num_decode;
    int64_t first;             // layer to begin at: 0 with embeddings, or `shared` with residuals
    const int64_t* tokens;     // [rows]
    const int64_t* angles;     // [rows], whose row of the tables of positions; null: each has its own
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
    float* up;         // [rows, up.out]
    uint8_t* bytes;    // [rows, widest input], where weights are 8-bit
    float* scales;     // [rows, their groups], likewise
    // [rows, hidden], of rows with column scales: the residual stream meanwhile; or what is to be
    // normed or scaled before it is added to that.
    float* aside;
    int32_t threads;
};

// x / rms(x) * weight (Zhang & Sennrich 2019, arXiv:1910.07467).
void rms_norm(const float* x, const Norm& norm, int64_t n, float* out) {
    Lanes squares = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) squares += widen(x + i) * widen(x + i);
    for (; i < n; ++i) squares[i % kLanes] += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(n) + norm.eps);
    const float* weight = norm.weight;
    for (i = 0; i + kLanes <= n; i += kLanes) narrow(out + i, widen(x + i) * scale * widen(weight + i));
    for (; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

// (x - mean(x)) / sd(x) * weight + bias (Ba et al. 2016, arXiv:1607.06450).
void layer_norm(const float* x, const Norm& norm, int64_t n, float* out) {
    Lanes sums = {}, squares = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) sums += widen(x + i);
    for (; i < n; ++i) sums[i % kLanes] += x[i];
    const float mean = sum_of(sums) / static_cast<float>(n);
    for (i = 0; i + kLanes <= n; i += kLanes) {
        const Lanes off = widen(x + i) - mean;
        squares += off * off;
    }
    for (; i < n; ++i) squares[i % kLanes] += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(n) + norm.eps);
    const float *weight = norm.weight, *bias = norm.bias;
    for (i = 0; i + kLanes <= n; i += kLanes) {
        const Lanes value = (widen(x + i) - mean) * scale * widen(weight + i);
        narrow(out + i, bias ? value + widen(bias + i) : value);
    }
    for (; i < n; ++i) out[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f);
}

// Of a norm that is there; in place is fine.
void normalize(const Norm& norm, const float* x, int64_t n, float* out) {
    if (norm.is_centred) {
        layer_norm(x, norm, n, out);
    } else {
        rms_norm(x, norm, n, out);
    }
}

// Rotary embedding of one head at a position, in place (Su et al. 2021, arXiv:2104.09864).
void rotate(float* x, const Rotation& rotation, int64_t position) {
    const int64_t half = rotation.dim / 2;
    const float *cos = rotation.cos + position * rotation.dim, *sin = rotation.sin + position * rotation.dim;
    const auto turn = [&](int64_t i, int64_t j) {
        const float a = x[i], b = x[j];
        x[i] = a * cos[i] - b * sin[i];
        x[j] = b * cos[j] + a * sin[j];
    };
    if (rotation.is_interleaved) {
        for (int64_t d = 0; d < half; ++d) turn(2 * d, 2 * d + 1);
    } else {
        for (int64_t d = 0; d < half; ++d) turn(d, d + half);
    }
}

// x / (1 + e^-x)
struct Silu {
    Lanes operator()(Lanes x) const { return x / (exp_of(-x) + 1.0f); }
};

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), as (1 + tanh u) / 2 = 1 / (1 + e^-2u)
// (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2).
struct GeluTanh {
    Lanes operator()(Lanes x) const {
        return x / (exp_of((x + x * x * x * 0.044715f) * -1.5957691216057308f) + 1.0f);
    }
};

struct Relu {
    Lanes operator()(Lanes x) const { return x > 0.0f ? x : Lanes{}; }
};

// Into `x`: f(x) * by, without `by` f(x).
template <typename F>
void apply(float* x, const float* by, int64_t n, F f) {
    if (!by) return over_lanes(x, n, f);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) narrow(x + i, f(widen(x + i)) * widen(by + i));
    over_lanes(x + i, n - i, f);
    for (; i < n; ++i) x[i] *= by[i];
}

void activate(Activation kind, float* x, const float* by, int64_t n) {
    switch (kind) {
        case kSilu: return apply(x, by, n, Silu{});
        case kGeluTanh: return apply(x, by, n, GeluTanh{});
        case kRelu: return apply(x, by, n, Relu{});
    }
}

// Called by every thread of a parallel region; they share the rows. make(r) returns row r, float32 [n],
// which then is what enters the next product.
template <typename T, typename Make>
void enter(const Step& step, int64_t n, Make make) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < step.rows; ++r)
        round_row(make(r), n, static_cast<T*>(step.rounded) + r * n, step.rests + r * kRests);
}

// Likewise, of the residual stream, normed.
template <typename T>
void enter_normed(const Norm& norm, int64_t n, const Step& step) {
    enter<T>(step, n, [&](int64_t r) {
        float* from = step.hidden + r * n;
        if (!norm.weight) return from;
        float* row = scratch(n);
        normalize(norm, from, n, row);
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

// What the base's product fetches of the adapters that are added to it, for each thread: about what a second-level
// cache holds.
constexpr int64_t kAnnounced = 768 << 10;

// y (+)= x . w + bias + adapters, x being what has entered
template <Into kInto, typename T>
void project(const Projection& p, const Step& step, float* y) {
    const T* x = static_cast<const T*>(step.rounded);
    const bool is_aside = kInto == Into::add && step.mix.columns;
    if (is_aside) set_aside(step, y, p.out);
    with_storage<T>(p.storage, [&](auto* kind) {
        using S = std::remove_const_t<std::remove_pointer_t<decltype(kind)>>;
        const GroupPool<S> pool = pool_of<S>(p);
        Parts<S> parts(pool, step.mix);
        Later later;
        // With so many rows the base's product computes while memory is idle.
        if (step.rows > kTile) parts.announce(kAnnounced, later);
        if (p.scales) {
#ifdef __AVX512VNNI__
            const Int8Weight weight{static_cast<const int8_t*>(p.packed), p.scales, p.offsets};
            quantize(x, p.in, step.rows, p.in, step.bytes, step.scales);
            multiply_int8<kInto>(step.bytes, step.scales, step.rows, weight, p.bias, p.out, p.in, y, p.out, &later);
#endif
        } else {
            multiply<kInto>(x, p.in, step.rests, step.rows, static_cast<const T*>(p.packed), p.bias, p.out, p.in, y,
                            p.out, &later);
        }
        if (step.mix.num_rows) add_adapters(parts, x, y, p.out, is_aside ? step.aside : nullptr);
    });
}

// Called by every thread of a parallel region. x += residual * after(what has entered . w), x being the
// residual stream.
template <typename T>
void join(const Projection& p, const Norm& after, float residual, const Step& step) {
    if (!after.weight && residual == 1.0f) return project<Into::add, T>(p, step, step.hidden);
    const int64_t n = p.out;
    project<Into::replace, T>(p, step, step.aside);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < step.rows; ++r) {
        float *row = step.aside + r * n, *to = step.hidden + r * n;
        if (after.weight) normalize(after, row, n, row);
        for (int64_t i = 0; i < n; ++i) to[i] += residual * row[i];
    }
}

// Called by every thread of a parallel region: norms and rotary embedding of queries and keys, in place;
// keys and values into the cache.
template <typename Kept>
void place(const Layer& layer, const Model& model, const Step& step, const LayerCache<Kept>& cache,
           const AttentionShape& shape) {
    const int64_t dim = layer.dim, heads = layer.kv_heads * layer.group;
    const Rotation* rotation = layer.rotation < 0 ? nullptr : model.rotations + layer.rotation;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < step.rows; ++r) {
        float *row = step.qkv + r * layer.qkv.out, *keys = row + heads * dim;
        const int64_t angle = step.angles ? step.angles[r] : r;
        if (layer.has_wide_norms) {
            normalize(layer.q_norm, row, heads * dim, row);
            normalize(layer.k_norm, keys, layer.kv_heads * dim, keys);
        }
        for (int64_t h = 0; h < heads + layer.kv_heads; ++h) {
            const Norm& norm = h < heads ? layer.q_norm : layer.k_norm;
            float* head = row + h * dim;
            if (norm.weight && !layer.has_wide_norms) normalize(norm, head, dim, head);
            if (rotation) rotate(head, *rotation, angle);
        }
        for (int64_t h = 0; h < layer.kv_heads; ++h) {
            const float *key = keys + h * dim, *value = key + layer.kv_heads * dim;
            const int64_t slot = step.slots[r], position = step.positions[r];
            convert(key, dim, cache.keys(slot, h, shape).at(position));
            convert(value, dim, cache.values(slot, h, shape).at(position));
        }
    }
}

// Called by every thread of a parallel region.
template <typename T>
void run(const Layer& layer, const Model& model, const Step& step) {
    const int64_t width = layer.qkv.out;
    const AttentionShape shape{layer.kv_heads, layer.group,   layer.dim,
                               layer.scale,    layer.softcap, layer.window};
    using Kept = typename CacheOf<T>::Kept;
    const LayerCache<Kept> cache{static_cast<Kept*>(layer.k), static_cast<Kept*>(layer.v), layer.tables,
                                 layer.width};
    const LayerCache<const Kept> seen{cache.k, cache.v, cache.tables, cache.width};
    enter_normed<T>(layer.attention_norm, layer.hidden, step);
    project<Into::replace, T>(layer.qkv, step, step.qkv);
    if (layer.is_parallel) project<Into::replace, T>(layer.up, step, step.up);
    place(layer, model, step, cache, shape);
    // A loop without a turn still has all threads meet at its end.
    if (step.num_decode)
        attend_decode(step.qkv, width, layer.dim, seen, step.attended, step.slots, step.lengths,
                      step.num_decode, shape);
    if (step.num_chunks)
        attend_chunks(step.chunks, step.num_chunks, step.qkv, width, seen, step.attended, layer.o.in, shape);
    enter<T>(step, layer.o.in, [&](int64_t r) { return step.attended + r * layer.o.in; });
    join<T>(layer.o, layer.attention_after, layer.residual, step);
    if (!layer.is_parallel) {
        enter_normed<T>(layer.mlp_norm, layer.hidden, step);
        project<Into::replace, T>(layer.up, step, step.up);
    }
    enter<T>(step, layer.inner, [&](int64_t r) {
        float* row = step.up + r * layer.up.out;
        const bool is_gated = layer.up.out > layer.inner;
        activate(static_cast<Activation>(layer.activation), row, is_gated ? row + layer.inner : nullptr,
                 layer.inner);
        return row;
    });
    join<T>(layer.down, layer.mlp_after, layer.residual, step);
}

// Write row r of the residual stream.
template <typename T>
void embed(const Model& model, const Step& step, int64_t r, int64_t width) {
    const T *embeddings = static_cast<const T*>(model.embeddings),
            *positions = static_cast<const T*>(model.positions);
    float* row = step.hidden + r * width;
    convert(embeddings + step.tokens[r] * width, width, row);
    if (model.embedding_scale != 1.0f)
        for (int64_t i = 0; i < width; ++i) row[i] *= model.embedding_scale;
    if (positions)
        for (int64_t i = 0; i < width; ++i) row[i] += load(positions + step.angles[r] * width + i);
}

// Where the cache keeps what layer `shared` reads of a row.
float* residual_of(const Model& model, const Step& step, int64_t r) {
    const Layer& layer = *model.layers[model.shared];
    const int64_t position = step.positions[r];
    const int64_t block = layer.tables[step.slots[r] * layer.width + position / kCacheBlock];
    return model.residuals + (block * kCacheBlock + position % kCacheBlock) * layer.hidden;
}

template <typename T>
void run_all(const Model& model, const Step& step) {
    const int64_t width = model.layers[0]->hidden;
    const bool is_whole = step.first == 0;
#pragma omp parallel num_threads(step.threads) if (step.threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < step.rows; ++r) {
            if (is_whole) {
                embed<T>(model, step, r, width);
            } else {
                // Scale and positions of the embeddings are in it.
                std::memcpy(step.hidden + r * width, residual_of(model, step, r), width * sizeof(float));
            }
        }
        for (int64_t i = step.first; i < model.count; ++i) {
            if (is_whole && model.residuals && i == model.shared) {
#pragma omp for schedule(static)
                for (int64_t r = 0; r < step.rows; ++r)
                    std::memcpy(residual_of(model, step, r), step.hidden + r * width, width * sizeof(float));
            }
            run<T>(*model.layers[i], model, step);
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < step.num_wanted; ++r) {
            const float* row = step.hidden + step.wanted[r] * width;
            if (model.norm.weight) {
                normalize(model.norm, row, width, step.out + r * width);
            } else {
                std::memcpy(step.out + r * width, row, width * sizeof *row);
            }
        }
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
