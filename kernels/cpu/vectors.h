// Vectors of floats, whatever the machine's width, and rows of float32, bfloat16 or float16 read into them.
//
// A row of D elements is read two vectors at a time. For bfloat16 the first holds the even elements and the
// second the odd ones (one load, one shift, one mask); `pack` and `unpack` use the same order, so it never shows.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

#define ALWAYS inline __attribute__((always_inline))

template <class V> ALWAYS V loadu(const void *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V> ALWAYS void storeu(void *p, V v) { std::memcpy(p, &v, sizeof v); }
ALWAYS void fetch(const void *p) { __builtin_prefetch(p, 0, 2); } // into the second level
ALWAYS vf splat(float x) { return x - vf{}; }

// --- one row -----------------------------------------------------------------------------------------------

ALWAYS void pair(const float *p, vf &a, vf &b) {
    a = loadu<vf>(p);
    b = loadu<vf>(p + W);
}
ALWAYS vf one(const float *p) { return loadu<vf>(p); }
ALWAYS void put_pair(float *p, vf a, vf b) {
    storeu(p, a);
    storeu(p + W, b);
}
ALWAYS void put_one(float *p, vf a) { storeu(p, a); }

ALWAYS void pair(const bf16 *p, vf &a, vf &b) {
    vu both = loadu<vu>(p);
    a = (vf)(both << 16);
    b = (vf)(both & 0xffff0000u);
}
ALWAYS vf one(const bf16 *p) { return (vf)(__builtin_convertvector(loadu<vh>(p), vu) << 16); }
ALWAYS vu rounded(vf x) { // the nearest bfloat16, ties to even, in the upper half; NaN stays NaN
    vu u = (vu)x;
    vu r = u + 0x7fffu + ((u >> 16) & 1u);
    vu nan = (vu)(x != x);
    return ((r & ~nan) | (0x7fc00000u & nan)) & 0xffff0000u;
}
ALWAYS void put_pair(bf16 *p, vf a, vf b) { storeu(p, (rounded(a) >> 16) | rounded(b)); }
ALWAYS void put_one(bf16 *p, vf a) { storeu(p, __builtin_convertvector(rounded(a) >> 16, vh)); }

#if defined(__AVX512F__)
ALWAYS vf one(const f16 *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
ALWAYS void put_one(f16 *p, vf a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)a, 0)); }
#elif defined(__AVX2__) && defined(__F16C__)
ALWAYS vf one(const f16 *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
ALWAYS void put_one(f16 *p, vf a) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)a, 0)); }
#else
inline float widen(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude < 0x0400) {
        float tiny = float(magnitude) * 5.9604644775390625e-8f;
        return sign ? -tiny : tiny;
    }
    uint32_t u = magnitude >= 0x7c00 ? 0x7f800000u | (magnitude & 0x3ff) << 13 : (magnitude << 13) + 0x38000000u;
    u |= sign;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
