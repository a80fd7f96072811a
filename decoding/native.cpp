// The blocks of a GPT (model.py: Block) for few tokens on a CPU, and a linear layer for few rows, in float32.
//
// To decode a token is to read all weights once. PyTorch's kernels, made for many rows, reach half of the memory's
// speed for a few, and the hundreds of small kernels of a step take as long as reading a small model. Here each weight
// is read once and in order, and all blocks are one call, through which the threads go together: they share the work of
// each loop under `omp for`, and wait for each other where it ends. So the result does not depend on their number.
// decoding/native.py compiles this file for the processor at hand and one type of weights, and has the same structs.
//
// Shapes: R = B·T rows, one for each token; C n_embd, H heads, K key/value heads, D head_dim, S keys.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

struct bfloat16 {  // the upper half of a float
    uint16_t bits;
    operator float() const {
        const uint32_t word = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &word, sizeof value);
        return value;
    }
};

typedef WEIGHT Weight;  // float, bfloat16 or int8_t

struct Linear {  // y = s ⊙ (W·x) + b
    const Weight* W;     // (out, n), a row every `stride` numbers
    const float *s, *b;  // (out,), or null
    int64_t out, n, stride;
};

struct Norm {  // RMSNorm or LayerNorm
    const float *w, *b;  // (n,), or null; without w there is no norm
};

struct Layer {  // model.py: Block
    Norm norm_attention, q_norm, k_norm, norm_mlp;
    Linear qkv, out, up, down;
    int64_t rotates;
};

enum MLP : int64_t { SWIGLU, GEGLU, GELU, GELU_EXACT, RELU2 };  // in the order of native.py: MLPS

struct Config {  // model.py: GPTConfig
    int64_t n_embd, n_head, n_kv_head, head_dim, mlp_dim, layernorm, post_norm, mlp;
    float norm_eps;
};

struct Step {
    int64_t B, T, S;                 // texts, new tokens of each, and keys: the last T are those of the new tokens
    const float *cos, *sin;          // (B, T, D), or null without RoPE
    const float* bias;               // (B, H, T, S), what is added to the scores, or null
    int64_t bias_b, bias_h, bias_t;  // its strides; in S it is 1
    float *k, *v;                    // the cache: (layers, B, K, S or more, D)
    int64_t layer, b, head;          // strides of both; then D and 1
};

// ---------------------------------------------------------------------------------------------------------------------
// Linear layers

// Vectors of the processor, on which + and * work element by element. (GCC and Clang have them. may_alias and aligned:
// they are read from arrays of other types, wherever these begin.)
#ifdef __AVX512F__
const int LANES = 16, OUTPUTS = 2;  // how many rows of weights are multiplied at once
#else
const int LANES = 8, OUTPUTS = 1;
#endif
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

// Weights are read as words of 32 bits, each of which packs 1, 2 or 4. `unpack` gives the i-th of each word. So a block
// of 64 weights becomes VECTORS vectors in an order of their own, and `arrange` puts the numbers x that they meet into the
// same: for bytes and LANES = 8, x[0], x[4], … x[28], then x[1], x[5], … What is left of n after the blocks stays as it is.
const int PACKED = 4 / sizeof(Weight), BLOCK = 64, VECTORS = BLOCK / LANES;

static inline floats unpack(const float*, words w, int) { return (floats)w; }
static inline floats unpack(const bfloat16*, words w, int i) { return (floats)(i ? w & ~0xffff : w << 16); }
static inline floats unpack(const int8_t*, words w, int i) {
    return __builtin_convertvector(w << (24 - 8 * i) >> 24, floats);
}

static void arrange(const float* x, float* y, int64_t n) {
    int64_t k = 0;
    for (; k + BLOCK <= n; k += BLOCK)
        for (int i = 0; i < VECTORS; i++)
            for (int j = 0; j < LANES; j++)
                y[k + i * LANES + j] = x[k + (i / PACKED * LANES + j) * PACKED + i % PACKED];
    for (; k < n; k++) y[k] = x[k];
}

