// Attention over blocks for few query rows (decode, short chunks), with its log-sum-exp, and merge.
//
// Theory of operation. The work of a call is a line of (sequence, block) units, cut into equal lengths, one per
// thread. A thread walks the blocks of its length in order; inside a block it takes the K/V heads in order, since a
// block [K, B, D] is contiguous; per K/V head it takes up to four queries at once: dots with the keys, a running
// maximum and sum, then the values. While one [B, D] tile is used the next is fetched, across the hop to the next
// block too. A sequence cut between threads leaves one part per thread, and these are merged at the end.

#include "vectors.h"
#include <algorithm>
#include <vector>

namespace {

constexpr int MOST_BLOCK = 256;
#define LEAD 32
#ifndef AHEAD
#define AHEAD 1
#endif
constexpr float NONE = -INFINITY;

struct Question {
    const void *q, *k, *v;
    void *o;
    float *lse;
    const int32_t *rows, *positions, *spans, *blocks, *firsts;
    int64_t q_stride, k_stride, v_stride, pool_blocks;
    int sequences, heads, kv_heads, dim, size, window, most_rows, threads;
    float scale, soft_cap;
};

// Blocks [start, stop) of a sequence are seen by some of its rows; its units begin at `offset` of the line.
struct Work {
    int sequence, start, stop;
    int64_t offset;
};

// The running state of M = rows * group queries of every K/V head: acc [K, M, D] packed, top [K, M], total [K, M, W].
struct State {
    float *acc, *top, *total;
    void clear(int queries, int dim) {
        std::fill(acc, acc + int64_t(queries) * dim, 0.0f);
        std::fill(top, top + queries, NONE);
        std::fill(total, total + int64_t(queries) * W, 0.0f);
    }
    static int64_t floats(int queries, int dim) { return int64_t(queries) * (dim + W + 1) + 3 * W; }
    static State at(float *p, int queries, int dim) {
        return {p, p + int64_t(queries) * (dim + W), p + int64_t(queries) * dim};
    }
};

// acc[g] = acc[g] * keep[g] + sum over n rows of p[g][row] * v[row], for NV vectors of the row.
template <class T, int GQ, int NV>
ALWAYS void weigh(const T *v, const float *p, const float *keep, float *acc, int n, int dim, const T *ahead) {
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
        for (int g = 0; g < GQ; g++)
            for (int i = 0; i < NV; i++) sum[g][i] += x[i] * p[g * MOST_BLOCK + b];
    }
    for (int g = 0; g < GQ; g++)
        for (int i = 0; i < NV; i++) storeu(acc + g * dim + i * W, sum[g][i]);
}

