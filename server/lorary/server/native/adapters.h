// Mixed-adapter product for CPUs, straight from the pool's pages. Decoding has few rows per adapter
// and is bound by the bytes of A and B; prompts have many, and go through them in blocks.
//
// Semantics, for the i-th listed row b = rows[i] with adapter k = entry[i], and every member m:
//   t[m, j]       = x[b] . A[m, rank_rows[j]]                      float32 accumulation
//   s[m, j]       = rank_scales[j] * row_scales[m, rank_rows[j]]   the latter 1 without 8-bit rows
//   y[b, o_m + :] += sum_j s[m, j] * t[m, j] * B_m[rank_rows[j], :]
// for j in [rank_indptr[k], rank_indptr[k + 1]), and with column scales c (DoRA; columns[k] >= 0) then
//   y[b, o_m + :] = c * y[b, o_m + :] + (1 - c) * bias[o_m + :]
// Rows are sorted by adapter. Each row's result depends
// on that row alone: the order of summation is fixed, whatever else is in the batch.
#pragma once

#include <type_traits>

#include "common.h"
#include "share.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// What a pool keeps its rows in; products.py has the same numbers.
enum Storage : int64_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// One group of layers that read the same input, with its part of the pool. S is what the rows are kept
// in; they are widened to what they are multiplied in, T, in registers.
template <typename S>
struct GroupPool {
    const S* a;           // [members, cap, in]
    const S* const* b;    // members x [cap, outs[m]]
    const int64_t* outs;  // [members]
    int64_t members, cap, in;
    const float* row_scales;  // [members, cap], or null
    const float* bias;        // [sum of outs], in y already; or null
};

// Call f with a null pointer to what the pool's rows are kept in.
template <typename T, typename F>
void with_storage(int64_t storage, F f) {
    if (storage == kInt8) {
        f(static_cast<const int8_t*>(nullptr));
    } else if (storage == kBfloat16) {
        f(static_cast<const uint16_t*>(nullptr));
    } else if constexpr (std::is_same_v<T, float>) {
        f(static_cast<const float*>(nullptr));
    }
}

// A step's rows by adapter.
struct Mix {
    const int32_t* rows;         // [num_rows], sorted by adapter
    const int32_t* entry;        // [num_rows]
    const int32_t* rank_indptr;  // [entries + 1]
    const int32_t* rank_rows;
    const float* rank_scales;
    const int32_t* columns;  // [entries], where column scales lie in B, read as float32 [.., out], or
                             // -1; null when no adapter has any
    int64_t num_rows;
};

inline bool has_columns(const Mix& mix, int64_t i) { return mix.columns && mix.columns[mix.entry[i]] >= 0; }

// What column scales c make of a row y; of `aside`, if it is there, what y was to be added to.
inline void scale_columns(float* y, const float* c, const float* bias, const float* aside, int64_t n) {
    int64_t o = 0;
    for (; o + kLanes <= n; o += kLanes) {
        const Lanes scale = widen(c + o);
        Lanes value = scale * widen(y + o);
        if (bias) value += widen(bias + o) - scale * widen(bias + o);  // nothing where c is 1
        if (aside) value += widen(aside + o);
        narrow(y + o, value);
    }
    for (; o < n; ++o) {
        float value = c[o] * y[o];
        if (bias) value += bias[o] - c[o] * bias[o];
        y[o] = aside ? aside[o] + value : value;
    }
}

// Rows that share an adapter go through it in blocks, so that A and B are loaded and widened once
// for all of them. Every row's sums run in one order, 16 lanes side by side, whatever the block.
constexpr int kBlock = 8;

// lane += x . a over 16 floats, or over 32 bfloat16 of which each lane takes two. The first argument
// of as_lanes says what x is.
inline int64_t step_of(const float*) { return kLanes; }
inline void multiply_add(Lanes& lane, const float* x, const Lanes& a) { lane += widen(x) * a; }
#ifdef __AVX512BF16__
inline int64_t step_of(const uint16_t*) { return 2 * kLanes; }
inline void multiply_add(Lanes& lane, const uint16_t* x, const Lanes& a) {
    lane = (Lanes)_mm512_dpbf16_ps((__m512)lane, (__m512bh)_mm512_loadu_si512(x), (__m512bh)a);
}
inline Lanes as_lanes(const uint16_t*, const uint16_t* p) { return (Lanes)_mm512_loadu_ps(p); }
inline Lanes as_lanes(const uint16_t*, const int8_t* p) {  // 8 bits are exact in bfloat16
    return (Lanes)_mm512_cvtne2ps_pbh((__m512)widen(p + kLanes), (__m512)widen(p));
}
#else
inline int64_t step_of(const uint16_t*) { return kLanes; }
inline void multiply_add(Lanes& lane, const uint16_t* x, const Lanes& a) { lane += widen(x) * a; }
template <typename S>
inline Lanes as_lanes(const uint16_t*, const S* p) {
    return widen(p);
}
#endif
template <typename S>
inline Lanes as_lanes(const float*, const S* p) {
    return widen(p);
}

