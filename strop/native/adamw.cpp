// AdamW in one pass over memory, for bf16 parameters whose float32 masters are kept as parameter + 16 low bits.
#include <algorithm>
#include <vector>

#include "simd.h"

static const long PIECE = 65536;  // entries per task: the sums below depend on it, not on the number of threads

// master = parameter's bits << 16, plus a signed 16-bit rest: the parameter is the master rounded to nearest, ties away
// from zero. Exact for every finite master whose rounding is finite.
static inline __m512i join(const bf16* parameter, const int16_t* rest) {
    __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)parameter)), 16);
    return _mm512_add_epi32(high, _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)rest)));
}

static inline void split(__m512i master, bf16* parameter, int16_t* rest) {
    __m512i high = _mm512_srli_epi32(_mm512_add_epi32(master, _mm512_set1_epi32(0x8000)), 16);
    _mm256_storeu_si256((__m256i*)parameter, _mm512_cvtepi32_epi16(high));
    _mm256_storeu_si256((__m256i*)rest, _mm512_cvtepi32_epi16(_mm512_sub_epi32(master, _mm512_slli_epi32(high, 16))));
}

struct Adam {
    __m512 scale, shrink, beta1, rest1, beta2, rest2, step_size, root_correction, eps;

    // The master after one update, with the roundings of torch's fused kernel: decay, moments, then the step.
    __m512 update(__m512 weight, __m512 gradient, float* mean, float* square) const {
        gradient = _mm512_mul_ps(gradient, scale);
        __m512 m = _mm512_loadu_ps(mean);
        m = _mm512_fmadd_ps(rest1, _mm512_sub_ps(gradient, m), m);
        __m512 v = _mm512_fmadd_ps(_mm512_mul_ps(rest2, gradient), gradient, _mm512_mul_ps(_mm512_loadu_ps(square), beta2));
        _mm512_storeu_ps(mean, m);
        _mm512_storeu_ps(square, v);
        __m512 root = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(v), root_correction), eps);
        weight = _mm512_mul_ps(weight, shrink);
        asm("" : "+v"(weight));  // two roundings: the compiler must not fuse them
        return _mm512_sub_ps(weight, _mm512_div_ps(_mm512_mul_ps(step_size, m), root));
    }
};

static void update_piece(const Adam& adam, bf16* parameter, int16_t* rest, const void* gradient, bool is_bf16, float* mean,
                         float* square, long begin, long end) {
    long i = begin;
    for (; i + 16 <= end; i += 16) {
        __m512 g = is_bf16 ? load16((const bf16*)gradient + i) : _mm512_loadu_ps((const float*)gradient + i);
        __m512 weight = _mm512_castsi512_ps(join(parameter + i, rest + i));
        split(_mm512_castps_si512(adam.update(weight, g, mean + i, square + i)), parameter + i, rest + i);
    }
    if (i < end) {  // the last few through padded copies
        const long left = end - i;
        bf16 p[16] = {}, g16[16] = {};
        int16_t r[16] = {};
        float g32[16] = {}, m[16] = {}, v[16] = {};
        std::copy_n(parameter + i, left, p);
        std::copy_n(rest + i, left, r);
        std::copy_n(mean + i, left, m);
        std::copy_n(square + i, left, v);
        if (is_bf16) std::copy_n((const bf16*)gradient + i, left, g16);
        else std::copy_n((const float*)gradient + i, left, g32);
        __m512 g = is_bf16 ? load16(g16) : _mm512_loadu_ps(g32);
        split(_mm512_castps_si512(adam.update(_mm512_castsi512_ps(join(p, r)), g, m, v)), p, r);
        std::copy_n(p, left, parameter + i);
        std::copy_n(r, left, rest + i);
        std::copy_n(m, left, mean + i);
        std::copy_n(v, left, square + i);
    }
}

extern "C" void strop_adamw(bf16* parameter, int16_t* rest, const void* gradient, int is_bf16, float* mean, float* square,
                            long count, double grad_scale, double lr, double beta1, double beta2, double eps, double decay,
                            double correction1, double root_correction2, int threads) {
    auto all = [](double value) { return _mm512_set1_ps(float(value)); };
    const Adam adam = {all(grad_scale), all(1 - lr * decay), all(beta1), all(1 - beta1), all(beta2), all(1 - beta2),
                       all(lr / correction1), all(root_correction2), all(eps)};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long begin = 0; begin < count; begin += PIECE)
        update_piece(adam, parameter, rest, gradient, is_bf16, mean, square, begin, std::min(count, begin + PIECE));
}

// The sum of squares of `count` entries; inf or NaN where one is not finite.
extern "C" double strop_square_sum(const void* values, int is_bf16, long count, int threads) {
    const long pieces = (count + PIECE - 1) / PIECE;
    std::vector<double> sums(pieces);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long piece = 0; piece < pieces; piece++) {
        const long end = std::min(count, (piece + 1) * PIECE);
        double total = 0;
        for (long begin = piece * PIECE; begin < end; begin += 4096) {  // few enough for float lanes
            __m512 sum = _mm512_setzero_ps();
            for (long i = begin; i < std::min(end, begin + 4096); i += 16) {
                const long left = end - i;
                const __mmask16 mask = left >= 16 ? 0xffff : __mmask16((1u << left) - 1);
                __m512 x = is_bf16 ? load16_masked((const bf16*)values + i, mask)
                                   : _mm512_maskz_loadu_ps(mask, (const float*)values + i);
                sum = _mm512_fmadd_ps(x, x, sum);
            }
            total += _mm512_reduce_add_ps(sum);
        }
        sums[piece] = total;
    }
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
}

// total += gradient: bf16 into float32.
extern "C" void strop_accumulate(float* total, const bf16* gradient, long count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long begin = 0; begin < count; begin += PIECE) {
        const long end = std::min(count, begin + PIECE);
        for (long i = begin; i < end; i += 16) {
            const __mmask16 mask = end - i >= 16 ? 0xffff : __mmask16((1u << (end - i)) - 1);
            __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, total + i), load16_masked(gradient + i, mask));
            _mm512_mask_storeu_ps(total + i, mask, sum);
        }
    }
}
