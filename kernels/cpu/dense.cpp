// The dense pieces of a decoder: norms, rotation, gated activations, and a matrix times a few rows.

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
        if (act == 0)
            gate<T, silu>((const T *)in, (T *)out, rows, stride, width, threads);
        else
            gate<T, gelu>((const T *)in, (T *)out, rows, stride, width, threads);
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
}
