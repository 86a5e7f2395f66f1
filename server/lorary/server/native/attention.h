// Attention of a step's rows over their sequences' blocks of the cache.
//
// Semantics, for a query at position n - 1 of its sequence, query head h of KV head g:
//   w[p]   = softmax_p(cap(scale * q[h] . K[g, p]))   for the p that it sees
//   out[h] = sum_p w[p] * V[g, p]
// with cap(x) = softcap * tanh(x / softcap) where softcap > 0. It sees [max(0, n - window), n), all
// from 0 on where window = 0; or what its row of the chunk's mask says.
#pragma once

#include <cmath>
#include <limits>

#include "matmul.h"

struct AttentionShape {
    int64_t kv_heads, group, dim;
    float scale, softcap;
    int64_t window;
};

// Positions of one block of the cache; kv_cache.py has the same number.
constexpr int64_t kCacheBlock = 32;

// One sequence's keys or values, one KV head.
template <typename T>
struct Pages {
    T* first;              // of block 0 of the cache
    const int32_t* table;  // the sequence's blocks
    int64_t stride, dim;   // elements of a block of all heads; of a position
    T* at(int64_t p) const { return first + table[p / kCacheBlock] * stride + p % kCacheBlock * dim; }
};

// Positions [first, length) of one sequence, one KV head: what a decode row sees.
template <typename T>
struct Seen {
    Pages<T> k, v;
    int64_t first, length;
    int64_t begin() const { return first / kCacheBlock; }
    int64_t blocks() const { return length > first ? (length - 1) / kCacheBlock + 1 - begin() : 0; }
};

// Blocks of keys, and of values, that are fetched ahead: a fraction of the second-level cache.
constexpr int64_t kAhead = 16;

// While the keys (or values) of one row are read, those further on are fetched, and at its end the first ones of
// the row that is read next: memory is neither idle while they are multiplied, nor waited for.
template <typename T>
struct Ahead {
    const Pages<T>&own, &next;
    int64_t begin, blocks, next_begin, next_blocks;
    int64_t depth() const { return blocks < kAhead ? blocks : kAhead; }

    // What takes the place of block i, counted from the first that is seen; null: nothing.
    const T* of(int64_t i) const {
        const int64_t later = i + depth();
        if (later < blocks) return own.at((begin + later) * kCacheBlock);
        return later - blocks < next_blocks ? next.at((next_begin + later - blocks) * kCacheBlock) : nullptr;
    }

    // The next row's first blocks that had no counterpart.
    void rest() const {
        for (int64_t i = depth(); i < next_blocks && i < kAhead; ++i)
            fetch(next.at((next_begin + i) * kCacheBlock), kCacheBlock * next.dim);
    }
};

template <typename T>
Ahead<T> keys_ahead(const Seen<T>& seen, const Seen<T>& next) {
    return {seen.k, next.k, seen.begin(), seen.blocks(), next.begin(), next.blocks()};
}
template <typename T>
Ahead<T> values_ahead(const Seen<T>& seen, const Seen<T>& next) {
    return {seen.v, next.v, seen.begin(), seen.blocks(), next.begin(), next.blocks()};
}

// Call visit(begin, end) for positions [from, to), cut where blocks end.
template <typename Visit>
void by_block(int64_t from, int64_t to, Visit visit) {
    for (int64_t begin = from; begin < to;) {
        const int64_t rest = (begin / kCacheBlock + 1) * kCacheBlock, end = rest < to ? rest : to;
        visit(begin, end);
        begin = end;
    }
}

// One layer's cache: k and v [blocks, kv_heads, kCacheBlock, dim]; tables [slots, width] of blocks.
template <typename T>
struct LayerCache {
    T *k, *v;
    const int32_t* tables;
    int64_t width;
    Pages<T> keys(int64_t slot, int64_t head, const AttentionShape& s) const {
        return pages(k, slot, head, s);
    }
    Pages<T> values(int64_t slot, int64_t head, const AttentionShape& s) const {
        return pages(v, slot, head, s);
    }

   private:
    Pages<T> pages(T* from, int64_t slot, int64_t head, const AttentionShape& s) const {
        return {from + head * kCacheBlock * s.dim, tables + slot * width, s.kv_heads * kCacheBlock * s.dim, s.dim};
    }
};

// Prompt tokens of one sequence: rows [row, row + length) of the step, at positions from `start` on.
// The mask, if there is one, is [length, start + length].
struct Chunk {
    int64_t row, length, slot, start;
    const uint8_t* mask;
};

