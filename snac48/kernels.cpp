// Snake, x + sin(alpha x)^2 / alpha, and the depthwise convolution behind it: one pass over memory each way.
// Rows are (item, channel) pairs of contiguous [B, C, T]; arithmetic is fp32, storage fp32 or bf16. A row is
// computed by one thread and its sums are added in one order: results don't depend on the number of threads.
// Built by kernels.py with the machine's own compiler.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int TAPS = 7;          // of SNAC's depthwise convolutions
constexpr int MAX_DILATION = 9;  // of its residual units: 1, 3, 9
constexpr int HALO = TAPS / 2 * MAX_DILATION;
constexpr int TILE = 2048;  // samples whose intermediate values stay in the cache

struct bf16 {
    uint16_t bits;
};

inline float get(const float *p, int64_t i) { return p[i]; }
inline float get(const bf16 *p, int64_t i) {
    uint32_t wide = uint32_t(p[i].bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
inline void put(float *p, int64_t i, float value) { p[i] = value; }
inline void put(bf16 *p, int64_t i, float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    uint32_t even = wide + 0x7FFF + ((wide >> 16) & 1);  // to nearest, ties to even
    p[i].bits = uint16_t((value == value ? even : wide | 0x400000) >> 16);
}

// sin z and cos z up to one common sign, which neither sin^2 z nor sin 2z = 2 sin z cos z sees: z is reduced by
// multiples of pi (in three parts, exact for |z| < 1e5) to |r| <= pi/2. Taylor, error below 1e-8.
inline float reduced(float z) {
    float n = nearbyintf(z * 0.318309886183790672f);
    float r = fmaf(-n, 3.140625f, z);
    r = fmaf(-n, 9.67502593994140625e-4f, r);
    return fmaf(-n, 1.50995799097565e-7f, r);
}
inline float sine(float r) {
    float q = r * r, p = 1.6059043837e-10f;
    p = fmaf(p, q, -2.5052108385e-8f);
    p = fmaf(p, q, 2.7557319224e-6f);
    p = fmaf(p, q, -1.9841269841e-4f);
    p = fmaf(p, q, 8.3333333333e-3f);
    p = fmaf(p, q, -1.6666666667e-1f);
    return fmaf(r * q, p, r);
}
inline float cosine(float r) {
    float q = r * r, p = -1.1470745598e-11f;
    p = fmaf(p, q, 2.0876756988e-9f);
    p = fmaf(p, q, -2.7557319224e-7f);
    p = fmaf(p, q, 2.4801587302e-5f);
    p = fmaf(p, q, -1.3888888889e-3f);
    p = fmaf(p, q, 4.1666666667e-2f);
    p = fmaf(p, q, -0.5f);
    return fmaf(p, q, 1.0f);
}
inline float snake(float x, float alpha, float inverse) {
    float s = sine(reduced(alpha * x));
    return fmaf(inverse * s, s, x);
}

// y = snake(x)
template <typename T>
void snake_rows(const T *x, const float *alpha, T *y, int64_t rows, int64_t channels, int64_t length) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *in = x + row * length;
        T *out = y + row * length;
        const float a = alpha[row % channels], inverse = 1 / (a + 1e-9f);
#pragma omp simd
        for (int64_t t = 0; t < length; t++) put(out, t, snake(get(in, t), a, inverse));
    }
}

// grad: of snake(x); gives of_x (may be grad itself), of_alpha [rows] and, where wanted, snake(x) once more
template <typename T>
void snake_back_rows(const T *grad, const T *x, const float *alpha, T *of_x, float *of_alpha, T *again,
                     int64_t rows, int64_t channels, int64_t length) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *g_row = grad + row * length, *in = x + row * length;
        T *out = of_x + row * length, *s_row = again ? again + row * length : nullptr;
        const float a = alpha[row % channels], inverse = 1 / (a + 1e-9f), ratio = a * inverse;
        float sum = 0;
        for (int64_t first = 0; first < length; first += TILE) {
            const int64_t end = first + TILE < length ? first + TILE : length;
            float part = 0, values[TILE];
#pragma omp simd reduction(+ : part)
            for (int64_t t = first; t < end; t++) {
                const float v = get(in, t), g = get(g_row, t), r = reduced(a * v), s = sine(r);
                const float square = inverse * s * s, slope = 2 * s * cosine(r);
                values[t - first] = v + square;
                put(out, t, g * fmaf(ratio, slope, 1.0f));
                part += g * inverse * fmaf(v, slope, -square);
            }
            sum += part;
            if (s_row)
                for (int64_t t = first; t < end; t++) put(s_row, t, values[t - first]);
        }
        of_alpha[row] = sum;
    }
}

