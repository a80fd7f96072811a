// Two layers for decoding one text on a CPU: y = s ⊙ (W·x) + b for one row x, and RMSNorm for few rows.
//
// Decoding a token takes as long as reading all weights, and PyTorch's kernels, made for many rows, reach half of the
// memory's speed for one. Here W is read once and in order, at the full speed. RMSNorm takes PyTorch seven kernels.
// decoding/native.py compiles this file for the processor at hand, when it is first needed.

#include <cmath>
#include <cstdint>
#include <cstring>

struct bfloat16 {  // the upper half of a float
    uint16_t bits;
    operator float() const {
        uint32_t word = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &word, sizeof value);
        return value;
    }
};

// The dot product of n weights and n numbers. 64 sums, of every 64th product, stay in the processor's vector registers
// and are added up at the end: one sum alone would make each addition wait for the one before it. Meanwhile the weights
// AHEAD bytes further on, of this row or the next ones, are fetched from memory.
template <typename Weight>
static float dot(const Weight* w, const float* x, int64_t n) {
    const int LANES = 64, AHEAD = 2048, CACHE_LINE = 64;
    float sums[LANES] = {};
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        const char* here = reinterpret_cast<const char*>(w + k);
        for (size_t byte = 0; byte < LANES * sizeof(Weight); byte += CACHE_LINE) __builtin_prefetch(here + AHEAD + byte);
        #pragma omp simd
        for (int j = 0; j < LANES; j++) sums[j] += float(w[k + j]) * x[k + j];
    }
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) sums[j] += sums[j + half];
    for (; k < n; k++) sums[0] += float(w[k]) * x[k];
    return sums[0];
}

// W: (out, n), each row one output's weights; s, b: (out,) or null; x: (n,); y: (out,). The threads share the outputs,
// so that the result does not depend on how many they are. A small product is not worth waking them.
template <typename Weight>
static void linear(
    const Weight* W, const float* s, const float* b, const float* x, float* y, int64_t out, int64_t n, int threads
) {
    #pragma omp parallel for num_threads(threads) if (out * n > 1 << 15)
    for (int64_t o = 0; o < out; o++) y[o] = dot(W + o * n, x, n) * (s ? s[o] : 1.0f) + (b ? b[o] : 0.0f);
}

#define EXPORT(name, Weight)                                                                                       \
    extern "C" void name(const Weight* W, const float* s, const float* b, const float* x, float* y, int64_t out, \
                         int64_t n, int threads) {                                                                 \
        linear(W, s, b, x, y, out, n, threads);                                                                    \
    }
EXPORT(linear_float32, float)
EXPORT(linear_bfloat16, bfloat16)
EXPORT(linear_int8, int8_t)

// y = x/√(mean(x²) + ε) ⊙ g for each row of x: (rows, n); g: (n,); y like x.
extern "C" void rms_norm(const float* x, const float* g, float* y, int64_t rows, int64_t n, float epsilon) {
    for (const float* end = x + rows * n; x < end; x += n, y += n) {
        const float r = 1 / std::sqrt(dot(x, x, n) / n + epsilon);
        for (int64_t k = 0; k < n; k++) y[k] = x[k] * r * g[k];
    }
}
