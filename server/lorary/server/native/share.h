// How the threads of a team share a loop's turns, each knowing its next one before it begins with the last.
#pragma once

#include <omp.h>

#include <cstdint>

// Called by every thread of a parallel region, which all leave together: run(turn, next) for all of `count` turns,
// some of them by each thread. `next` is what this thread runs after it, so that memory can be asked for meanwhile;
// -1 if that is nothing. A thread's first turn is told before it is run, as run(-1, turn). `few` neighbours are taken
// at once.
template <typename Run>
void share(int64_t count, int64_t few, Run run) {
    int64_t taken = -1;
#pragma omp for schedule(dynamic, few) nowait
    for (int64_t turn = 0; turn < count; ++turn) {
        run(taken, turn);
        taken = turn;
    }
    if (taken >= 0) run(taken, -1);
#pragma omp barrier
}
