// Attention of some queries over one [B, D] tile of K and V, with a running maximum.

#pragma once
#include "vectors.h"
#include <algorithm>

namespace {

constexpr int MOST_BLOCK = 256;
constexpr int LEAD = 3; // lines of V fetched per query between keys and values, when memory would idle
constexpr float NONE = -INFINITY;

// acc[g] = acc[g] * keep[g] + sum over n rows of p[g][row] * v[row], for NV vectors of the row. What a later call will
// read, `ahead`, is fetched meanwhile, unless that is `v`.
template <class T, int GQ, int NV>
ALWAYS void weigh(const T *v, const float *p, int stride, const float *keep, float *acc, int n, int dim,
                  const T *ahead) {
    const bool fetching = ahead != v;
    vf sum[GQ][NV];
    for (int g = 0; g < GQ; g++)
        for (int i = 0; i < NV; i++) sum[g][i] = loadu<vf>(acc + g * dim + i * W) * keep[g];
    for (int b = 0; b < n; b++, v += dim, ahead += NV * W) {
        vf x[NV];
        if constexpr (NV == 1) {
            x[0] = one(v);
        } else {
            for (int i = 0; i < NV; i += 2) pair(v + i * W, x[i], x[i + 1]);
        }
        if (fetching)
            for (unsigned line = 0; line < NV * W * sizeof(T); line += 64) fetch((const char *)ahead + line);
        for (int g = 0; g < GQ; g++)
            for (int i = 0; i < NV; i++) sum[g][i] += x[i] * p[g * stride + b];
    }
    for (int g = 0; g < GQ; g++)
        for (int i = 0; i < NV; i++) storeu(acc + g * dim + i * W, sum[g][i]);
}

template <class T, int GQ>
ALWAYS void weigh_all(const T *v, const float *p, int stride, const float *keep, float *acc, int n, int dim,
                      const T *ahead) {
    int i = 0;
    for (; i + 4 * W <= dim; i += 4 * W) weigh<T, GQ, 4>(v + i, p, stride, keep, acc + i, n, dim, ahead + i * n);
    if (i + 2 * W <= dim) weigh<T, GQ, 2>(v + i, p, stride, keep, acc + i, n, dim, ahead + i * n), i += 2 * W;
    if (i < dim) weigh<T, GQ, 1>(v + i, p, stride, keep, acc + i, n, dim, ahead + i * n);
}

// Scores s[0:count], seen from `low` to `high`, are capped and masked up to whole vectors, and the running maximum `top`
// rises to them. Returns by how much what was summed before shrinks.
ALWAYS float rise(float *s, int count, int low, int high, float soft_cap, float &top) {
    const int padded = (count + W - 1) / W * W;
    if (soft_cap > 0)
        for (int b = 0; b < count; b += W) storeu(s + b, tanh_of(loadu<vf>(s + b) / soft_cap) * soft_cap);
    for (int b = 0; b < std::min(low, count); b++) s[b] = NONE;
    for (int b = std::clamp(high, 0, count); b < padded; b++) s[b] = NONE;
    vf highest = loadu<vf>(s);
    for (int b = W; b < padded; b += W) highest = larger(highest, loadu<vf>(s + b));
    if (!any_above(highest, top)) return 1.0f;
    const float before = top;
    top = most(highest);
    return before == NONE ? 0.0f : std::exp(before - top);
}

// Scores become weights under the maximum, and `total` [W] their sum. No branches: several queries overlap.
ALWAYS void weights(float *s, int count, float keep, float top, float *total) {
    const float at = top == NONE ? 0.0f : top;
    vf mass = loadu<vf>(total) * keep;
    for (int b = 0; b < count; b += W) {
        const vf w = exp_of(loadu<vf>(s + b) - at);
        mass += w;
        storeu(s + b, w);
    }
    storeu(total, mass);
}

// Slots [first, last) are seen by some query; query g sees [low[g], high[g]).
ALWAYS void hull(const int *low, const int *high, int count, int &first, int &last) {
    first = last = 0;
    for (int g = 0; g < count; g++) {
        if (low[g] >= high[g]) continue;
        first = first < last ? std::min(first, low[g]) : low[g];
        last = std::max(last, high[g]);
    }
}

// GQ queries, up to four: each key is read once, and memory is what bounds it.
template <class T, int GQ>
void few(const T *k, const T *v, const T *k_ahead, const T *v_ahead, const float *q, int dim, const int *low,
         const int *high, float soft_cap, float *acc, float *top, float *total) {
    int first, last;
    hull(low, high, GQ, first, last);
    if (first >= last) return;
    const int n = last - first;
    alignas(64) float p[GQ * MOST_BLOCK];
    float keep[GQ];
    k += int64_t(first) * dim;
    for (int b = 0; b < n; b += W)
        dots<T, GQ>(k + int64_t(b) * dim, n - b, q, dim, p + b, MOST_BLOCK, k_ahead + int64_t(b) * dim);
    for (int g = 0; g < GQ; g++) {
        for (int line = 0; line < LEAD; line++) fetch((const char *)v_ahead + (g * LEAD + line) * 64);
        keep[g] = rise(p + g * MOST_BLOCK, n, low[g] - first, high[g] - first, soft_cap, top[g]);
    }
    for (int g = 0; g < GQ; g++) weights(p + g * MOST_BLOCK, n, keep[g], top[g], total + g * W);
    weigh_all<T, GQ>(v + int64_t(first) * dim, p, MOST_BLOCK, keep, acc, n, dim, v_ahead + LEAD * GQ * 64 / sizeof(T));
}

// out[m * stride + j * W + lane] = sum over i of q[m * n + i] * turned[j][i][lane], for NQ queries and NK * W keys.
template <int NQ, int NK> ALWAYS void columns(const float *turned, const float *q, int n, float *out, int stride) {
    vf acc[NQ][NK] = {};
    for (int i = 0; i < n; i++) {
        vf x[NK];
        for (int j = 0; j < NK; j++) x[j] = loadu<vf>(turned + (j * n + i) * W);
        for (int m = 0; m < NQ; m++)
            for (int j = 0; j < NK; j++) acc[m][j] += x[j] * q[m * n + i];
    }
    for (int m = 0; m < NQ; m++)
        for (int j = 0; j < NK; j++) storeu(out + m * stride + j * W, acc[m][j]);
}
template <int NK> ALWAYS void all_columns(const float *turned, const float *q, int M, int n, float *out, int stride) {
    constexpr int NQ = W == 16 ? 8 : 4;
    int m = 0;
    for (; m + NQ <= M; m += NQ) columns<NQ, NK>(turned, q + m * n, n, out + m * stride, stride);
    for (; m < M; m++) columns<1, NK>(turned, q + m * n, n, out + m * stride, stride);
}

// Slots of one K/V head, gathered from as many blocks as fit, for work bound by arithmetic.
struct Panel {
    static constexpr int SLOTS = 64; // or one block, where that is larger
    float *turned;                   // keys [slots / W, D, W]: a vector holds one dimension of W keys
    float *values;                   // [slots, D]
    float *p;                        // scores of each query [M, slots + W]
    float *keep;                     // [M]
    int slots;

