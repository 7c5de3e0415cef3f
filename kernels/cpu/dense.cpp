// The dense pieces of a decoder: norms, rotation, gated activations, a matrix times a few rows, and both halves of a
// layer made of these, for few rows, where calls from outside would cost as much as the work.

#include "vectors.h"
#include <algorithm>
#include <vector>

namespace {

// Calls with less work than this run on one thread.
constexpr int64_t ENOUGH = 1 << 16;

template <class T> struct Norm {
    const T *x, *residual, *weight;
    T *normed, *total;
    int64_t rows, x_stride, residual_stride;
    int width, threads;
    float eps, plus;
};

template <class T> void normalise(const Norm<T> &a) {
#pragma omp parallel for num_threads(a.threads) if (a.rows * a.width > ENOUGH)
    for (int64_t r = 0; r < a.rows; r++) {
        const T *x = a.x + r * a.x_stride;
        vf square = {};
        if (a.residual) {
            const T *other = a.residual + r * a.residual_stride;
            T *total = a.total + r * a.width;
            for (int i = 0; i < a.width; i += W) put_one(total + i, one(x + i) + one(other + i));
            x = total;
        }
        for (int i = 0; i < a.width; i += W) {
            const vf y = one(x + i);
            square += y * y;
        }
        const float scale = 1.0f / std::sqrt(sum(square) / a.width + a.eps);
        T *normed = a.normed + r * a.width;
        for (int i = 0; i < a.width; i += W) put_one(normed + i, one(x + i) * scale * (one(a.weight + i) + a.plus));
    }
}

template <class T>
void rotate(T *x, const float *cos, const float *sin, int64_t tokens, int64_t stride, int heads, int dim, int half,
            int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * half > ENOUGH)
    for (int64_t t = 0; t < tokens; t++) {
        for (int h = 0; h < heads; h++) {
            T *low = x + t * stride + h * dim, *high = low + half;
            for (int i = 0; i < half; i += W) {
                const vf a = one(low + i), b = one(high + i);
                const vf c = one(cos + t * half + i), s = one(sin + t * half + i);
                put_one(low + i, a * c - b * s);
                put_one(high + i, b * c + a * s);
            }
        }
    }
}

// x times the logistic function of y.
ALWAYS vf gated(vf x, vf y) {
    const vf low = -y > 87.0f ? splat(87.0f) : -y;
    return x / (exp_of(low) + 1.0f);
}
ALWAYS vf silu(vf x) { return gated(x, x); }
// 0.5 x (1 + tanh(z)) is x times the logistic function of 2 z.
ALWAYS vf gelu(vf x) { return gated(x, 1.5957691216f * (x + 0.044715f * x * x * x)); }

template <class T, vf (*act)(vf)>
void gate(const T *in, T *out, int64_t rows, int64_t stride, int width, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > ENOUGH / 4)
    for (int64_t r = 0; r < rows; r++) {
        const T *g = in + r * stride, *up = g + width;
        for (int i = 0; i < width; i += W) put_one(out + r * width + i, act(one(g + i)) * one(up + i));
    }
}

// out [T, F] = x [T, E] weight [F, E]^T + bias, W features at a time, each weight read from memory once.
template <class T>
void multiply(const T *x, const T *weight, const T *bias, T *out, int64_t stride, int tokens, int64_t features,
              int width, int threads) {
    static thread_local std::vector<float> packed;
    if (packed.size() < size_t(tokens) * width) packed.resize(size_t(tokens) * width);
    float *const rows = packed.data();
    for (int t = 0; t < tokens; t++) pack(x + t * stride, rows + int64_t(t) * width, width, 1.0f);
    const int64_t chunks = (features + W - 1) / W;
#pragma omp parallel for num_threads(threads) if (features * width > ENOUGH) schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t first = c * W;
        const int count = int(std::min<int64_t>(W, features - first));
        const T *ahead = weight + std::min(first + W, std::max<int64_t>(features - W, 0)) * width;
        for (int t = 0; t < tokens; t += 4) {
            alignas(64) float made[4 * W];
            const int now = std::min(4, tokens - t);
            const float *at = rows + int64_t(t) * width;
            switch (now) {
            case 1: dots<T, 1>(weight + first * width, count, at, width, made, W, ahead); break;
            case 2: dots<T, 2>(weight + first * width, count, at, width, made, W, ahead); break;
            case 3: dots<T, 3>(weight + first * width, count, at, width, made, W, ahead); break;
            default: dots<T, 4>(weight + first * width, count, at, width, made, W, ahead);
            }
            for (int g = 0; g < now; g++) {
                T *to = out + (t + g) * features + first;
                if (count == W) {
                    const vf y = loadu<vf>(made + g * W);
                    put_one(to, bias ? y + one(bias + first) : y);
                    continue;
                }
                T last[W], more[W] = {};
                if (bias) std::memcpy(more, bias + first, count * sizeof(T));
                put_one(last, loadu<vf>(made + g * W) + one(more));
                std::memcpy(to, last, count * sizeof(T));
            }
        }
    }
}

template <class T>
void activate(int act, const T *in, T *out, int64_t rows, int64_t stride, int width, int threads) {
    if (act == 0)
        gate<T, silu>(in, out, rows, stride, width, threads);
    else
        gate<T, gelu>(in, out, rows, stride, width, threads);
}

// One layer, in the order of reference.Dense; what a model lacks is null.
struct Dense {
    const void *attention_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias, *attention_post_norm, *mlp_norm,
        *gate_up, *gate_up_bias, *down, *down_bias, *mlp_post_norm;
};