inline uint16_t narrow(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    uint16_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;
    if (u >= 0x477ff000) return sign | 0x7c00;
    if (u < 0x38800000) {
        std::memcpy(&x, &u, 4);
        return sign | uint16_t(std::nearbyint(x * 16777216.0f));
    }
    return sign | uint16_t((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
}
ALWAYS vf one(const f16 *p) {
    vf a;
    for (int i = 0; i < W; i++) a[i] = widen(p[i].bits);
    return a;
}
ALWAYS void put_one(f16 *p, vf a) {
    for (int i = 0; i < W; i++) p[i].bits = narrow(a[i]);
}
#endif
ALWAYS void pair(const f16 *p, vf &a, vf &b) {
    a = one(p);
    b = one(p + W);
}
ALWAYS void put_pair(f16 *p, vf a, vf b) {
    put_one(p, a);
    put_one(p + W, b);
}

template <class T> inline void pack(const T *in, float *out, int n, float scale) {
    int i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        vf a, b;
        pair(in + i, a, b);
        put_pair(out + i, a * scale, b * scale);
    }
    if (i < n) put_one(out + i, one(in + i) * scale);
}
template <class T> inline void unpack(const float *in, T *out, int n, float scale) {
    int i = 0;
    for (; i + 2 * W <= n; i += 2 * W) put_pair(out + i, one(in + i) * scale, one(in + i + W) * scale);
    if (i < n) put_one(out + i, one(in + i) * scale);
}

// --- across lanes ------------------------------------------------------------------------------------------

// Lane i of the result is lane which[i] of x followed by y.
ALWAYS vf shuffle(vf x, vf y, vi which) {
#if defined(__clang__)
    vf z;
    for (int lane = 0; lane < W; lane++) z[lane] = which[lane] < W ? x[which[lane]] : y[which[lane] - W];
    return z;
#else
    return __builtin_shuffle(x, y, which);
#endif
}

// x and y each hold W / P groups of P lanes; the result holds x's groups then y's, each folded to P / 2 lanes.
template <int P> ALWAYS vf fold(vf x, vf y) {
    vi low, high;
    for (int lane = 0; lane < W; lane++) {
        int group = lane / (P / 2), within = lane % (P / 2);
        low[lane] = group * P + within;
        high[lane] = low[lane] + P / 2;
    }
    return shuffle(x, y, low) + shuffle(x, y, high);
}
// N vectors, each of groups of P lanes, as one vector of groups of P / N lanes: group i of x[0], of x[1], ...
template <int N, int P> ALWAYS vf folded(const vf *x) {
    if constexpr (N == 1) {
        return x[0];
    } else {
        return fold<2 * P / N>(folded<N / 2, P>(x), folded<N / 2, P>(x + N / 2));
    }
}
// A W x W matrix, turned: x[i][j] becomes x[j][i], by log2(W) perfect shuffles.
ALWAYS void turn(vf *x) {
    vi low, high;
    for (int lane = 0; lane < W; lane++) {
        low[lane] = lane / 2 + lane % 2 * W;
        high[lane] = low[lane] + W / 2;
    }
    for (int round = 1; round < W; round *= 2) {
        vf y[W];
        for (int i = 0; i < W / 2; i++) {
            y[2 * i] = shuffle(x[i], x[i + W / 2], low);
            y[2 * i + 1] = shuffle(x[i], x[i + W / 2], high);
        }
        for (int i = 0; i < W; i++) x[i] = y[i];
    }
}
ALWAYS float sum(vf x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}
#if defined(__AVX512F__)
ALWAYS float most(vf x) { return _mm512_reduce_max_ps((__m512)x); }
ALWAYS bool any_above(vf x, float y) { return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(y), _CMP_GT_OQ); }
#else
ALWAYS float most(vf x) {
    float top = x[0];
    for (int i = 1; i < W; i++) top = top > x[i] ? top : x[i];
    return top;
}
ALWAYS bool any_above(vf x, float y) { return most(x) > y; }
#endif
ALWAYS vf larger(vf a, vf b) { return a > b ? a : b; }

// exp, to 2 units in the last place, of x <= 88; 0 below -87.
ALWAYS vf exp_of(vf x) {
    vf n = x * 1.44269504088896341f;
    n = (n + 12582912.0f) - 12582912.0f; // the nearest integer, while |n| < 2^22
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    vf result = y * (vf)power;
    return x < -87.0f ? vf{} : result;
}
ALWAYS vf tanh_of(vf x) {
    vf bounded = x > 15.0f ? splat(15.0f) : x < -15.0f ? splat(-15.0f) : x;
    return 1.0f - 2.0f / (exp_of(bounded * 2.0f) + 1.0f);
}

// --- many rows ---------------------------------------------------------------------------------------------

// Of W accumulators: how many rows are taken at once by GQ queries.
template <int GQ> constexpr int rows_at_once() { return GQ == 1 ? W : GQ == 2 ? W / 2 : W / 4; }

// out[g * stride + b] = rows[b] . q[g] for W rows from `row` on, of which `count` exist, and packed q [GQ, n].
// What a later call will read, `ahead`, is fetched meanwhile.
template <class T, int GQ>
ALWAYS void dots(const T *row, int count, const float *q, int n, float *out, int stride, const T *ahead) {
    constexpr int NB = rows_at_once<GQ>(), TIMES = W / NB;
    vf parts[GQ][TIMES] = {};
    for (int time = 0; time < TIMES; time++) {
        if (time * NB >= count) break;
        const T *rows[NB];
        for (int b = 0; b < NB; b++) rows[b] = row + int64_t(time * NB + b < count ? time * NB + b : count - 1) * n;
        const T *next = ahead + int64_t(time) * NB * n;
        vf acc[GQ][NB] = {};
        int i = 0;
        for (; i + 2 * W <= n; i += 2 * W) {
            for (int b = 0; b < NB; b++) {
                vf x, y;
                pair(rows[b] + i, x, y);
                fetch(next);
                if (sizeof(T) * 2 * W > 64) fetch(next + W);
                next += 2 * W;
                for (int g = 0; g < GQ; g++) {
                    acc[g][b] += x * loadu<vf>(q + g * n + i);
                    acc[g][b] += y * loadu<vf>(q + g * n + i + W);
                }
            }
        }
        if (i < n) {
            for (int b = 0; b < NB; b++) {
                const vf x = one(rows[b] + i);
                for (int g = 0; g < GQ; g++) acc[g][b] += x * loadu<vf>(q + g * n + i);
            }
        }
        for (int g = 0; g < GQ; g++) parts[g][time] = folded<NB, W>(acc[g]);
    }
    for (int g = 0; g < GQ; g++) storeu(out + g * stride, folded<TIMES, TIMES>(parts[g]));
}

} // namespace