// The dot products of OUTS rows of weights with each of ROWS arranged rows x (ROWS, n), to y (OUTS, R). Several sums are
// under way at once, since an addition to one must wait for the one before it; they stay in registers, as all loops over
// them are unrolled. Meanwhile the weights AHEAD bytes further on, of these outputs or the next ones, are fetched from
// memory.
template <int OUTS, int ROWS>
static inline void dots(const Weight* w, int64_t stride, const float* x, int64_t n, float* y, int64_t R) {
    const int SUMS = VECTORS > OUTS * ROWS ? VECTORS / (OUTS * ROWS) : 1, AHEAD = 512 * PACKED, CACHE_LINE = 64;
    floats sums[OUTS][ROWS][SUMS] = {};
    int64_t k = 0;
    for (; k + BLOCK <= n; k += BLOCK) {
        #pragma GCC unroll 2
        for (int o = 0; o < OUTS; o++) {
            const char* far = (const char*)(w + o * stride + k) + AHEAD;
            for (size_t byte = 0; byte < BLOCK * sizeof(Weight); byte += CACHE_LINE) __builtin_prefetch(far + byte);
        }
        #pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) {
            floats weights[OUTS];
            #pragma GCC unroll 2
            for (int o = 0; o < OUTS; o++)
                weights[o] = unpack(w, ((const words*)(w + o * stride + k))[i / PACKED], i % PACKED);
            #pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const floats numbers = *(const floats*)(x + r * n + k + i * LANES);
                #pragma GCC unroll 2
                for (int o = 0; o < OUTS; o++) sums[o][r][i % SUMS] += weights[o] * numbers;
            }
        }
    }
    #pragma GCC unroll 2
    for (int o = 0; o < OUTS; o++)
        #pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            float dot = 0;
            #pragma GCC unroll 8
            for (int i = 1; i < SUMS; i++) sums[o][r][0] += sums[o][r][i];
            for (int j = 0; j < LANES; j++) dot += sums[o][r][0][j];
            for (int64_t j = k; j < n; j++) dot += float(w[o * stride + j]) * x[r * n + j];
            y[o * R + r] = dot;
        }
}

// OUTS outputs of y (R, out) = l(x), from o on, for arranged x (R, n). sums: room for OUTS·R numbers.
template <int OUTS>
static inline void outputs(const Linear& l, int64_t o, const float* x, float* y, int64_t R, bool add, float* sums) {
    const Weight* w = l.W + o * l.stride;
    int64_t r = 0;
    for (; r + 4 <= R; r += 4) dots<OUTS, 4>(w, l.stride, x + r * l.n, l.n, sums + r, R);
    for (; r + 2 <= R; r += 2) dots<OUTS, 2>(w, l.stride, x + r * l.n, l.n, sums + r, R);
    for (; r < R; r++) dots<OUTS, 1>(w, l.stride, x + r * l.n, l.n, sums + r, R);
    for (int64_t i = 0; i < OUTS; i++)
        for (r = 0; r < R; r++) {
            const float value = sums[i * R + r] * (l.s ? l.s[o + i] : 1) + (l.b ? l.b[o + i] : 0);
            float& place = y[r * l.out + o + i];
            place = add ? place + value : value;
        }
}

// y (R, out) = l(x) for given x (R, n), or y += l(x). A weight is read from memory once for all rows.
static void linear(const Linear& l, const float* given, float* y, int64_t R, bool add = false) {
    float *x = new float[R * l.n], *sums = new float[OUTPUTS * R];  // each thread's own
    for (int64_t r = 0; r < R; r++) arrange(given + r * l.n, x + r * l.n, l.n);
    #pragma omp for
    for (int64_t o = 0; o < l.out; o += OUTPUTS)
        if (o + OUTPUTS <= l.out) outputs<OUTPUTS>(l, o, x, y, R, add, sums);
        else outputs<1>(l, o, x, y, R, add, sums);
    delete[] x;
    delete[] sums;
}

