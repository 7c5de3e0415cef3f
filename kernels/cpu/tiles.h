// Attention of some queries over one [B, D] tile of K and V, with a running maximum.

#pragma once
#include "vectors.h"
#include <algorithm>

namespace {

constexpr int MOST_BLOCK = 256;
constexpr int LEAD = 3; // lines of V fetched per query between keys and values, when memory would idle
constexpr float NONE = -INFINITY;

// acc[g] = acc[g] * keep[g] + sum over n rows of p[g][row] * v[row], for NV vectors of the row.
template <class T, int GQ, int NV>
ALWAYS void weigh(const T *v, const float *p, int stride, const float *keep, float *acc, int n, int dim,
                  const T *ahead) {
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

// Scores s[0:count], seen from `low` to `high`, become weights under the running maximum `top`; `total` [W] grows.
// Returns by how much what was summed before shrinks.
ALWAYS float weights(float *s, int count, int low, int high, float soft_cap, float &top, float *total) {
    const int padded = (count + W - 1) / W * W;
    if (soft_cap > 0)
        for (int b = 0; b < count; b += W) storeu(s + b, tanh_of(loadu<vf>(s + b) / soft_cap) * soft_cap);
    for (int b = 0; b < std::min(low, count); b++) s[b] = NONE;
    for (int b = std::clamp(high, 0, count); b < padded; b++) s[b] = NONE;
    vf highest = loadu<vf>(s);
    for (int b = W; b < padded; b += W) highest = larger(highest, loadu<vf>(s + b));
    float keep = 1.0f;
    if (any_above(highest, top)) {
        const float now = most(highest);
        keep = top == NONE ? 0.0f : std::exp(top - now);
        top = now;
    }
    const float at = top == NONE ? 0.0f : top;
    vf mass = loadu<vf>(total) * keep;
    for (int b = 0; b < padded; b += W) {
        const vf w = exp_of(loadu<vf>(s + b) - at);
        mass += w;
        storeu(s + b, w);
    }
    storeu(total, mass);
    return keep;
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
        keep[g] = weights(p + g * MOST_BLOCK, n, low[g] - first, high[g] - first, soft_cap, top[g], total + g * W);
    }
    weigh_all<T, GQ>(v + int64_t(first) * dim, p, MOST_BLOCK, keep, acc, n, dim, v_ahead + LEAD * GQ * 64 / sizeof(T));
}

// out[m * stride + lane] = sum over i of q[m * n + i] * turned[i][lane], for NQ queries.
template <int NQ> ALWAYS void columns(const float *turned, const float *q, int n, float *out, int stride) {
    vf acc[NQ] = {};
    for (int i = 0; i < n; i++) {
        const vf x = loadu<vf>(turned + i * W);
        for (int m = 0; m < NQ; m++) acc[m] += x * q[m * n + i];
    }
    for (int m = 0; m < NQ; m++) storeu(out + m * stride, acc[m]);
}

// Many queries, arithmetic-bound: keys are turned once so that a vector holds one dimension of W keys.
// `turned` [D, W] and `p` [M, B + W] and `keep` [M] are scratch.
template <class T>
void many(const T *k, const T *v, const float *q, int M, int dim, int size, const int *low, const int *high,
          float soft_cap, float *acc, float *top, float *total, float *turned, float *p, float *keep) {
    int first, last;
    hull(low, high, M, first, last);
    if (first >= last) return;
    const int n = last - first, stride = size + W;
    k += int64_t(first) * dim;
    for (int b = 0; b < n; b += W) {
        const T *rows[W];
        for (int i = 0; i < W; i++) rows[i] = k + int64_t(std::min(b + i, n - 1)) * dim;
        int d = 0;
        for (; d + 2 * W <= dim; d += 2 * W) {
            vf x[W], y[W];
            for (int i = 0; i < W; i++) pair(rows[i] + d, x[i], y[i]);
            turn(x);
            turn(y);
            for (int i = 0; i < W; i++) storeu(turned + (d + i) * W, x[i]), storeu(turned + (d + W + i) * W, y[i]);
        }
        if (d < dim) {
            vf x[W];
            for (int i = 0; i < W; i++) x[i] = one(rows[i] + d);
            turn(x);
            for (int i = 0; i < W; i++) storeu(turned + (d + i) * W, x[i]);
        }
        constexpr int NQ = W == 16 ? 12 : 8;
        int m = 0;
        for (; m + NQ <= M; m += NQ) columns<NQ>(turned, q + m * dim, dim, p + m * stride + b, stride);
        for (; m + 4 <= M; m += 4) columns<4>(turned, q + m * dim, dim, p + m * stride + b, stride);
        for (; m < M; m++) columns<1>(turned, q + m * dim, dim, p + m * stride + b, stride);
    }
    for (int m = 0; m < M; m++)
        keep[m] = weights(p + m * stride, n, low[m] - first, high[m] - first, soft_cap, top[m], total + m * W);
    v += int64_t(first) * dim;
    int m = 0;
    for (; m + 4 <= M; m += 4) weigh_all<T, 4>(v, p + m * stride, stride, keep + m, acc + m * dim, n, dim, v);
    for (; m < M; m++) weigh_all<T, 1>(v, p + m * stride, stride, keep + m, acc + m * dim, n, dim, v);
}

} // namespace
