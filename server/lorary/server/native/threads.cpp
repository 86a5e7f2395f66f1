// Where the threads of the calling thread's OpenMP team run.

#include <cstdint>

#include <omp.h>
#include <sched.h>

extern "C" {

// Pin thread i of the caller's team to cpus[i]; return how many were pinned. The team of a thread
// is kept by the runtime, so this holds for every later parallel region of the same width that the
// caller opens, torch's among them.
int lorary_pin_team(const int32_t* cpus, int count) {
    int pinned = 0;
#pragma omp parallel num_threads(count) reduction(+ : pinned)
    {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpus[omp_get_thread_num()], &set);
        pinned += sched_setaffinity(0, sizeof set, &set) == 0;
    }
    return pinned;
}

}  // extern "C"