// A block of rows with one adapter, and that adapter's part for one member of a group.
template <typename S>
struct Part {
    const S *a, *b;              // the member's rows in the pool
    const float* row_scales;     // theirs, or null
    int64_t in, out, offset;     // outputs begin at y's column `offset`
    const int32_t* rank_rows;    // [rank]
    const float* rank_scales;    // [rank]
    const int32_t* rows;         // [num_rows]
    int32_t rank, num_rows, columns;  // the last as in Mix

    const S* a_row(int32_t j) const { return a + rank_rows[j] * in; }
    const S* b_row(int32_t j) const { return b + rank_rows[j] * out; }
};

// sums[j, r] = x[r] . a[j] for R rows and J rank rows at once, so that even one row keeps
// several sums under way. `soon` has as many rows, fetched on the way.
template <int R, int J, typename S, typename T>
void dots(const T* const* x, const S* const* a, const S* const* soon, int64_t n, float* sums) {
    Lanes lane[R * J];
#pragma GCC unroll 16
    for (int l = 0; l < R * J; ++l) lane[l] = Lanes{};
    const int64_t step = step_of(x[0]);
    int64_t i = 0;
    for (; i + step <= n; i += step) {
        Lanes some[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
            some[j] = as_lanes(x[0], a[j] + i);
            __builtin_prefetch(soon[j] + i, 0, 2);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < J; ++j) multiply_add(lane[r * J + j], x[r] + i, some[j]);
    }
    if (i < n) {  // the last ones, among zeros
        T last_x[2 * kLanes] = {};
        S last_a[J][2 * kLanes] = {};
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) std::memcpy(last_a[j], a[j] + i, (n - i) * sizeof(S));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            std::memcpy(last_x, x[r] + i, (n - i) * sizeof(T));
#pragma GCC unroll 4
            for (int j = 0; j < J; ++j) multiply_add(lane[r * J + j], last_x, as_lanes(x[0], last_a[j]));
        }
    }
    // Only places that are known when this is compiled: else all sums lie in memory, not in registers.
    float sum[(R * J + 3) / 4 * 4];
    constexpr int kFours = R * J / 4 * 4;
#pragma GCC unroll 4
    for (int l = 0; l < kFours; l += 4) {
        const Lanes four[4] = {lane[l], lane[l + 1], lane[l + 2], lane[l + 3]};
        sums_of(four, sum + l);
    }
#pragma GCC unroll 4
    for (int l = kFours; l < R * J; ++l) sum[l] = sum_of(lane[l]);
#pragma GCC unroll 16
    for (int l = 0; l < R * J; ++l) sums[l % J * R + l / J] = sum[l];
}

// acc[r, o:o + 16 * W] += sum_j t[j, r] * B[rank_rows[j], o:o + 16 * W], j in ascending order; the same stretches of
// `soon` are fetched on the way.
template <int R, int W, typename S>
void expand(float* const* acc, const float* t, const Part<S>& part, const Part<S>& soon, int64_t o) {
    Lanes sum[R][W];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) sum[r][w] = widen(acc[r] + o + w * kLanes);
    for (int32_t j = 0; j < part.rank; ++j) {
        const S* row = part.b_row(j) + o;
        fetch(j < soon.rank && o < soon.out ? soon.b_row(j) + o : row, W * kLanes);
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) {
            const Lanes wide = widen(row + w * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[r][w] += t[j * R + r] * wide;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) narrow(acc[r] + o + w * kLanes, sum[r][w]);
}

// What of `soon` has no counterpart in `part`, next to which the rest is fetched.
template <typename S>
void fetch_rest(const Part<S>& part, const Part<S>& soon) {
    if (soon.rank <= part.rank && soon.out <= part.out) return;
    for (int32_t j = 0; j < soon.rank; ++j) {
        if (j >= part.rank) fetch(soon.a_row(j), soon.in);
        const int64_t from = j < part.rank ? part.out : 0;
        if (from < soon.out) fetch(soon.b_row(j) + from, soon.out - from);
    }
}