inline void cap(float* scores, int64_t count, float softcap) {
    if (softcap > 0.0f)
        over_lanes(scores, count, [&](Lanes some) { return tanh_of(some / softcap) * softcap; });
}

// Turn count scores into weights, in place; -infinity becomes exactly 0.
inline void soften(float* w, int64_t count) {
    const float largest = largest_of(w, count);
    Lanes sums = {};
    int64_t p = 0;
    for (; p + kLanes <= count; p += kLanes) {
        const Lanes e = exp_of(widen(w + p) - largest);
        sums += e;
        narrow(w + p, e);
    }
    if (p < count) {
        // What is beyond counts nothing; its place holds no weight to overwrite.
        Lanes rest = Lanes{} - std::numeric_limits<float>::infinity();
        for (int64_t i = p; i < count; ++i) rest[i - p] = w[i] - largest;
        rest = exp_of(rest);
        sums += rest;
        for (int64_t i = p; i < count; ++i) w[i] = rest[i - p];
    }
    const float scale = 1.0f / sum_of(sums);
    for (int64_t i = 0; i < count; ++i) w[i] *= scale;
}

// 16 * W elements from `d` on of G heads' sums of values, positions in ascending order.
template <int G, int W, typename T, typename O>
void weigh(const float* weight, int64_t tall, const Seen<T>& seen, const Ahead<T>& ahead, int64_t d, O* out) {
    const int64_t dim = seen.v.dim;
    Lanes acc[G][W] = {};
    by_block(seen.first, seen.length, [&](int64_t begin, int64_t end) {
        const T* row = seen.v.at(begin) + d;
        const T* later = ahead.of(begin / kCacheBlock - ahead.begin);
        later = later ? later + begin % kCacheBlock * dim + d : row;
        for (int64_t p = begin - seen.first; p < end - seen.first; ++p, row += dim, later += dim) {
            fetch(later, W * kLanes);
            Lanes value[W];
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w) value[w] = widen(row + w * kLanes);
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w) acc[g][w] += weight[g * tall + p] * value[w];
        }
    });
    for (int g = 0; g < G; ++g)
        for (int w = 0; w < W; ++w) narrow(out + g * dim + d + w * kLanes, acc[g][w]);
}

// Scores of K neighbouring keys, from `row` on, with G queries: into weight[g * tall : g * tall + K].
template <int G, int K, typename T>
void score(const float* query, int64_t wide, const T* row, int64_t dim, float* weight, int64_t tall) {
    const int64_t even = dim / kLanes * kLanes;
    Lanes sums[G][K] = {};
    for (int64_t d = 0; d < even; d += kLanes) {
        Lanes key[K];
#pragma GCC unroll 4
        for (int i = 0; i < K; ++i) key[i] = widen(row + i * dim + d);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
            const Lanes some = widen(query + g * wide + d);
#pragma GCC unroll 4
            for (int i = 0; i < K; ++i) sums[g][i] += some * key[i];
        }
    }
    for (int64_t d = even; d < dim; ++d)
        for (int g = 0; g < G; ++g)
            for (int i = 0; i < K; ++i) sums[g][i][d - even] += query[g * wide + d] * load(row + i * dim + d);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
        if constexpr (K == 4) {
            sums_of(sums[g], weight + g * tall);
        } else {
            for (int i = 0; i < K; ++i) weight[g * tall + i] = sum_of(sums[g][i]);
        }
    }
}

