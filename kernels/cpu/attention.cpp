// Attention over blocks with its log-sum-exp, and merge, and rows written into blocks.
//
// Theory of operation. Each sequence's rows are cut into bands of at most BAND queries per K/V head; a band and the
// blocks it sees are a work. All works form one line, each block of a work as long as it costs, cut into equal lengths,
// one per thread. A thread walks its length in order. A band of few queries (a decode) is bound by memory: block by
// block, and inside a block head by head, keys then values, as a store lays them, while the next [B, D] tiles are fetched,
// across the hop to the next block too. A band of many is bound by arithmetic: head by head, and block by block. A work
// cut between threads leaves one part per thread, and these are merged at the end.

#include "tiles.h"
#include <vector>

namespace {

constexpr int BAND = 192; // queries of a K/V head whose running state stays in the second-level cache
constexpr int KICK = 96; // elements of a far tile
constexpr int FEW = 12;  // queries up to which memory is the bound

struct Question {
    const void *q, *k, *v;
    void *o;
    float *lse;
    const int32_t *rows, *positions, *spans, *blocks, *firsts;
    int64_t q_stride, k_stride, v_stride, head_stride, pool_blocks;
    int sequences, heads, kv_heads, dim, size, window, threads;
    float scale, soft_cap;
    int group() const { return heads / kv_heads; }
};

// Rows [row, row + count) see blocks [start, stop); they begin at `offset` of the line and cost `cost` each.
struct Work {
    int row, count, start, stop, cost;
    int64_t offset;
    int cut(int64_t at) const {
        return int(std::clamp<int64_t>((at - offset + cost - 1) / cost, 0, stop - start)) + start;
    }
};

// The running state of all queries of a work, by K/V head: acc [K, M, D] packed, total [K, M, W], top [K, M].
struct State {
    float *acc, *total, *top;
    static int64_t floats(int64_t queries, int dim) { return queries * (dim + W + 1) + 2 * W; }
    static State at(float *p, int64_t queries, int dim) {
        return {p, p + queries * dim, p + queries * (dim + W)};
    }
    void clear(int64_t queries, int dim) {
        std::fill(acc, acc + queries * (dim + W), 0.0f);
        std::fill(top, top + queries, NONE);
    }
};

// What one thread needs beside the states: packed queries, bounds of what each query sees, and room for `walk_many`.
struct Room {
    float *q;
    Panel panel;
    int *low, *high;
    static int64_t floats(const Question &ask, int64_t queries) {
        const int64_t band = std::max<int64_t>(BAND, queries / ask.kv_heads);
        return queries * ask.dim + Panel::floats(ask.size, ask.dim, BAND) + 2 * band;
    }
    static Room at(float *p, const Question &ask, int64_t queries) {
        const int64_t band = std::max<int64_t>(BAND, queries / ask.kv_heads);
        float *panel = p + queries * ask.dim;
        int *low = (int *)(panel + Panel::floats(ask.size, ask.dim, BAND));
        return {p, Panel::at(panel, ask.size, ask.dim, BAND), low, low + band};
    }
};

// Of the slots of entries [e, stop), taken in order, each query sees [low, high).
void bounds(const Question &ask, const Work &work, int e, int stop, int *low, int *high) {
    const int group = ask.group(), M = work.count * group;
    const int64_t oldest = ask.positions[work.row], youngest = ask.positions[work.row + work.count - 1];
    if (ask.firsts[stop - 1] + ask.size - 1 <= oldest && (ask.window <= 0 || ask.firsts[e] > youngest - ask.window)) {
        std::fill(low, low + M, 0);
        std::fill(high, high + M, (stop - e) * ask.size);
        return;
    }
    for (int r = 0; r < work.count; r++) {
        const int64_t p = ask.positions[work.row + r];
        int from = 0, to = 0;
        for (int i = e; i < stop; i++) {
            const int64_t first = ask.firsts[i];
            if (ask.window > 0) from += int(std::clamp<int64_t>(p - ask.window + 1 - first, 0, ask.size));
            to += int(std::clamp<int64_t>(p + 1 - first, 0, ask.size));
        }
        std::fill(low + r * group, low + (r + 1) * group, from);
        std::fill(high + r * group, high + (r + 1) * group, to);
    }
}

template <class T>
void walk_few(const Question &ask, const Work &work, int start, int stop, const Room &room, State state) {
    const int M = work.count * ask.group(), dim = ask.dim, at_once = (M + (M + 3) / 4 - 1) / ((M + 3) / 4);
    const int64_t step = ask.head_stride;
    const T *const ks = (const T *)ask.k, *const vs = (const T *)ask.v;
    struct Tile {
        int e, kv;
    };
    const auto after = [&](Tile t) {
        return t.kv + 1 < ask.kv_heads ? Tile{t.e, t.kv + 1} : Tile{std::min(t.e + 1, stop - 1), 0};
    };
    const auto at = [&](const T *pool, int64_t stride, Tile t) {
        return pool + ask.blocks[t.e] * stride + t.kv * step;
    };
    for (int e = start; e < stop; e++) {
        bounds(ask, work, e, e + 1, room.low, room.high);
        for (int kv = 0; kv < ask.kv_heads; kv++) {
            const Tile now{e, kv}, next = after(now), far = after(next);
            const T *k = at(ks, ask.k_stride, now), *v = at(vs, ask.v_stride, now);
            const T *k_ahead = at(ks, ask.k_stride, next), *v_ahead = at(vs, ask.v_stride, next);
            const T *k_far = at(ks, ask.k_stride, far), *v_far = at(vs, ask.v_stride, far);
            for (int i = 0; i < KICK; i += 16) fetch(k_far + i), fetch(v_far + i); // so that the hardware follows
            for (int j = 0; j < M; j += at_once) {
                const int64_t i = int64_t(kv) * M + j;
                const auto go = [&](auto run) {
                    run(k, v, k_ahead, v_ahead, room.q + i * dim, dim, room.low + j, room.high + j, ask.soft_cap,
                        state.acc + i * dim, state.top + i, state.total + i * W);
                };
                switch (std::min(at_once, M - j)) {
                case 1: go(few<T, 1>); break;
                case 2: go(few<T, 2>); break;
                case 3: go(few<T, 3>); break;
                default: go(few<T, 4>);
                }
            }
        }
    }
}

template <class T>
void walk_many(const Question &ask, const Work &work, int start, int stop, const Room &room, State state) {
    const int M = work.count * ask.group(), dim = ask.dim, size = ask.size, at_once = room.panel.slots / size;
    const T *keys[MOST_BLOCK];
    for (int e = start; e < stop; e += at_once) {
        const int last = std::min(e + at_once, stop);
        bounds(ask, work, e, last, room.low, room.high);
        const int count = room.high[M - 1]; // what nobody sees may hold anything
        for (int kv = 0; kv < ask.kv_heads; kv++) {
            for (int i = 0; i < count; i++) {
                const int64_t block = ask.blocks[e + i / size], at = kv * ask.head_stride + i % size * dim;
                keys[i] = (const T *)ask.k + block * ask.k_stride + at;
                pack((const T *)ask.v + block * ask.v_stride + at, room.panel.values + i * dim, dim, 1.0f);
            }
            room.panel.lay_key_rows(keys, count, dim);
            const int64_t at = int64_t(kv) * M;
            room.panel.meet(room.q + at * dim, M, dim, count, room.low, room.high, ask.soft_cap, state.acc + at * dim,
                            state.top + at, state.total + at * W);
        }
    }
}

template <class T>
void walk(const Question &ask, const Work &work, int start, int stop, const Room &room, State state) {
    const int group = ask.group(), M = work.count * group, dim = ask.dim;
    for (int kv = 0; kv < ask.kv_heads; kv++)
        for (int j = 0; j < M; j++)
            pack((const T *)ask.q + (work.row + j / group) * ask.q_stride + (kv * group + j % group) * dim,
                 room.q + (int64_t(kv) * M + j) * dim, dim, ask.scale);
    state.clear(int64_t(M) * ask.kv_heads, dim);
    if (M <= FEW || M > BAND)
        walk_few<T>(ask, work, start, stop, room, state);
    else
        walk_many<T>(ask, work, start, stop, room, state);
}

// The states of one work, made one and written out.
template <class T> void finish(const Question &ask, const Work &work, const State *parts, int count) {
    const int group = ask.group(), M = work.count * group, dim = ask.dim;
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
        const int j = i % M, kv = i / M, r = work.row + j / group, head = kv * group + j % group;
        unpack(acc, (T *)ask.o + (int64_t(r) * ask.heads + head) * dim, dim, top == NONE ? 0.0f : 1.0f / mass);
        ask.lse[int64_t(r) * ask.heads + head] = top == NONE ? NONE : top + std::log(mass);
    }
}

