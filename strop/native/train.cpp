// Elementwise parts of a training step over bf16 rows: normalisation, SwiGLU, rotation, and the softmax of the LM head.
//
// Each reads its operands once, computes in float and rounds each result once. Rows go to threads in fixed pieces, so
// results depend neither on the number of threads nor on their timing.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

static const long ROWS_PER_PIECE = 32;

static inline __mmask16 mask_of(long left) { return left >= 16 ? 0xffff : __mmask16((1u << left) - 1); }

static inline void store16_masked(bf16* target, __m512 value, __mmask16 mask) {
    _mm256_mask_storeu_epi16(target, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

static float inverse_rms(const bf16* x, long width, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) {
        __m512 value = load16_masked(x + i, mask_of(width - i));
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / float(width) + eps);
}

// out = x / rms(x) * weight, over rows of `width`.
extern "C" void strop_rms_norm(const bf16* x, const bf16* weight, bf16* out, long rows, long width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16* source = x + row * width;
        const __m512 inverse = _mm512_set1_ps(inverse_rms(source, width, eps));
        for (long i = 0; i < width; i += 16) {
            const __mmask16 mask = mask_of(width - i);
            __m512 unit = _mm512_mul_ps(load16_masked(source + i, mask), inverse);
            store16_masked(out + row * width + i, _mm512_mul_ps(unit, load16_masked(weight + i, mask)), mask);
        }
    }
}

// dx = (g w - u mean(g w u)) / rms(x) and dweight = sum over rows of g u, with u = x / rms(x).
// `partial` has room for ceil(rows / 32) * width floats.
extern "C" void strop_rms_norm_backward(const bf16* grad, const bf16* x, const bf16* weight, bf16* dx, bf16* dweight,
                                        float* partial, long rows, long width, float eps, int threads) {
    const long pieces = (rows + ROWS_PER_PIECE - 1) / ROWS_PER_PIECE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long piece = 0; piece < pieces; piece++) {
        float* sums = partial + piece * width;
        std::fill(sums, sums + width, 0.0f);
        const long end = std::min(rows, (piece + 1) * ROWS_PER_PIECE);
        for (long row = piece * ROWS_PER_PIECE; row < end; row++) {
            const bf16 *g = grad + row * width, *source = x + row * width;
            const __m512 inverse = _mm512_set1_ps(inverse_rms(source, width, eps));
            __m512 dot = _mm512_setzero_ps();
            for (long i = 0; i < width; i += 16) {
                const __mmask16 mask = mask_of(width - i);
                __m512 unit = _mm512_mul_ps(load16_masked(source + i, mask), inverse);
                __m512 product = _mm512_mul_ps(load16_masked(g + i, mask), unit);
                _mm512_mask_storeu_ps(sums + i, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, sums + i), product));
                dot = _mm512_fmadd_ps(product, load16_masked(weight + i, mask), dot);
            }
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / float(width));
            for (long i = 0; i < width; i += 16) {
                const __mmask16 mask = mask_of(width - i);
                __m512 unit = _mm512_mul_ps(load16_masked(source + i, mask), inverse);
                __m512 scaled = _mm512_mul_ps(load16_masked(g + i, mask), load16_masked(weight + i, mask));
                __m512 result = _mm512_mul_ps(_mm512_fnmadd_ps(unit, mean, scaled), inverse);
                store16_masked(dx + row * width + i, result, mask);
            }
        }
    }
    for (long i = 0; i < width; i++) {
        float sum = 0;
        for (long piece = 0; piece < pieces; piece++) sum += partial[piece * width + i];
        dweight[i] = to_bf16(sum);
    }
}

// out = silu(gate) * up; a row of gate_up is `width` gates, then `width` ups.
extern "C" void strop_swiglu(const bf16* gate_up, bf16* out, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16 *gate = gate_up + 2 * row * width, *up = gate + width;
        for (long i = 0; i < width; i += 16) {
            const __mmask16 mask = mask_of(width - i);
            __m512 g = load16_masked(gate + i, mask);
            __m512 result = _mm512_mul_ps(_mm512_mul_ps(g, sigmoid16(g)), load16_masked(up + i, mask));
            store16_masked(out + row * width + i, result, mask);
        }
    }
}

// From the gradient of silu(gate) * up: the gradient of gate_up; `grad` is overwritten by silu(gate) * up itself.
extern "C" void strop_swiglu_backward(const bf16* gate_up, bf16* grad, bf16* dgate_up, long rows, long width, int threads) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16 *gate = gate_up + 2 * row * width, *up = gate + width;
        bf16 *dgate = dgate_up + 2 * row * width, *dup = dgate + width, *in_out = grad + row * width;
        for (long i = 0; i < width; i += 16) {
            const __mmask16 mask = mask_of(width - i);
            __m512 g = load16_masked(gate + i, mask), u = load16_masked(up + i, mask), d = load16_masked(in_out + i, mask);
            __m512 s = sigmoid16(g), silu = _mm512_mul_ps(g, s);
            // silu'(g) = s (1 + g (1 - s)) = s + silu (1 - s)
            __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, s), s);
            store16_masked(dgate + i, _mm512_mul_ps(_mm512_mul_ps(d, u), slope), mask);
            store16_masked(dup + i, _mm512_mul_ps(d, silu), mask);
            store16_masked(in_out + i, _mm512_mul_ps(silu, u), mask);
        }
    }
}