// t[j, r] = s[j] * (x[r] . A[rank_rows[j]]) of R rows, with as many rows of A at once as registers hold sums for.
template <int R, typename S, typename T>
void shrink(const T* const* x, const Part<S>& part, const Part<S>& soon, float* t) {
    constexpr int kRanks = R <= 6 ? 4 : 2;
    const int32_t rank = part.rank;
    const auto some = [&](int32_t j, auto count) {
        constexpr int kCount = decltype(count)::value;
        const S *a[kCount], *next[kCount];
        for (int i = 0; i < kCount; ++i) {
            a[i] = part.a_row(j + i);
            next[i] = j + i < soon.rank ? soon.a_row(j + i) : a[i];
        }
        dots<R, kCount>(x, a, next, part.in, t + j * R);
    };
    int32_t j = 0;
    for (; j + kRanks <= rank; j += kRanks) some(j, std::integral_constant<int, kRanks>{});
    for (; j < rank; ++j) some(j, std::integral_constant<int, 1>{});
    const float *scales = part.rank_scales, *own = part.row_scales;
    for (j = 0; j < rank; ++j) {
        const float scale = own ? scales[j] * own[part.rank_rows[j]] : scales[j];
        for (int r = 0; r < R; ++r) t[j * R + r] *= scale;
    }
}

// A part of R rows. What is read of `soon` after it is fetched meanwhile, line by line: memory is neither idle
// while this part is multiplied, nor waited for.
template <int R, typename S, typename T, typename Y>
void add_part(const Part<S>& part, const Part<S>& soon, const float* bias, const T* x, Y* y, int64_t y_row,
              const float* aside) {
    const int64_t in = part.in, out = part.out;
    const int32_t rank = part.rank;
    const int32_t* rows = part.rows;
    constexpr bool kInPlace = std::is_same_v<Y, float>;
    float* t = scratch(aligned(R * rank) + (kInPlace ? 0 : R * aligned(out)));
    const T* rows_of_x[R];
    float* acc[R];
    for (int r = 0; r < R; ++r) {
        rows_of_x[r] = x + rows[r] * in;
        if constexpr (kInPlace) {
            acc[r] = y + rows[r] * y_row + part.offset;
        } else {
            acc[r] = t + aligned(R * rank) + r * aligned(out);
            convert(y + rows[r] * y_row + part.offset, out, acc[r]);
        }
    }
    shrink<R>(rows_of_x, part, soon, t);
    // Few rows read B in long stretches, many in short ones, as registers allow.
    constexpr int kWide = R <= 2 ? 8 : R <= 4 ? 4 : 2;
    int64_t o = 0;
    for (; o + kWide * kLanes <= out; o += kWide * kLanes) expand<R, kWide>(acc, t, part, soon, o);
    for (; o + kLanes <= out; o += kLanes) expand<R, 1>(acc, t, part, soon, o);
    for (; o < out; ++o)
        for (int32_t j = 0; j < rank; ++j)
            for (int r = 0; r < R; ++r) acc[r][o] += t[j * R + r] * load(part.b_row(j) + o);
    fetch_rest(part, soon);
    if (part.columns >= 0) {
        const float* c = reinterpret_cast<const float*>(part.b) + part.columns * out;
        for (int r = 0; r < R; ++r)
            scale_columns(acc[r], c, bias ? bias + part.offset : nullptr,
                          aside ? aside + rows[r] * y_row + part.offset : nullptr, out);
    }
    if constexpr (!kInPlace)
        for (int r = 0; r < R; ++r) convert(acc[r], out, y + rows[r] * y_row + part.offset);
}

// Call f with a number of rows, of 1 to kBlock, that is known when f is compiled.
template <typename F>
void with_rows(int64_t rows, F f) {
    switch (rows) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        case 4: return f(std::integral_constant<int, 4>{});
        case 5: return f(std::integral_constant<int, 5>{});
        case 6: return f(std::integral_constant<int, 6>{});
        case 7: return f(std::integral_constant<int, 7>{});
        default: return f(std::integral_constant<int, kBlock>{});
    }
}