    static int room(int size) { return (std::max(SLOTS, size) + W - 1) / W * W; }
    static int64_t floats(int size, int dim, int queries) {
        return int64_t(2 * dim + queries) * room(size) + queries * (W + 1);
    }
    static Panel at(float *ground, int size, int dim, int queries) {
        const int slots = room(size);
        float *values = ground + dim * slots, *p = values + dim * slots;
        return {ground, values, p, p + int64_t(queries) * (slots + W), slots};
    }

    template <class T> void lay_key_rows(const T *const *rows, int count, int dim) const {
        for (int b = 0; b < count; b += W) {
            const auto row = [&](int i) { return rows[std::min(b + i, count - 1)]; };
            float *to = turned + b * dim;
            int d = 0;
            for (; d + 2 * W <= dim; d += 2 * W) {
                vf x[W], y[W];
                for (int i = 0; i < W; i++) pair(row(i) + d, x[i], y[i]);
                turn(x);
                turn(y);
                for (int i = 0; i < W; i++) storeu(to + (d + i) * W, x[i]), storeu(to + (d + W + i) * W, y[i]);
            }
            if (d < dim) {
                vf x[W];
                for (int i = 0; i < W; i++) x[i] = one(row(i) + d);
                turn(x);
                for (int i = 0; i < W; i++) storeu(to + (d + i) * W, x[i]);
            }
        }
    }

    // M queries, packed, meet the first `count` slots; query m sees [low[m], high[m]).
    void meet(const float *q, int M, int dim, int count, const int *low, const int *high, float soft_cap, float *acc,
              float *top, float *total) const {
        const int stride = slots + W;
        int b = 0;
        for (; b + W < count; b += 2 * W) all_columns<2>(turned + b * dim, q, M, dim, p + b, stride);
        if (b < count) all_columns<1>(turned + b * dim, q, M, dim, p + b, stride);
        for (int m = 0; m < M; m++) keep[m] = rise(p + m * stride, count, low[m], high[m], soft_cap, top[m]);
        for (int m = 0; m < M; m++) weights(p + m * stride, count, keep[m], top[m], total + m * W);
        int m = 0;
        for (; m + 4 <= M; m += 4)
            weigh_all<float, 4>(values, p + m * stride, stride, keep + m, acc + m * dim, count, dim, values);
        for (; m < M; m++)
            weigh_all<float, 1>(values, p + m * stride, stride, keep + m, acc + m * dim, count, dim, values);
    }
};

} // namespace