// One decode row, one KV head, G of the query heads that share it: each key and value is read once
// for all of them.
template <int G, typename Q, typename T, typename O>
void attend_heads(const Q* q, int64_t q_head, const Seen<T>& seen, const Ahead<T>& keys, const Ahead<T>& values,
                  O* out, const AttentionShape& s) {
    const int64_t first = seen.first, count = seen.length - first, wide = aligned(s.dim), tall = aligned(count);
    float* query = scratch(G * (wide + tall));
    float* weight = query + G * wide;
    for (int g = 0; g < G; ++g)
        for (int64_t d = 0; d < s.dim; ++d) query[g * wide + d] = load(q + g * q_head + d) * s.scale;
    const int64_t even = s.dim / kLanes * kLanes;
    by_block(first, seen.length, [&](int64_t begin, int64_t end) {
        const T* row = seen.k.at(begin);
        const T* later = keys.of(begin / kCacheBlock - keys.begin);
        const int64_t off = later ? later + begin % kCacheBlock * s.dim - row : 0;
        int64_t p = begin - first;
        // A horizontal sum takes as long as a key's products: four at once.
        for (; p + 4 <= end - first; p += 4, row += 4 * s.dim) {
            fetch(row + off, 4 * s.dim);
            score<G, 4>(query, wide, row, s.dim, weight + p, tall);
        }
        for (; p < end - first; ++p, row += s.dim) {
            fetch(row + off, s.dim);
            score<G, 1>(query, wide, row, s.dim, weight + p, tall);
        }
    });
    keys.rest();
    for (int g = 0; g < G; ++g) {
        cap(weight + g * tall, count, s.softcap);
        soften(weight + g * tall, count);
    }
    int64_t d = 0;
    for (; d + 4 * kLanes <= even; d += 4 * kLanes) weigh<G, 4>(weight, tall, seen, values, d, out);
    for (; d + 2 * kLanes <= even; d += 2 * kLanes) weigh<G, 2>(weight, tall, seen, values, d, out);
    for (; d < even; d += kLanes) weigh<G, 1>(weight, tall, seen, values, d, out);
    for (; d < s.dim; ++d)
        for (int g = 0; g < G; ++g) {
            float acc = 0.0f;
            for (int64_t p = 0; p < count; ++p) acc += weight[g * tall + p] * load(seen.v.at(first + p) + d);
            store(out + g * s.dim + d, acc);
        }
    values.rest();
}

// One decode row, one KV head; `next` is what is attended to after it, of no length if that is nothing.
template <typename Q, typename T, typename O>
void attend_one(const Q* q, int64_t q_head, const Seen<T>& seen, const Seen<T>& next, O* out, const AttentionShape& s) {
    const Ahead<T> keys = keys_ahead(seen, next), values = values_ahead(seen, next);
    int64_t g = 0;
    for (; g + 4 <= s.group; g += 4)
        attend_heads<4>(q + g * q_head, q_head, seen, keys, values, out + g * s.dim, s);
    for (; g + 3 <= s.group; g += 3)
        attend_heads<3>(q + g * q_head, q_head, seen, keys, values, out + g * s.dim, s);
    for (; g < s.group; ++g) attend_heads<1>(q + g * q_head, q_head, seen, keys, values, out + g * s.dim, s);
}

// Called by every thread of a parallel region. q [rows, heads, dim] by its strides, out
// [rows, heads, dim] contiguous; lengths count this step's position.
template <typename Q, typename T, typename O>
void attend_decode(const Q* q, int64_t q_row, int64_t q_head, LayerCache<const T> cache, O* out,
                   const int32_t* slots, const int32_t* lengths, int64_t rows, const AttentionShape& s) {
    const auto seen_of = [&](int64_t i) {
        const int64_t row = i / s.kv_heads, head = i % s.kv_heads, length = lengths[row];
        return Seen<const T>{cache.keys(slots[row], head, s), cache.values(slots[row], head, s),
                             s.window > 0 && length > s.window ? length - s.window : 0, length};
    };
    const auto attend = [&](int64_t i, const Seen<const T>& seen, const Seen<const T>& next) {
        const int64_t row = i / s.kv_heads, head = i % s.kv_heads;
        attend_one(q + row * q_row + head * s.group * q_head, q_head, seen, next,
                   out + (row * s.kv_heads + head) * s.group * s.dim, s);
    };
    Seen<const T> seen{};
    share(rows * s.kv_heads, 2, [&](int64_t taken, int64_t i) {
        const Seen<const T> next = i < 0 ? Seen<const T>{} : seen_of(i);
        if (taken < 0) {
            keys_ahead(seen, next).rest();
            values_ahead(seen, next).rest();
        } else {
            attend(taken, seen, next);
        }
        seen = next;
    });
}

// Query rows (positions x heads of a group) that share one packing of keys and values.
constexpr int64_t kQueries = 96;

inline int64_t positions_per_block(int64_t group) { return group < kQueries ? kQueries / group : 1; }