// y[t] = bias + sum_k weight[k] snake(x)[t + (k - 3) dilation], zeros outside
template <typename T>
void snake_conv_rows(const T *x, const float *alpha, const float *weight, const float *bias, T *y, int64_t rows,
                     int64_t channels, int64_t length, int64_t dilation) {
    const int64_t reach = TAPS / 2 * dilation;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *in = x + row * length;
        T *out = y + row * length;
        const int64_t c = row % channels;
        const float a = alpha[c], inverse = 1 / (a + 1e-9f), b = bias[c], *w = weight + c * TAPS;
        float s[TILE + 2 * HALO];
        for (int64_t first = 0; first < length; first += TILE) {
            const int64_t end = first + TILE < length ? first + TILE : length;
            const int64_t from = first - reach > 0 ? first - reach : 0, to = end + reach < length ? end + reach : length;
            float *at = s + reach - first;  // at[t]: sample t
            for (int64_t t = first - reach; t < from; t++) at[t] = 0;
#pragma omp simd
            for (int64_t t = from; t < to; t++) at[t] = snake(get(in, t), a, inverse);
            for (int64_t t = to; t < end + reach; t++) at[t] = 0;
#pragma omp simd
            for (int64_t t = first; t < end; t++) {
                float sum = b;
                for (int k = 0; k < TAPS; k++) sum = fmaf(w[k], at[t + (k - TAPS / 2) * dilation], sum);
                put(out, t, sum);
            }
        }
    }
}

// y [B, T] = bias + sum over channels of the same, of an undilated convolution
template <typename T>
void snake_mix_rows(const T *x, const float *alpha, const float *weight, const float *bias, float *y, int64_t rows,
                    int64_t channels, int64_t length) {
    const int64_t reach = TAPS / 2, tiles = (length + TILE - 1) / TILE, items = rows / channels;
#pragma omp parallel for schedule(static)
    for (int64_t job = 0; job < items * tiles; job++) {
        const int64_t item = job / tiles, first = job % tiles * TILE, end = first + TILE < length ? first + TILE : length;
        const int64_t from = first - reach > 0 ? first - reach : 0, to = end + reach < length ? end + reach : length;
        float sums[TILE], s[TILE + 2 * HALO], *at = s + reach - first;
        for (int64_t t = first; t < end; t++) sums[t - first] = bias[0];
        for (int64_t t = first - reach; t < from; t++) at[t] = 0;
        for (int64_t t = to; t < end + reach; t++) at[t] = 0;
        for (int64_t c = 0; c < channels; c++) {
            const T *in = x + (item * channels + c) * length;
            const float a = alpha[c], inverse = 1 / (a + 1e-9f), *w = weight + c * TAPS;
#pragma omp simd
            for (int64_t t = from; t < to; t++) at[t] = snake(get(in, t), a, inverse);
#pragma omp simd
            for (int64_t t = first; t < end; t++)
                for (int k = 0; k < TAPS; k++) sums[t - first] = fmaf(w[k], at[t + k - TAPS / 2], sums[t - first]);
        }
        std::memcpy(y + item * length + first, sums, (end - first) * sizeof(float));
    }
}

