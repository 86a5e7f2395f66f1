// The next token of every row of logits: the most likely one, or one drawn.

#include <algorithm>
#include <cmath>
#include <limits>

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

// How one row is drawn from; inference.proto says what the fields mean.
struct Draw {
    int64_t row, top_k;
    double uniform;  // in [0, 1)
    float temperature, top_p, min_p;
};

struct Candidate {
    float weight;
    int32_t token;
    bool operator<(const Candidate& other) const {  // the likeliest first, then the lowest token
        return weight != other.weight ? weight > other.weight : token < other.token;
    }
};

// Tokens whose weight is summed up together, so that a draw looks at few of them one by one.
constexpr int64_t kStretch = 1024;

// Weights of one row's tokens, the likeliest having 1, padded with zeros to whole lanes.
struct Weights {
    float* of;
    int64_t n;

    // The sum of a stretch.
    double sum(int64_t begin) const {
        Lanes sums = {};
        for (int64_t i = begin; i < std::min(begin + kStretch, aligned(n)); i += kLanes) sums += widen(of + i);
        return sum_of(sums);
    }
    double sum() const {
        double total = 0.0;
        for (int64_t begin = 0; begin < n; begin += kStretch) total += sum(begin);
        return total;
    }
    std::vector<Candidate> at_least(float least) const {
        std::vector<Candidate> found;
        for (int64_t i = 0; i < n; i += kLanes) {
            if (!is_any(widen(of + i) >= least)) continue;
            for (int64_t j = i; j < std::min(i + kLanes, n); ++j)
                if (of[j] >= least) found.push_back({of[j], static_cast<int32_t>(j)});
        }
        return found;
    }
    // Set to 0 what comes after `last`.
    void cut(const Candidate& last) {
        LaneBits token = {};
        for (int i = 0; i < kLanes; ++i) token[i] = i;
        for (int64_t i = 0; i < n; i += kLanes) {
            const Lanes weight = widen(of + i);
            const LaneBits is_kept = (weight > last.weight) | ((weight == last.weight) & (token <= last.token));
            narrow(of + i, is_kept ? weight : Lanes{});
            token += static_cast<int32_t>(kLanes);
        }
    }
    // The inverse of the distribution function, tokens in ascending order.
    int64_t at(double share) const {
        double rest = share * sum();
        int64_t token = 0;
        for (int64_t begin = 0; begin < n; begin += kStretch) {
            const double here = sum(begin);
            if (rest >= here && begin + kStretch < n) {
                rest -= here;
                continue;
            }
            for (int64_t i = begin; i < std::min(begin + kStretch, n); ++i) {
                if (of[i] == 0.0f) continue;
                token = i;
                rest -= of[i];
                if (rest < 0.0) return token;
            }
        }
        // Rounding left a trace: the last one there is.
        for (int64_t i = n - 1; i > token; --i)
            if (of[i] != 0.0f) return i;
        return token;
    }
};

// The first candidate, in their order, with which their sum reaches `share`; the last one where it never
// does. Halves are split like nth_element's, by what they weigh: the time is linear.
Candidate where_sum_reaches(std::vector<Candidate>& found, double share) {
    auto begin = found.begin(), end = found.end();
    double before = 0.0;
    while (end - begin > 1) {
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end);
        double here = 0.0;
        for (auto c = begin; c != middle; ++c) here += c->weight;
        if (before + here >= share) {
            end = middle;
        } else {
            before += here;
            begin = middle;
        }
    }
    return *begin;
}

// The last of the tokens that top_k and top_p leave, in the order of Candidate. A token outside of the
// first few hundred hardly ever is, so only the likely ones are looked at, and more if they fall short.
Candidate last_kept(const Weights& weights, const Draw& draw) {
    const bool has_k = draw.top_k > 0 && draw.top_k < weights.n, has_p = draw.top_p < 1.0f;
    const size_t k = has_k ? draw.top_k : weights.n;
    if (!has_k && !has_p) return {0.0f, static_cast<int32_t>(weights.n)};
    for (float least = 1e-3f;; least = least > 1e-9f ? least * 1e-3f : 0.0f) {
        std::vector<Candidate> found = weights.at_least(least);
        const bool is_all = least == 0.0f;
        if (has_k && found.size() < k && !is_all) continue;
        if (found.size() > k) {
            std::nth_element(found.begin(), found.begin() + k, found.end());
            found.resize(k);
        }
        if (!has_p) return *std::max_element(found.begin(), found.end());
        double sum = 0.0;
        for (const Candidate& c : found) sum += c.weight;
        const double share = draw.top_p * (has_k ? sum : weights.sum());
        if (sum >= share || is_all || has_k) return where_sum_reaches(found, share);
    }
}

int64_t drawn(const float* x, int64_t n, const Draw& draw) {
    Weights weights{scratch(aligned(n)), n};
    // Never infinite, however cold: the best token's distance from itself is 0, and must stay so.
    const float top = x[largest(x, n)];
    const float scale = std::min(1.0f / draw.temperature, std::numeric_limits<float>::max());
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) narrow(weights.of + i, exp_of((widen(x + i) - top) * scale));
    for (; i < aligned(n); ++i) weights.of[i] = i < n ? std::exp((x[i] - top) * scale) : 0.0f;
    const Candidate likely{draw.min_p, static_cast<int32_t>(n)};
    const Candidate last = std::min(likely, last_kept(weights, draw));
    if (last.weight > 0.0f) weights.cut(last);
    return weights.at(draw.uniform);
}

}  // namespace

extern "C" {

int64_t lorary_draw_bytes() { return sizeof(Draw); }

// x float32 [rows, n] by its stride; out [count], one token for each of the draws
void lorary_draw_f32(const float* x, int64_t stride, int64_t n, const Draw* draws, int64_t count,
                     int64_t* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (count > 1 && threads > 1)
    for (int64_t d = 0; d < count; ++d) out[d] = drawn(x + draws[d].row * stride, n, draws[d]);
}

// x float32 [rows, n] by its stride -> out [rows]
void lorary_argmax_f32(const float* x, int64_t stride, int64_t rows, int64_t n, int64_t* out,
                       int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1 && threads > 1)
    for (int64_t r = 0; r < rows; ++r) out[r] = largest(x + r * stride, n);
}

}  // extern "C"