// GQ queries over slots of one tile; query g sees slots [low[g], high[g]).
template <class T, int GQ>
void tile(const Question &ask, const T *k, const T *v, const T *k_ahead, const T *v_ahead, const float *q,
          const int *low, const int *high, float *acc, float *top, float *total) {
    const int dim = ask.dim;
    int first = low[0], last = high[0];
    bool even = true;
    for (int g = 1; g < GQ; g++) {
        if (low[g] != low[0] || high[g] != high[0]) even = false;
        if (low[g] >= high[g]) continue;
        if (first >= last) first = low[g], last = high[g];
        first = std::min(first, low[g]);
        last = std::max(last, high[g]);
    }
    if (first >= last) return;
    const int n = last - first, padded = (n + W - 1) / W * W;
    alignas(64) float p[GQ * MOST_BLOCK];
    alignas(64) float keep[GQ];
    k += int64_t(first) * dim;
    for (unsigned page = 0; page < ask.size * dim * sizeof(T); page += 4096)
        for (int line = 0; line < LEAD; line++) fetch((const char *)k_ahead + page + line * 64);
    for (int b = 0; b < n; b += W)
        dots<T, GQ>(k + int64_t(b) * dim, n - b, q, dim, p + b, MOST_BLOCK, k_ahead + int64_t(b) * dim);
    for (int g = 0; g < GQ; g++) {
        float *s = p + g * MOST_BLOCK;
        if (ask.soft_cap > 0)
            for (int b = 0; b < n; b += W) storeu(s + b, tanh_of(loadu<vf>(s + b) / ask.soft_cap) * ask.soft_cap);
        for (int b = n; b < padded; b++) s[b] = NONE;
        if (!even) {
            for (int b = 0; b < std::min(n, low[g] - first); b++) s[b] = NONE;
            for (int b = std::max(0, high[g] - first); b < n; b++) s[b] = NONE;
        }
        vf highest = loadu<vf>(s);
        for (int b = W; b < padded; b += W) highest = larger(highest, loadu<vf>(s + b));
        keep[g] = 1.0f;
        if (any_above(highest, top[g])) {
            float now = most(highest);
            keep[g] = top[g] == NONE ? 0.0f : std::exp(top[g] - now);
            top[g] = now;
        }
        const float at = top[g] == NONE ? 0.0f : top[g];
        vf mass = loadu<vf>(total + g * W) * keep[g];
        for (int b = 0; b < padded; b += W) {
            vf w = exp_of(loadu<vf>(s + b) - at);
            mass += w;
            storeu(s + b, w);
        }
        storeu(total + g * W, mass);
    }
    for (unsigned page = 0; page < ask.size * dim * sizeof(T); page += 4096)
        for (int line = 0; line < LEAD; line++) fetch((const char *)v_ahead + page + line * 64);
    v += int64_t(first) * dim;
    int i = 0;
    for (; i + 4 * W <= dim; i += 4 * W) weigh<T, GQ, 4>(v + i, p, keep, acc + i, n, dim, v_ahead + i * n);
    if (i + 2 * W <= dim) weigh<T, GQ, 2>(v + i, p, keep, acc + i, n, dim, v_ahead + i * n), i += 2 * W;
    if (i < dim) weigh<T, GQ, 1>(v + i, p, keep, acc + i, n, dim, v_ahead + i * n);
}

template <class T> void walk(const Question &ask, const Work &work, int start, int stop, float *q, State state) {
    const int row = ask.rows[work.sequence], count = ask.rows[work.sequence + 1] - row;
    const int group = ask.heads / ask.kv_heads, M = count * group, dim = ask.dim, size = ask.size;
    for (int kv = 0; kv < ask.kv_heads; kv++)
        for (int j = 0; j < M; j++)
            pack((const T *)ask.q + (row + j / group) * ask.q_stride + (kv * group + j % group) * dim,
                 q + (int64_t(kv) * M + j) * dim, dim, ask.scale);
    state.clear(M * ask.kv_heads, dim);
    std::vector<int> limits(2 * M);
    int *low = limits.data(), *high = low + M;
    const int at_once = (M + (M + 3) / 4 - 1) / ((M + 3) / 4);
    const int64_t step = int64_t(size) * dim;
    for (int e = start; e < stop; e++) {
        const T *k = (const T *)ask.k + ask.blocks[e] * ask.k_stride;
        const T *v = (const T *)ask.v + ask.blocks[e] * ask.v_stride;
        for (int j = 0; j < M; j++) {
            const int64_t p = ask.positions[row + j / group], first = ask.firsts[e];
            low[j] = ask.window > 0 ? int(std::clamp<int64_t>(p - ask.window + 1 - first, 0, size)) : 0;
            high[j] = int(std::clamp<int64_t>(p + 1 - first, 0, size));
        }
        for (int kv = 0; kv < ask.kv_heads; kv++) {
            const int then = kv + AHEAD, block = ask.blocks[std::min(e + then / ask.kv_heads, stop - 1)];
            const int64_t there = then % ask.kv_heads * step;
            const T *k_ahead = (const T *)ask.k + block * ask.k_stride + there;
            const T *v_ahead = (const T *)ask.v + block * ask.v_stride + there;
            for (int j = 0; j < M; j += at_once) {
                const int64_t at = int64_t(kv) * M + j;
                float *acc = state.acc + at * dim, *top = state.top + at, *total = state.total + at * W;
                const auto go = [&](auto run) {
                    run(ask, k + kv * step, v + kv * step, k_ahead, v_ahead, q + at * dim, low + j, high + j, acc, top,
                        total);
                };
                switch (std::min(at_once, M - j)) {
                case 1: go(tile<T, 1>); break;
                case 2: go(tile<T, 2>); break;
                case 3: go(tile<T, 3>); break;
                default: go(tile<T, 4>);
                }
            }
        }
    }
}