// y (R, out) = l(x) for x (R, n).
extern "C" void run_linear(const Linear* l, const float* x, float* y, int64_t R, int threads) {
    #pragma omp parallel num_threads(threads)
    linear(*l, x, y, R);
}

// ---------------------------------------------------------------------------------------------------------------------
// The other parts of a block

// y = (x-mean)/√(var+ε) ⊙ w + b for n numbers; RMSNorm takes 0 for the mean. y may be x.
static void normalize(const Norm& norm, const Config& c, const float* x, float* y, int64_t n) {
    float mean = 0, var = 0;
    #pragma omp simd reduction(+ : mean)
    for (int64_t k = 0; k < n; k++) mean += x[k];
    mean = c.layernorm ? mean / n : 0;
    #pragma omp simd reduction(+ : var)
    for (int64_t k = 0; k < n; k++) var += (x[k] - mean) * (x[k] - mean);
    const float r = 1 / std::sqrt(var / n + c.norm_eps);
    for (int64_t k = 0; k < n; k++) y[k] = (x[k] - mean) * r * norm.w[k] + (norm.b ? norm.b[k] : 0);
}

static void normalize_rows(const Norm& norm, const Config& c, const float* x, float* y, int64_t R) {
    #pragma omp for
    for (int64_t r = 0; r < R; r++) normalize(norm, c, x + r * c.n_embd, y + r * c.n_embd, c.n_embd);
}

// model.py: rotate, of one head of a token.
static void rotate(float* x, const float* cos, const float* sin, int64_t D) {
    for (int64_t i = 0, j = D / 2; j < D; i++, j++) {
        const float first = x[i] * cos[i] + x[j] * sin[i], second = x[j] * cos[j] + x[i] * sin[j];
        x[i] = first;
        x[j] = second;
    }
}

// Normalise and rotate the queries and keys of qkv (R, H+2K, D), and put the keys and values into the cache.
static void place(const Layer& block, const Config& c, const Step& t, float* qkv, int64_t layer) {
    const int64_t H = c.n_head, K = c.n_kv_head, D = c.head_dim, heads = H + 2 * K;
    #pragma omp for
    for (int64_t i = 0; i < t.B * t.T * heads; i++) {
        const int64_t row = i / heads, h = i % heads;
        const bool query = h < H, value = h >= H + K;
        const Norm& norm = query ? block.q_norm : block.k_norm;
        float* x = qkv + i * D;
        if (!value && norm.w) normalize(norm, c, x, x, D);
        if (!value && t.cos && block.rotates) rotate(x, t.cos + row * D, t.sin + row * D, D);
        if (query) continue;
        float* cache = (value ? t.v : t.k) + layer * t.layer + row / t.T * t.b + (value ? h - H - K : h - H) * t.head;
        memcpy(cache + (t.S - t.T + row % t.T) * D, x, D * sizeof(float));
    }
}