// Turns the first `heads` heads of each row by its angles, in place: (a, b) -> (a cos - b sin, b cos + a sin) for the two
// halves of a head. direction -1 turns back, which is also the gradient. cos and sin are (rows, width), width a multiple
// of 32, the second half equal to the first.
extern "C" void strop_rotate(bf16* x, const bf16* cosine, const bf16* sine, long rows, long row_stride, long heads, long width,
                             float direction, int threads) {
    const long half = width / 2;
    const __m512 sign = _mm512_set1_ps(direction);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        for (long head = 0; head < heads; head++) {
            bf16 *first = x + row * row_stride + head * width, *second = first + half;
            for (long i = 0; i < half; i += 16) {
                __m512 c = load16(cosine + row * width + i), s = _mm512_mul_ps(sign, load16(sine + row * width + i));
                __m512 a = load16(first + i), b = load16(second + i);
                store16(first + i, _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)));
                store16(second + i, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
            }
        }
    }
}

static const long SUM_PIECE = 1024;  // entries added up in one register before they join the total

// Per row of logits, z = logit * scale: log-probability of the label, log-sum-exp, and (where wanted) the entropy. The
// logits of `block` columns at a time, a multiple of SUM_PIECE or all, lie together: row after row, and then the next block.
extern "C" void strop_head_statistics(const bf16* logits, const int64_t* labels, float* logprobs, float* lse, float* entropy,
                                      long rows, long width, long block, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const auto from = [=](long column) {
            const long first = column / block * block;
            return logits + first * rows + row * std::min(block, width - first) + column - first;
        };
        const __m512 minus_infinity = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        __m512 largest = minus_infinity;
        // _mm512_max_ps drops a NaN in its first operand, so NaNs are counted: a sum of differences keeps them.
        __m512 poison = _mm512_setzero_ps();
        for (long begin = 0; begin < width; begin += SUM_PIECE) {
            const bf16* z = from(begin);
            const long count = std::min(width - begin, SUM_PIECE);
            for (long i = 0; i < count; i += 16) {
                const __mmask16 mask = mask_of(count - i);
                __m512 value = load16_masked(z + i, mask);
                poison = _mm512_fmadd_ps(value, _mm512_setzero_ps(), poison);
                largest = _mm512_mask_max_ps(largest, mask, largest, value);
            }
        }
        const float top = _mm512_reduce_max_ps(largest);
        const __m512 top16 = _mm512_set1_ps(top), scale16 = _mm512_set1_ps(scale);
        float total = 0, weighted = 0;
        for (long begin = 0; begin < width; begin += SUM_PIECE) {
            const bf16* z = from(begin);
            const long count = std::min(width - begin, SUM_PIECE);
            __m512 sum = _mm512_setzero_ps(), product = _mm512_setzero_ps();
            for (long i = 0; i < count; i += 16) {
                const __mmask16 mask = mask_of(count - i);
                __m512 shifted = _mm512_mul_ps(_mm512_sub_ps(load16_masked(z + i, mask), top16), scale16);
                __m512 e = _mm512_maskz_mov_ps(mask, exp16(shifted));
                sum = _mm512_add_ps(sum, e);
                product = _mm512_mask3_fmadd_ps(e, shifted, product, _mm512_cmp_ps_mask(e, _mm512_setzero_ps(), _CMP_GT_OQ));
            }
            total += _mm512_reduce_add_ps(sum);
            weighted += _mm512_reduce_add_ps(product);
        }
        const float log_total = std::log(total) + _mm512_reduce_add_ps(poison);
        lse[row] = top * scale + log_total;
        logprobs[row] = (to_float(*from(labels[row])) - top) * scale - log_total;
        if (entropy) entropy[row] = log_total - weighted / total;
    }
}

// Overwrites a block of logits, columns [first, first + width) of the vocabulary, by its gradient:
//   scale * (onehot(label) g - p (g + (log p + entropy) h)),  g and h the gradients of logprob and entropy (h may be null).
extern "C" void strop_head_gradient(bf16* logits, const int64_t* labels, const float* lse, const float* grad_logprobs,
                                    const float* entropy, const float* grad_entropy, long rows, long width, long first,
                                    float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        bf16* z = logits + row * width;
        const float g = grad_logprobs[row], h = grad_entropy ? grad_entropy[row] : 0.0f;
        const __m512 scale16 = _mm512_set1_ps(scale), lse16 = _mm512_set1_ps(lse[row]);
        const __m512 slope = _mm512_set1_ps(-scale * h);
        const __m512 constant = _mm512_set1_ps(-scale * (g + (grad_entropy ? entropy[row] * h : 0.0f)));
        const long label = labels[row] - first;
        const bool is_here = label >= 0 && label < width;
        const float own = is_here ? std::exp(to_float(z[label]) * scale - lse[row]) : 0.0f;
        const float own_log = is_here ? to_float(z[label]) * scale - lse[row] : 0.0f;
        for (long i = 0; i < width; i += 16) {
            const __mmask16 mask = mask_of(width - i);
            __m512 log_p = _mm512_fmsub_ps(load16_masked(z + i, mask), scale16, lse16);
            __m512 factor = grad_entropy ? _mm512_fmadd_ps(log_p, slope, constant) : constant;
            store16_masked(z + i, _mm512_mul_ps(exp16(log_p), factor), mask);
        }
        if (is_here) z[label] = to_bf16(scale * (g - own * (g + (grad_entropy ? (own_log + entropy[row]) * h : 0.0f))));
    }
}