// The way back of either: grad of y (of snake_mix_rows: `shared` by the channels), and `skip`, a gradient that
// goes past the two, added to of_x. of_alpha [rows], of_weight [rows, 7], of_bias [rows]; of_past [rows]: sums
// of `skip`
template <typename G, typename T>
void snake_conv_back_rows(const G *grad, const T *skip, const T *x, const float *alpha, const float *weight, T *of_x,
                          float *of_alpha, float *of_weight, float *of_bias, float *of_past, int64_t rows,
                          int64_t channels, int64_t length, int64_t dilation, int64_t shared) {
    const int64_t reach = TAPS / 2 * dilation;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const G *g_row = grad + (shared ? row / channels : row) * length;
        const T *in = x + row * length, *past = skip ? skip + row * length : nullptr;
        T *out = of_x + row * length;
        const int64_t c = row % channels;
        const float a = alpha[c], inverse = 1 / (a + 1e-9f), ratio = a * inverse, *w = weight + c * TAPS;
        float s[TILE + 2 * HALO], g[TILE + 2 * HALO], slope[TILE], of_a[TILE];
        float alpha_sum = 0, bias_sum = 0, past_sum = 0, tap_sums[TAPS] = {0};
        for (int64_t first = 0; first < length; first += TILE) {
            const int64_t end = first + TILE < length ? first + TILE : length;
            const int64_t from = first - reach > 0 ? first - reach : 0, to = end + reach < length ? end + reach : length;
            float *s_at = s + reach - first, *g_at = g + reach - first;
            for (int64_t t = first - reach; t < from; t++) s_at[t] = g_at[t] = 0;
            for (int64_t t = to; t < end + reach; t++) s_at[t] = g_at[t] = 0;
#pragma omp simd
            for (int64_t t = from; t < to; t++) g_at[t] = get(g_row, t);
#pragma omp simd
            for (int64_t t = from; t < first; t++) s_at[t] = snake(get(in, t), a, inverse);
#pragma omp simd
            for (int64_t t = first; t < end; t++) {
                const float v = get(in, t), r = reduced(a * v), sin_r = sine(r);
                const float square = inverse * sin_r * sin_r, two = 2 * sin_r * cosine(r);
                s_at[t] = v + square;
                slope[t - first] = fmaf(ratio, two, 1.0f);
                of_a[t - first] = inverse * fmaf(v, two, -square);
            }
#pragma omp simd
            for (int64_t t = end; t < to; t++) s_at[t] = snake(get(in, t), a, inverse);
            float part = 0, sum = 0, beyond = 0;
#pragma omp simd reduction(+ : part, sum, beyond)
            for (int64_t t = first; t < end; t++) {
                float of_s = 0;
                for (int k = 0; k < TAPS; k++) of_s = fmaf(w[k], g_at[t - (k - TAPS / 2) * dilation], of_s);
                part += of_s * of_a[t - first];
                sum += g_at[t];
                const float p = past ? get(past, t) : 0.0f;
                beyond += p;
                put(out, t, fmaf(of_s, slope[t - first], p));
            }
            alpha_sum += part;
            bias_sum += sum;
            past_sum += beyond;
            float p0 = 0, p1 = 0, p2 = 0, p3 = 0, p4 = 0, p5 = 0, p6 = 0;
#pragma omp simd reduction(+ : p0, p1, p2, p3, p4, p5, p6)
            for (int64_t t = first; t < end; t++) {
                const float gt = g_at[t], *st = s_at + t;
                p0 += gt * st[-3 * dilation];
                p1 += gt * st[-2 * dilation];
                p2 += gt * st[-dilation];
                p3 += gt * st[0];
                p4 += gt * st[dilation];
                p5 += gt * st[2 * dilation];
                p6 += gt * st[3 * dilation];
            }
            const float parts[TAPS] = {p0, p1, p2, p3, p4, p5, p6};
            for (int k = 0; k < TAPS; k++) tap_sums[k] += parts[k];
        }
        of_alpha[row] = alpha_sum;
        of_bias[row] = bias_sum;
        of_past[row] = past_sum;
        for (int k = 0; k < TAPS; k++) of_weight[row * TAPS + k] = tap_sums[k];
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                              \
    extern "C" void snake_##NAME(const T *x, const float *alpha, T *y, int64_t rows, int64_t c, int64_t n) {         \
        snake_rows(x, alpha, y, rows, c, n);                                                                         \
    }                                                                                                                \
    extern "C" void snake_back_##NAME(const T *grad, const T *x, const float *alpha, T *of_x, float *of_alpha,       \
                                      T *again, int64_t rows, int64_t c, int64_t n) {                                \
        snake_back_rows(grad, x, alpha, of_x, of_alpha, again, rows, c, n);                                          \
    }                                                                                                                \
    extern "C" void snake_conv_##NAME(const T *x, const float *alpha, const float *w, const float *b, T *y,          \
                                      int64_t rows, int64_t c, int64_t n, int64_t dilation) {                        \
        snake_conv_rows(x, alpha, w, b, y, rows, c, n, dilation);                                                    \
    }                                                                                                                \
    extern "C" void snake_mix_##NAME(const T *x, const float *alpha, const float *w, const float *b, float *y,       \
                                     int64_t rows, int64_t c, int64_t n) {                                           \
        snake_mix_rows(x, alpha, w, b, y, rows, c, n);                                                               \
    }                                                                                                                \
    extern "C" void snake_conv_back_##NAME(const void *grad, const T *skip, const T *x, const float *alpha,          \
                                           const float *w, T *of_x, float *of_alpha, float *of_w, float *of_b, float *of_p,   \
                                           int64_t rows, int64_t c, int64_t n, int64_t dilation, int64_t shared) {   \
        if (shared)                                                                                                  \
            snake_conv_back_rows((const float *)grad, skip, x, alpha, w, of_x, of_alpha, of_w, of_b, of_p, rows,   \
                                 c, n, dilation, shared);                                                            \
        else                                                                                                         \
            snake_conv_back_rows((const T *)grad, skip, x, alpha, w, of_x, of_alpha, of_w, of_b, of_p, rows,       \
                                 c, n, dilation, shared);                                                            \
    }
EXPORT(float, float32)
EXPORT(bf16, bfloat16)
