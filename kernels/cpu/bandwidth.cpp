// Reading memory as fast as it goes: the yardstick of the benchmarks.

#include "vectors.h"

extern "C" float read_floats(const float *p, int64_t count, int threads) {
    float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        const int64_t share = count / threads / (8 * W) * (8 * W), start = share * t, stop = start + share;
        vf sums[8] = {};
        for (int64_t i = start; i < stop; i += 8 * W) {
            __builtin_prefetch(p + i + 1024);
            for (int j = 0; j < 8; j++) {
                if (j * W % 16 == 0) __builtin_prefetch(p + i + j * W + 1024);
                sums[j] += one(p + i + j * W);
            }
        }
        for (int j = 0; j < 8; j++) total += sum(sums[j]);
    }
    return total;
}