// The states of one sequence, made one and written out.
template <class T> void finish(const Question &ask, int sequence, const State *parts, int count) {
    const int row = ask.rows[sequence], M = (ask.rows[sequence + 1] - row) * (ask.heads / ask.kv_heads);
    const int group = ask.heads / ask.kv_heads, dim = ask.dim;
    for (int i = 0; i < M * ask.kv_heads; i++) {
        float top = NONE, mass = 0;
        for (int c = 0; c < count; c++) top = std::max(top, parts[c].top[i]);
        float *acc = parts[0].acc + int64_t(i) * dim;
        for (int c = 0; c < count; c++) {
            const float share = parts[c].top[i] == NONE ? 0.0f : std::exp(parts[c].top[i] - top);
            mass += share * sum(loadu<vf>(parts[c].total + int64_t(i) * W));
            const float *other = parts[c].acc + int64_t(i) * dim;
            if (c == 0 && share == 1.0f) continue;
            for (int d = 0; d < dim; d++) acc[d] = (c == 0 ? 0.0f : acc[d]) + share * other[d];
        }
        const int j = i % M, kv = i / M, r = row + j / group, head = kv * group + j % group;
        unpack(acc, (T *)ask.o + (int64_t(r) * ask.heads + head) * dim, dim, top == NONE ? 0.0f : 1.0f / mass);
        ask.lse[int64_t(r) * ask.heads + head] = top == NONE ? NONE : top + std::log(mass);
    }
}

template <class T> int attend(const Question &ask) {
    std::vector<Work> line;
    int64_t units = 0;
    int most = 0;
    for (int s = 0; s < ask.sequences; s++) {
        const int row = ask.rows[s], count = ask.rows[s + 1] - row;
        if (count <= 0 || count > ask.most_rows) continue;
        const int64_t youngest = ask.positions[row + count - 1];
        const int64_t oldest = ask.window > 0 ? int64_t(ask.positions[row]) - ask.window + 1 : INT64_MIN;
        const int32_t *from = ask.firsts + ask.spans[s], *to = ask.firsts + ask.spans[s + 1];
        const int start = int(std::partition_point(from, to, [&](int64_t f) { return f + ask.size <= oldest; }) - ask.firsts);
        const int stop = int(std::partition_point(ask.firsts + start, to, [&](int64_t f) { return f <= youngest; }) - ask.firsts);
        for (int e = start; e < stop; e++)
            if (ask.blocks[e] < 0 || ask.blocks[e] >= ask.pool_blocks) return 1;
        line.push_back({s, start, stop, units});
        units += stop - start;
        most = std::max(most, count * ask.heads);
    }
    const int64_t unit_bytes = int64_t(ask.kv_heads) * ask.size * ask.dim * 2 * sizeof(T);
    const int threads = int(std::clamp<int64_t>(units * unit_bytes >> 17, 1, ask.threads));
    const int64_t q_floats = int64_t(most) * ask.dim, state_floats = State::floats(most, ask.dim);
    const int64_t per_thread = q_floats + 2 * state_floats;
    static thread_local std::vector<float> scratch;
    if (int64_t(scratch.size()) < threads * per_thread) scratch.resize(threads * per_thread);
    float *const ground = scratch.data();
    struct Piece {
        int sequence;
        State state;
    };
    std::vector<Piece> pieces(2 * threads, {-1, {}});
    const auto run = [&](int t) {
        const int64_t from = units * t / threads, to = units * (t + 1) / threads;
        float *mine = ground + t * per_thread;
        int kept = 0;
        for (const Work &work : line) {
            const int64_t length = work.stop - work.start;
            const int64_t a = std::max(from, work.offset), b = std::min(to, work.offset + length);
            const int queries = (ask.rows[work.sequence + 1] - ask.rows[work.sequence]) * ask.heads;
            State state = State::at(mine + q_floats + kept * state_floats, queries, ask.dim);
            if (!length && t == 0) {
                state.clear(queries, ask.dim);
                finish<T>(ask, work.sequence, &state, 1);
            }
            if (a >= b) continue;
            walk<T>(ask, work, work.start + int(a - work.offset), work.start + int(b - work.offset), mine, state);
            if (b - a == length)
                finish<T>(ask, work.sequence, &state, 1);
            else
                pieces[2 * t + kept++] = {work.sequence, state};
        }
    };
    if (threads == 1) {
        run(0);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; t++) run(t);
    }
    std::vector<State> parts;
    for (size_t i = 0; i < pieces.size(); i++) {
        if (pieces[i].sequence < 0) continue;
        parts.push_back(pieces[i].state);
        size_t next = i + 1;
        while (next < pieces.size() && pieces[next].sequence < 0) next++;
        if (next < pieces.size() && pieces[next].sequence == pieces[i].sequence) continue;
        finish<T>(ask, pieces[i].sequence, parts.data(), int(parts.size()));
        parts.clear();
    }
    return 0;
}