// The line of works; nothing where a block that would be read is not in the pool.
bool line_up(const Question &ask, std::vector<Work> &line) {
    const int group = ask.group(), most = std::max(1, BAND / group);
    int64_t offset = 0;
    for (int s = 0; s < ask.sequences; s++) {
        for (int row = ask.rows[s]; row < ask.rows[s + 1]; row += most) {
            const int count = std::min(most, ask.rows[s + 1] - row);
            const int64_t youngest = ask.positions[row + count - 1];
            const int64_t oldest = ask.window > 0 ? int64_t(ask.positions[row]) - ask.window + 1 : INT64_MIN;
            const int32_t *from = ask.firsts + ask.spans[s], *to = ask.firsts + ask.spans[s + 1];
            from = std::partition_point(from, to, [&](int64_t f) { return f + ask.size <= oldest; });
            to = std::partition_point(from, to, [&](int64_t f) { return f <= youngest; });
            const int start = int(from - ask.firsts), stop = int(to - ask.firsts);
            for (int e = start; e < stop; e++)
                if (ask.blocks[e] < 0 || ask.blocks[e] >= ask.pool_blocks) return false;
            const int cost = std::max(FEW, count * group);
            line.push_back({row, count, start, stop, cost, offset});
            offset += int64_t(stop - start) * cost;
        }
    }
    return true;
}