// Positions [begin, end) of a chunk, one KV head: scores against panels of 32 keys, softmax over what
// each position sees, then panels of 32 values' elements. What a row does not see weighs exactly 0,
// so its bits do not depend on where chunks and blocks are cut.
template <typename T, typename O>
void attend_block(const Chunk& chunk, int64_t begin, int64_t end, int64_t head, const float* q,
                  int64_t q_row, LayerCache<const T> cache, O* out, int64_t out_row,
                  const AttentionShape& s) {
    const int64_t rows = (end - begin) * s.group;
    // With a mask a position may see what lies behind it in the cache, never more than the chunk.
    const int64_t stop = chunk.mask ? chunk.start + chunk.length : chunk.start + end;
    const int64_t earliest = chunk.start + begin + 1 - s.window;
    const int64_t first = s.window > 0 && !chunk.mask && earliest > 0 ? earliest : 0;
    const int64_t count = stop - first, padded = panels(count) * kPanel;
    const auto keys = cache.keys(chunk.slot, head, s), values = cache.values(chunk.slot, head, s);
    const int64_t widths = panels(s.dim) * kPanel, longest = padded > s.dim ? padded : s.dim;
    float* query = scratch(rows * (widths + padded) + longest * kPanel + rows * kPanel);
    float* weight = query + rows * widths;
    float* panel = weight + rows * padded;
    float* sums = panel + longest * kPanel;
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = q + (chunk.row + begin + r / s.group) * q_row + r % s.group * s.dim;
        for (int64_t d = 0; d < s.dim; ++d) query[r * widths + d] = from[d] * s.scale;
    }
    for (int64_t p = 0; p < padded; p += kPanel) {
        for (int64_t c = 0; c < kPanel; ++c) {
            const bool is_there = p + c < count;
            const T* key = is_there ? keys.at(first + p + c) : nullptr;
            for (int64_t d = 0; d < s.dim; ++d) panel[d * kPanel + c] = is_there ? load(key + d) : 0.0f;
        }
        all_tiles<float>(query, widths, rows, panel, s.dim, weight + p, padded, true);
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* w = weight + r * padded;
        const int64_t position = begin + r / s.group, last = chunk.start + position;
        int64_t seen = last + 1 - first;
        cap(w, count, s.softcap);
        if (chunk.mask) {
            const uint8_t* row = chunk.mask + position * (chunk.start + chunk.length);
            for (int64_t p = 0; p < count; ++p)
                if (!row[p]) w[p] = -std::numeric_limits<float>::infinity();
            seen = count;
        } else if (s.window > 0) {
            const int64_t from = last + 1 - s.window - first;
            for (int64_t p = 0; p < from; ++p) w[p] = -std::numeric_limits<float>::infinity();
        }
        soften(w, seen);
        for (int64_t p = seen; p < padded; ++p) w[p] = 0.0f;
    }
    for (int64_t d = 0; d < s.dim; d += kPanel) {
        const int64_t width = s.dim - d < kPanel ? s.dim - d : kPanel;
        for (int64_t p = 0; p < count; ++p) {
            const T* value = values.at(first + p) + d;
            for (int64_t c = 0; c < kPanel; ++c) panel[p * kPanel + c] = c < width ? load(value + c) : 0.0f;
        }
        all_tiles<float>(weight, padded, rows, panel, count, sums, kPanel, true);
        for (int64_t r = 0; r < rows; ++r) {
            O* to = out + (chunk.row + begin + r / s.group) * out_row + r % s.group * s.dim + d;
            for (int64_t c = 0; c < width; ++c) store(to + c, sums[r * kPanel + c]);
        }
    }
}

// Called by every thread of a parallel region; they share blocks of every chunk and KV head. q
// float32 [rows, heads, dim] and out by their row strides, heads side by side.
template <typename T, typename O>
void attend_chunks(const Chunk* chunks, int64_t num_chunks, const float* q, int64_t q_row,
                   LayerCache<const T> cache, O* out, int64_t out_row, const AttentionShape& s) {
    const int64_t step = positions_per_block(s.group);
    int64_t items = 0;
    for (int64_t c = 0; c < num_chunks; ++c) items += (chunks[c].length + step - 1) / step * s.kv_heads;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
        int64_t c = 0, rest = item;
        for (;; ++c) {
            const int64_t here = (chunks[c].length + step - 1) / step * s.kv_heads;
            if (rest < here) break;
            rest -= here;
        }
        const int64_t head = rest % s.kv_heads, begin = rest / s.kv_heads * step;
        const int64_t end = begin + step < chunks[c].length ? begin + step : chunks[c].length;
        attend_block(chunks[c], begin, end, head, q + head * s.group * s.dim, q_row, cache,
                     out + head * s.group * s.dim, out_row, s);
    }
}