template <class T>
void merge(const T *o_a, const float *lse_a, const T *o_b, const float *lse_b, T *o, float *lse, int64_t rows, int dim) {
    for (int64_t r = 0; r < rows; r++) {
        const float top = std::max(lse_a[r], lse_b[r]);
        const float a = lse_a[r] == NONE ? 0.0f : std::exp(lse_a[r] - top);
        const float b = lse_b[r] == NONE ? 0.0f : std::exp(lse_b[r] - top);
        const float share = a + b > 0 ? 1.0f / (a + b) : 0.0f;
        lse[r] = a + b > 0 ? top + std::log(a + b) : NONE;
        const T *x = o_a + r * dim, *y = o_b + r * dim;
        T *z = o + r * dim;
        for (int i = 0; i < dim; i += W) put_one(z + i, one(x + i) * (a * share) + one(y + i) * (b * share));
    }
}

} // namespace

extern "C" {

// 0, or 1 where the table names a block outside the pool. dtype: 0 float32, 1 bfloat16, 2 float16.
int attend_blocks(int dtype, const Question *ask) {
    switch (dtype) {
    case 0: return attend<float>(*ask);
    case 1: return attend<bf16>(*ask);
    default: return attend<f16>(*ask);
    }
}

void merge_parts(int dtype, const void *o_a, const float *lse_a, const void *o_b, const float *lse_b, void *o,
                 float *lse, int64_t rows, int dim) {
    switch (dtype) {
    case 0: return merge((const float *)o_a, lse_a, (const float *)o_b, lse_b, (float *)o, lse, rows, dim);
    case 1: return merge((const bf16 *)o_a, lse_a, (const bf16 *)o_b, lse_b, (bf16 *)o, lse, rows, dim);
    default: return merge((const f16 *)o_a, lse_a, (const f16 *)o_b, lse_b, (f16 *)o, lse, rows, dim);
    }
}

// Rows k, v [T, K, D] (row strides in bytes) to slots of blocks [N, K, B, D]; 1 where a slot is outside the pool.
int write_blocks(const char *k, const char *v, char *k_blocks, char *v_blocks, const int64_t *slots, int64_t tokens,
                 int64_t k_row, int64_t v_row, int64_t k_block, int64_t v_block, int64_t blocks, int heads, int size,
                 int64_t bytes) {
    for (int64_t t = 0; t < tokens; t++)
        if (slots[t] < 0 || slots[t] >= blocks * size) return 1;
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t block = slots[t] / size, offset = slots[t] % size * bytes;
        for (int h = 0; h < heads; h++) {
            std::memcpy(k_blocks + block * k_block + h * size * bytes + offset, k + t * k_row + h * bytes, bytes);
            std::memcpy(v_blocks + block * v_block + h * size * bytes + offset, v + t * v_row + h * bytes, bytes);
        }
    }
    return 0;
}
}
