// What a load does with an adapter's matrices: see whether their numbers are sane, and lay their rows into
// the pool's pages. One thread, without Python's interpreter: loads stand back behind the engine's steps.

#include <algorithm>
#include <cstring>

#include "common.h"

namespace {

// Elements whose squares are summed in float32; the sums of these, in double precision.
constexpr int64_t kPiece = 4096;
// Outputs of B that are turned at once: what is read of them stays in the first cache.
constexpr int64_t kTurned = 64;

// A file's tensors may begin at any byte.
template <typename T>
T at(const uint8_t* from, int64_t i) {
    T value;
    std::memcpy(&value, from + i * static_cast<int64_t>(sizeof(T)), sizeof value);
    return value;
}

template <typename T>
double squares(const uint8_t* from, int64_t count) {
    double total = 0;
    for (int64_t start = 0; start < count; start += kPiece) {
        const int64_t stop = std::min(count, start + kPiece);
        Lanes sums = {};
        int64_t i = start;
        for (; i + kLanes <= stop; i += kLanes) {
            T some[kLanes];
            std::memcpy(some, from + i * static_cast<int64_t>(sizeof(T)), sizeof some);
            const Lanes lanes = widen(some);
            sums += lanes * lanes;
        }
        double rest = sum_of(sums);
        for (; i < stop; ++i) {
            const T one = at<T>(from, i);
            const double value = load(&one);
            rest += value * value;
        }
        total += rest;
    }
    return total;
}

// One module; the same structure as in library.py.
struct Part {
    const uint8_t* a;  // [rank, in], or null: the adapter leaves the module alone
    const uint8_t* b;  // [out, rank]
    int64_t is_half;   // both are bfloat16; else float32
    int64_t rank, in, out;
    uint8_t* to_a;  // [capacity, in] of the pool
    uint8_t* to_b;  // [capacity, out]
};

template <typename From, typename To>
void lay(const Part& part, const int64_t* rows, int64_t rank) {
    To* to_a = reinterpret_cast<To*>(part.to_a);
    To* to_b = reinterpret_cast<To*>(part.to_b);
    const int64_t own = part.a ? part.rank : 0;
    for (int64_t r = own; r < rank; ++r) {
        std::memset(to_a + rows[r] * part.in, 0, part.in * sizeof(To));
        std::memset(to_b + rows[r] * part.out, 0, part.out * sizeof(To));
    }
    for (int64_t r = 0; r < own; ++r) {
        To* row = to_a + rows[r] * part.in;
        const uint8_t* from = part.a + r * part.in * static_cast<int64_t>(sizeof(From));
        for (int64_t i = 0; i < part.in; ++i) {
            const From value = at<From>(from, i);
            if constexpr (std::is_same_v<From, To>) row[i] = value;
            else store(row + i, load(&value));
        }
    }
    for (int64_t first = 0; first < part.out; first += kTurned) {
        const int64_t last = std::min(part.out, first + kTurned);
        for (int64_t r = 0; r < own; ++r) {
            To* row = to_b + rows[r] * part.out;
            for (int64_t o = first; o < last; ++o) {
                const From value = at<From>(part.b, o * own + r);
                if constexpr (std::is_same_v<From, To>) row[o] = value;
                else store(row + o, load(&value));
            }
        }
    }
}

template <typename To>
void lay_all(const Part* parts, int64_t count, const int64_t* rows, int64_t rank) {
    for (int64_t i = 0; i < count; ++i) {
        if (parts[i].is_half) lay<uint16_t, To>(parts[i], rows, rank);
        else lay<float, To>(parts[i], rows, rank);
    }
}

}  // namespace

extern "C" {

int64_t lorary_part_bytes() { return sizeof(Part); }

// sums[t] = sum of x^2 over the counts[t] elements of data from byte starts[t] on; NaN or infinite where an x
// is, or where a square is beyond float32.
void lorary_squares(const uint8_t* data, int64_t tensors, const int64_t* starts, const int64_t* counts,
                    const int64_t* is_half, double* sums) {
    for (int64_t t = 0; t < tensors; ++t) {
        const uint8_t* from = data + starts[t];
        sums[t] = is_half[t] ? squares<uint16_t>(from, counts[t]) : squares<float>(from, counts[t]);
    }
}

// For every part, with j < rank: to_a[rows[j]] = a[j] and to_b[rows[j]] = b[:, j], rounded to the pool's dtype;
// zeros from the part's own rank on.
void lorary_lay_f32(const Part* parts, int64_t count, const int64_t* rows, int64_t rank) {
    lay_all<float>(parts, count, rows, rank);
}

void lorary_lay_bf16(const Part* parts, int64_t count, const int64_t* rows, int64_t rank) {
    lay_all<uint16_t>(parts, count, rows, rank);
}

}  // extern "C"
