// How the threads of a team share a loop's turns, each knowing its next one before it begins with the last, and how
// they ask for memory long before.
#pragma once

#include <omp.h>

#include <cstdint>
#include <utility>
#include <vector>

// Called by every thread of a parallel region, which all leave together: run(turn, next) for all of `count` turns,
// some of them by each thread. `next` is what this thread runs after it, so that memory can be asked for meanwhile;
// -1 if that is nothing. A thread's first turn is told before it is run, as run(-1, turn). `few` neighbours are taken
// at once. Thread t begins with turns [t * own, (t + 1) * own), which no other takes.
template <typename Run>
void share(int64_t count, int64_t few, Run run, int64_t own = 0) {
    int64_t taken = -1;
    const int64_t first = own * omp_get_thread_num(), shared = own * omp_get_num_threads();
    for (int64_t turn = first; turn < first + own; ++turn) {
        run(taken, turn);
        taken = turn;
    }
#pragma omp for schedule(dynamic, few) nowait
    for (int64_t turn = shared; turn < count; ++turn) {
        run(taken, turn);
        taken = turn;
    }
    if (taken >= 0) run(taken, -1);
#pragma omp barrier
}

// Memory that one thread will read after what it does now, for that to ask for by the way.
class Later {
   public:
    template <typename T>
    void add(const T* from, int64_t n) {
        const char *begin = reinterpret_cast<const char*>(from), *end = reinterpret_cast<const char*>(from + n);
        if (!stretches_.empty() && stretches_.back().second == begin) {
            stretches_.back().second = end;
        } else {
            stretches_.emplace_back(begin, end);
        }
    }

    // The next `bytes`, which may reach beyond a stretch's end; `instead` when all have been taken.
    const void* take(int64_t bytes, const void* instead) {
        if (at_ >= end_) {
            if (next_ == stretches_.size()) return instead;
            at_ = stretches_[next_].first;
            end_ = stretches_[next_++].second;
        }
        return std::exchange(at_, at_ + bytes);
    }

   private:
    std::vector<std::pair<const char*, const char*>> stretches_;
    size_t next_ = 0;
    const char *at_ = nullptr, *end_ = nullptr;
};