// y (R, H, D) = softmax(q·kᵀ/√D + bias)·v for the queries of qkv. model.py: attention. Keys that a bias of -∞ hides, as it
// hides from a beam what the others have put there, are left out.
static void attend(const Config& c, const Step& t, const float* qkv, float* y, int64_t layer) {
    const int64_t H = c.n_head, K = c.n_kv_head, D = c.head_dim;
    float* p = new float[t.S];  // each thread's own
    int64_t* seen = new int64_t[t.S];
    #pragma omp for
    for (int64_t i = 0; i < t.B * t.T * H; i++) {
        const int64_t row = i / H, h = i % H, b = row / t.T, cache = layer * t.layer + b * t.b + h / (H / K) * t.head;
        const float *q = qkv + (row * (H + 2 * K) + h) * D, *k = t.k + cache, *v = t.v + cache;
        const float* bias = t.bias ? t.bias + b * t.bias_b + h * t.bias_h + row % t.T * t.bias_t : nullptr;
        float top = -INFINITY, total = 0;
        int64_t S = 0;
        for (int64_t j = 0; j < t.S; j++)
            if (!bias || bias[j] != -INFINITY) seen[S++] = j;
        for (int64_t s = 0; s < S; s++) {
            const int64_t j = seen[s];
            float dot = 0;
            #pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < D; d++) dot += q[d] * k[j * D + d];
            p[s] = dot / std::sqrt(float(D)) + (bias ? bias[j] : 0);
            top = p[s] > top ? p[s] : top;
        }
        for (int64_t s = 0; s < S; s++) total += p[s] = std::exp(p[s] - top);
        float* sum = y + i * D;
        memset(sum, 0, D * sizeof(float));
        for (int64_t s = 0; s < S; s++) {
            const float weight = p[s] / total;
            #pragma omp simd
            for (int64_t d = 0; d < D; d++) sum[d] += weight * v[seen[s] * D + d];
        }
    }
    delete[] p;
    delete[] seen;
}

static float silu(float x) { return x / (1 + std::exp(-x)); }
static float gelu(float x) { return x / (1 + std::exp(-1.5957691f * (x + 0.044715f * x * x * x))); }  // 1.59… = 2√(2/π)
static float gelu_exact(float x) { return 0.5f * x * (1 + std::erf(0.70710678f * x)); }

// y (R, mlp_dim): the activations of x (R, mlp_dim), or of a gate and up, x (R, 2, mlp_dim). model.py: MLP.
static void activate(const Config& c, const float* x, float* y, int64_t R) {
    const int64_t n = c.mlp_dim, gated = c.mlp == SWIGLU || c.mlp == GEGLU;
    #pragma omp for
    for (int64_t i = 0; i < R * n; i++) {
        const float* z = x + i + (gated ? i / n * n : 0);  // behind as many ups as there are rows before this one
        switch (c.mlp) {
            case SWIGLU: y[i] = silu(*z) * z[n]; break;
            case GEGLU: y[i] = gelu(*z) * z[n]; break;
            case GELU: y[i] = gelu(*z); break;
            case GELU_EXACT: y[i] = gelu_exact(*z); break;
            case RELU2: y[i] = *z < 0 ? 0 : *z * *z;  // NaN stays NaN
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

// x (R, C) through all blocks, in place, and without post_norm through the norm after the last one. The keys and values
// of its tokens go into the cache. model.py: Block, and GPT.forward.
extern "C" void run_blocks(
    const Layer* blocks, int64_t layers, const Norm* last, const Config* config, const Step* step, float* x, int threads
) {
    const Config& c = *config;
    const int64_t R = step->B * step->T;
    float *h = new float[R * c.n_embd], *qkv = new float[R * blocks->qkv.out], *y = new float[R * blocks->out.n];
    float *up = new float[R * blocks->up.out], *z = new float[R * c.mlp_dim], *normed = c.post_norm ? x : h;
    #pragma omp parallel num_threads(threads)
    for (int64_t layer = 0; layer < layers; layer++) {
        const Layer& block = blocks[layer];
        if (!c.post_norm) normalize_rows(block.norm_attention, c, x, normed, R);
        linear(block.qkv, normed, qkv, R);
        place(block, c, *step, qkv, layer);
        attend(c, *step, qkv, y, layer);
        linear(block.out, y, x, R, true);
        normalize_rows(c.post_norm ? block.norm_attention : block.norm_mlp, c, x, normed, R);
        linear(block.up, normed, up, R);
        activate(c, up, z, R);
        linear(block.down, z, x, R, true);
        if (c.post_norm) normalize_rows(block.norm_mlp, c, x, x, R);
        else if (layer == layers - 1) normalize_rows(*last, c, x, x, R);
    }
    for (float* buffer : {h, qkv, y, up, z}) delete[] buffer;
}