// What all layers share. act: 0 silu, 1 gelu in its tanh form.
struct Sizes {
    int hidden, inner, heads, kv_heads, dim, act;
    float eps, plus;
};

// y [T, E] becomes q [T, H, D] and k and v [T, K, D], normalised where the model does that, and rotated.
template <class T>
void enter(const Dense &layer, const Sizes &sizes, const T *y, const float *cos, const float *sin, T *q, T *k, T *v,
           int rows, int half, int threads) {
    const int64_t dim = sizes.dim, all = (sizes.heads + 2 * sizes.kv_heads) * dim;
    static thread_local std::vector<T> scratch;
    scratch.resize(rows * all);
    multiply(y, (const T *)layer.qkv, (const T *)layer.qkv_bias, scratch.data(), sizes.hidden, rows, all, sizes.hidden,
             threads);
    const T *from = scratch.data();
    const auto part = [&](T *to, int heads, const void *norm, bool turning) {
        const int64_t width = heads * dim;
        for (int t = 0; t < rows; t++) std::memcpy(to + t * width, from + t * all, width * sizeof(T));
        from += width;
        if (norm)
            normalise<T>({to, nullptr, (const T *)norm, to, nullptr, rows * heads, dim, 0, sizes.dim, threads,
                          sizes.eps, sizes.plus});
        if (turning) rotate(to, cos, sin, rows, width, heads, sizes.dim, half, threads);
    };
    part(q, sizes.heads, layer.q_norm, true);
    part(k, sizes.kv_heads, layer.k_norm, true);
    part(v, sizes.kv_heads, nullptr, false);
}

// o [T, H * D] and the residual x [T, E] become the next x, in place, and what the next layer reads, y [T, E].
template <class T>
void leave(const Dense &layer, const Sizes &sizes, const T *next_norm, const T *o, T *x, T *y, int rows, int threads) {
    static thread_local std::vector<T> scratch;
    const int64_t hidden = sizes.hidden, wide = int64_t(sizes.heads) * sizes.dim, inner = sizes.inner;
    scratch.resize(rows * (hidden + 3 * inner));
    T *const branch = scratch.data(), *const both = branch + rows * hidden, *const gated = both + rows * 2 * inner;
    const auto join = [&](const void *post, const T *norm) { // x += branch; y = x normalised
        const Norm<T> last = {branch, nullptr, (const T *)post, branch, nullptr, rows, hidden, 0, sizes.hidden, threads,
                              sizes.eps, sizes.plus};
        if (post) normalise(last);
        normalise<T>({branch, x, norm, y, x, rows, hidden, hidden, sizes.hidden, threads, sizes.eps, sizes.plus});
    };
    multiply(o, (const T *)layer.out, (const T *)layer.out_bias, branch, wide, rows, hidden, int(wide), threads);
    join(layer.attention_post_norm, (const T *)layer.mlp_norm);
    multiply(y, (const T *)layer.gate_up, (const T *)layer.gate_up_bias, both, hidden, rows, 2 * inner, sizes.hidden,
             threads);
    activate(sizes.act, both, gated, rows, 2 * inner, sizes.inner, threads);
    multiply(gated, (const T *)layer.down, (const T *)layer.down_bias, branch, inner, rows, hidden, sizes.inner, threads);
    join(layer.mlp_post_norm, next_norm);
}

template <class F> void with_type(int dtype, F &&go) {
    switch (dtype) {
    case 0: return go(float{});
    case 1: return go(bf16{});
    default: return go(f16{});
    }
}

} // namespace

extern "C" {

// dtype: 0 float32, 1 bfloat16, 2 float16. Widths are multiples of 16, strides count elements.
void rms_norm(int dtype, const void *x, const void *residual, const void *weight, void *normed, void *total,
              int64_t rows, int64_t x_stride, int64_t residual_stride, int width, int threads, float eps, float plus) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        normalise<T>({(const T *)x, (const T *)residual, (const T *)weight, (T *)normed, (T *)total, rows, x_stride,
                      residual_stride, width, threads, eps, plus});
    });
}

void rotate_pair(int dtype, void *q, void *k, const float *cos, const float *sin, int64_t tokens, int64_t q_stride,
                 int64_t k_stride, int heads, int kv_heads, int dim, int half, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        rotate<T>((T *)q, cos, sin, tokens, q_stride, heads, dim, half, threads);
        rotate<T>((T *)k, cos, sin, tokens, k_stride, kv_heads, dim, half, threads);
    });
}

// act: 0 silu, 1 gelu in its tanh form.
void gate_mul(int dtype, int act, const void *in, void *out, int64_t rows, int64_t stride, int width, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        activate(act, (const T *)in, (T *)out, rows, stride, width, threads);
    });
}

void linear_rows(int dtype, const void *x, const void *weight, const void *bias, void *out, int64_t stride, int tokens,
                 int64_t features, int width, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        multiply<T>((const T *)x, (const T *)weight, (const T *)bias, (T *)out, stride, tokens, features, width,
                    threads);
    });
}

// From y [T, E] to q, k and v, of rows [T, H * D] and [T, K * D], rotated.
void enter_layer(int dtype, const Dense *layer, const Sizes *sizes, const void *y, const float *cos, const float *sin,
                 void *q, void *k, void *v, int rows, int half, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        enter(*layer, *sizes, (const T *)y, cos, sin, (T *)q, (T *)k, (T *)v, rows, half, threads);
    });
}

void leave_layer(int dtype, const Dense *layer, const Sizes *sizes, const void *next_norm, const void *o, void *x,
                 void *y, int rows, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        leave(*layer, *sizes, (const T *)next_norm, (const T *)o, (T *)x, (T *)y, rows, threads);
    });
}
}