// One member's part for `count` rows that share an adapter, from the mix's row `first` on.
template <typename S>
Part<S> part_of(const GroupPool<S>& pool, const Mix& mix, int64_t member, int64_t first, int64_t count) {
    const int32_t entry = mix.entry[first], begin = mix.rank_indptr[entry];
    Part<S> part;
    part.a = pool.a + member * pool.cap * pool.in;
    part.b = pool.b[member];
    part.row_scales = pool.row_scales ? pool.row_scales + member * pool.cap : nullptr;
    part.in = pool.in;
    part.out = pool.outs[member];
    part.offset = 0;
    for (int64_t m = 0; m < member; ++m) part.offset += pool.outs[m];
    part.rank_rows = mix.rank_rows + begin;
    part.rank_scales = mix.rank_scales + begin;
    part.rows = mix.rows + first;
    part.rank = mix.rank_indptr[entry + 1] - begin;
    part.num_rows = static_cast<int32_t>(count);
    part.columns = has_columns(mix, first) ? mix.columns[entry] : -1;
    return part;
}

// What the threads share: blocks of neighbours with one adapter, of which the last of a run may be narrower, for
// each member. Made by each of them, one at a time.
template <typename S>
class Parts {
   public:
    Parts(const GroupPool<S>& pool, const Mix& mix) : pool(pool), mix_(mix) {
        starts_.clear();
        for (int64_t i = 0, begin = 0; i <= mix.num_rows; ++i) {
            const bool is_end = i == mix.num_rows || mix.entry[i] != mix.entry[begin] || i - begin == kBlock;
            if (is_end && i > begin) {
                starts_.push_back(begin);
                begin = i;
            }
        }
        blocks_ = static_cast<int64_t>(starts_.size());
        starts_.push_back(mix.num_rows);
        count = blocks_ * pool.members;
    }

    Part<S> at(int64_t i) const {
        const int64_t member = i / blocks_, block = i - member * blocks_;
        return part_of(pool, mix_, member, starts_[block], starts_[block + 1] - starts_[block]);
    }

    // Let each thread begin with parts of its own, of about so many bytes, and say where they lie: all of A, then
    // all of B, as either is in one stretch more often than not.
    void announce(int64_t bytes, Later& later) {
        int64_t all = 1;
        for (int64_t i = 0; i < count; ++i) {
            const Part<S> part = at(i);
            all += part.rank * (part.in + part.out) * static_cast<int64_t>(sizeof(S));
        }
        const int64_t most = count / omp_get_num_threads(), some = bytes * count / all;
        own = some < most ? some : most;
        const int64_t first = own * omp_get_thread_num();
        for (int64_t i = first; i < first + own; ++i) {
            const Part<S> part = at(i);
            for (int32_t j = 0; j < part.rank; ++j) later.add(part.a_row(j), part.in);
        }
        for (int64_t i = first; i < first + own; ++i) {
            const Part<S> part = at(i);
            for (int32_t j = 0; j < part.rank; ++j) later.add(part.b_row(j), part.out);
        }
    }

    const GroupPool<S>& pool;
    int64_t count, own = 0;

   private:
    const Mix& mix_;
    static thread_local std::vector<int64_t> starts_;
    int64_t blocks_;
};
template <typename S>
thread_local std::vector<int64_t> Parts<S>::starts_;

// Called by every thread of a parallel region; they share the parts. Where y is added to what was there, `aside` has
// the rows of it, laid out as y's, whose adapter has column scales.
template <typename S, typename T, typename Y>
void add_adapters(const Parts<S>& parts, const T* x, Y* y, int64_t y_row, const float* aside = nullptr) {
    // Neighbouring parts lie next to each other in memory more often than not: a few at once, as long as there are
    // two turns for every thread.
    const int64_t threads = omp_get_num_threads(), turns = 2 * threads, shared = parts.count - threads * parts.own,
                  few = shared < turns ? 1 : shared / turns < 4 ? shared / turns : 4;
    Part<S> part{};
    const auto run = [&](int64_t taken, int64_t i) {
        const Part<S> soon = i < 0 ? Part<S>{} : parts.at(i);
        if (taken >= 0) {
            with_rows(part.num_rows, [&](auto rows) {
                add_part<decltype(rows)::value>(part, soon, parts.pool.bias, x, y, y_row, aside);
            });
        } else if (!parts.own) {
            fetch_rest(part, soon);
        }
        part = soon;
    };
    share(parts.count, few, run, parts.own);
}