template <class T> int attend(const Question &ask) {
    std::vector<Work> line;
    if (!line_up(ask, line)) return 1;
    if (line.empty()) return 0;
    int64_t queries = 0, units = line.back().offset + int64_t(line.back().stop - line.back().start) * line.back().cost;
    for (const Work &work : line) queries = std::max<int64_t>(queries, int64_t(work.count) * ask.heads);
    const int64_t unit_bytes = int64_t(ask.kv_heads) * ask.size * ask.dim * 2 * sizeof(T);
    const int threads = int(std::clamp<int64_t>(units / FEW * unit_bytes >> 17, 1, ask.threads));
    const int64_t room_floats = Room::floats(ask, queries), state_floats = State::floats(queries, ask.dim);
    const int64_t per_thread = room_floats + 2 * state_floats;
    static thread_local std::vector<float> scratch;
    if (int64_t(scratch.size()) < threads * per_thread) scratch.resize(threads * per_thread);
    float *const ground = scratch.data();
    struct Piece {
        int work;
        State state;
    };
    std::vector<Piece> pieces(2 * threads, {-1, {}});
    const auto run = [&](int t) {
        float *mine = ground + t * per_thread;
        const Room room = Room::at(mine, ask, queries);
        int kept = 0;
        for (size_t w = 0; w < line.size(); w++) {
            const Work &work = line[w];
            const int a = work.cut(units * t / threads), b = work.cut(units * (t + 1) / threads);
            const bool nothing = work.start == work.stop && t == 0;
            if (a >= b && !nothing) continue;
            State state = State::at(mine + room_floats + kept * state_floats, int64_t(work.count) * ask.heads, ask.dim);
            walk<T>(ask, work, a, b, room, state);
            if (b - a == work.stop - work.start)
                finish<T>(ask, work, &state, 1);
            else
                pieces[2 * t + kept++] = {int(w), state};
        }
    };
    if (threads == 1) {
        run(0);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; t++) run(t);
    }
    std::vector<State> parts;
    const auto unused = [](const Piece &piece) { return piece.work < 0; };
    pieces.erase(std::remove_if(pieces.begin(), pieces.end(), unused), pieces.end());
    for (size_t i = 0; i < pieces.size(); i++) {
        parts.push_back(pieces[i].state);
        if (i + 1 < pieces.size() && pieces[i + 1].work == pieces[i].work) continue;
        finish<T>(ask, line[pieces[i].work], parts.data(), int(parts.size()));
        parts.clear();
    }
    return 0;
}

template <class T>
void merge(const T *o_a, const float *lse_a, const T *o_b, const float *lse_b, T *o, float *lse, int64_t rows,
           int dim) {
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

// Rows k, v [T, K, D] to slots of blocks [N, K, B, D], strides in bytes; 1 where a slot is outside the pool.
int write_blocks(const char *k, const char *v, char *k_blocks, char *v_blocks, const int64_t *slots, int64_t tokens,
                 int64_t k_row, int64_t v_row, int64_t k_block, int64_t v_block, int64_t head, int64_t blocks,
                 int heads, int size, int64_t bytes) {
    for (int64_t t = 0; t < tokens; t++)
        if (slots[t] < 0 || slots[t] >= blocks * size) return 1;
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t block = slots[t] / size, offset = slots[t] % size * bytes;
        for (int h = 0; h < heads; h++) {
            std::memcpy(k_blocks + block * k_block + h * head + offset, k + t * k_row + h * bytes, bytes);
            std::memcpy(v_blocks + block * v_block + h * head + offset, v + t * v_row + h * bytes, bytes);
        }
    }
    return 0;
}
}
