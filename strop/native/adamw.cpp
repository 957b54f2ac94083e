// AdamW in one pass over memory, for bf16 parameters whose float32 masters are kept as parameter + 16 low bits.
#include <algorithm>
#include <vector>

#include "simd.h"

static const long BLOCK = 256;  // entries that share a scale, in eight_bit.py
static const long PIECE = 65536;  // entries per task: the sums below depend on it, not on the number of threads

// master = parameter's bits << 16, plus a signed 16-bit rest: the parameter is the master rounded to nearest, ties away
// from zero. Exact for every finite master whose rounding is finite.
static inline __m512i join(const bf16* parameter, const int16_t* rest) {
    __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)parameter)), 16);
    return _mm512_add_epi32(high, _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)rest)));
}

// Bits that are what they were stay unwritten, here and below: pages of zeros (own_pages.py) take no memory as long as
// nothing else is written to them, such as the moments of a token's embedding that has not had a gradient yet.
static inline void split(__m512i master, bf16* parameter, int16_t* rest) {
    __m512i high = _mm512_srli_epi32(_mm512_add_epi32(master, _mm512_set1_epi32(0x8000)), 16);
    __m256i low = _mm512_cvtepi32_epi16(_mm512_sub_epi32(master, _mm512_slli_epi32(high, 16)));
    _mm256_storeu_si256((__m256i*)parameter, _mm512_cvtepi32_epi16(high));
    if (_mm256_cmpneq_epi16_mask(low, _mm256_loadu_si256((const __m256i*)rest))) _mm256_storeu_si256((__m256i*)rest, low);
}

static inline void store_changed(float* target, __m512 before, __m512 after) {
    if (_mm512_cmpneq_epi32_mask(_mm512_castps_si512(before), _mm512_castps_si512(after))) _mm512_storeu_ps(target, after);
}

struct Adam {
    __m512 scale, shrink, beta1, rest1, beta2, rest2, step_size, root_correction, eps;
    // Moments are zero before the first step, and not read: reading a page that was never written costs a second fault.
    bool is_first;

    // The master after one update, with the roundings of torch's fused kernel: decay, moments, then the step.
    __m512 update(__m512 weight, __m512 gradient, float* mean, float* square) const {
        gradient = _mm512_mul_ps(gradient, scale);
        const __m512 old_m = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(mean);
        const __m512 old_v = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(square);
        __m512 m = _mm512_fmadd_ps(rest1, _mm512_sub_ps(gradient, old_m), old_m);
        __m512 v = _mm512_fmadd_ps(_mm512_mul_ps(rest2, gradient), gradient, _mm512_mul_ps(old_v, beta2));
        store_changed(mean, old_m, m);
        store_changed(square, old_v, v);
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
                       all(lr / correction1), all(root_correction2), all(eps), correction1 == 1 - beta1};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long begin = 0; begin < count; begin += PIECE)
        update_piece(adam, parameter, rest, gradient, is_bf16, mean, square, begin, std::min(count, begin + PIECE));
}

// The codes of eight_bit.py: what each stands for, and how a fraction in [-1, 1] finds its own.
struct Codes {
    const float *values, *bounds;  // 256 each; the last bound is inf
    const uint8_t* first;          // by a float's upper half: its code, or the one below it

    __m512 decode(const uint8_t* codes, __m512 scale) const {
        __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
        return _mm512_mul_ps(_mm512_i32gather_ps(index, values, 4), scale);
    }

    void encode(__m512 fraction, uint8_t* codes) const {
        __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(fraction), 16);
        __m512i code = _mm512_and_si512(_mm512_i32gather_epi32(upper, first, 1), _mm512_set1_epi32(255));
        __mmask16 is_above = _mm512_cmp_ps_mask(fraction, _mm512_i32gather_ps(code, bounds, 4), _CMP_GT_OQ);
        code = _mm512_mask_add_epi32(code, is_above, code, _mm512_set1_epi32(1));
        _mm_storeu_si128((__m128i*)codes, _mm512_cvtepi32_epi8(code));
    }

    // All 256 numbers of a block; returns their scale.
    float encode_block(const float* numbers, uint8_t* codes) const {
        __m512 largest = _mm512_setzero_ps();
        for (long i = 0; i < BLOCK; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(numbers + i)));
        const float scale = _mm512_reduce_max_ps(largest);
        const __m512 divisor = _mm512_set1_ps(scale == 0 ? 1.0f : scale);
        for (long i = 0; i < BLOCK; i += 16) encode(_mm512_div_ps(_mm512_loadu_ps(numbers + i), divisor), codes + i);
        return scale;
    }
};

static void update_block(const Adam& adam, const Codes& signed_codes, const Codes& unsigned_codes, bf16* parameter,
                         int16_t* rest, const void* gradient, bool is_bf16, uint8_t* mean, uint8_t* square,
                         float* mean_scale, float* square_scale) {
    alignas(64) float m[BLOCK], v[BLOCK];
    const __m512 m_scale = _mm512_set1_ps(*mean_scale), v_scale = _mm512_set1_ps(*square_scale);
    for (long i = 0; i < BLOCK; i += 16) {
        _mm512_store_ps(m + i, signed_codes.decode(mean + i, m_scale));
        _mm512_store_ps(v + i, unsigned_codes.decode(square + i, v_scale));
        __m512 g = is_bf16 ? load16((const bf16*)gradient + i) : _mm512_loadu_ps((const float*)gradient + i);
        __m512 weight = _mm512_castsi512_ps(join(parameter + i, rest + i));
        split(_mm512_castps_si512(adam.update(weight, g, m + i, v + i)), parameter + i, rest + i);
    }
    *mean_scale = signed_codes.encode_block(m, mean);
    *square_scale = unsigned_codes.encode_block(v, square);
}

// Both moments as one byte per entry and one scale per block of 256. tables: values, bounds and first codes, of the
// signed and then of the unsigned codes.
extern "C" void strop_adamw8(bf16* parameter, int16_t* rest, const void* gradient, int is_bf16, uint8_t* mean,
                             uint8_t* square, float* mean_scales, float* square_scales, const void* const* tables,
                             long count, double grad_scale, double lr, double beta1, double beta2, double eps,
                             double decay, double correction1, double root_correction2, int threads) {
    auto all = [](double value) { return _mm512_set1_ps(float(value)); };
    const Adam adam = {all(grad_scale), all(1 - lr * decay), all(beta1), all(1 - beta1), all(beta2), all(1 - beta2),
                       all(lr / correction1), all(root_correction2), all(eps), false};
    auto codes = [&](int at) {
        return Codes{(const float*)tables[at], (const float*)tables[at + 1], (const uint8_t*)tables[at + 2]};
    };
    const Codes signed_codes = codes(0), unsigned_codes = codes(3);
    const long width = is_bf16 ? 2 : 4;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long block = 0; block < (count + BLOCK - 1) / BLOCK; block++) {
        const long at = block * BLOCK, left = std::min(BLOCK, count - at);
        const char* g = (const char*)gradient + at * width;
        if (left == BLOCK) {
            update_block(adam, signed_codes, unsigned_codes, parameter + at, rest + at, g, is_bf16, mean + at, square + at,
                         mean_scales + block, square_scales + block);
            continue;
        }
        // The last block through padded copies. Padding must decode to 0 and stay there.
        bf16 p[BLOCK] = {};
        int16_t r[BLOCK] = {};
        float padded[BLOCK] = {};
        uint8_t m[BLOCK], v[BLOCK] = {};
        std::fill_n(m, BLOCK, signed_codes.first[0]);
        std::copy_n(parameter + at, left, p);
        std::copy_n(rest + at, left, r);
        std::memcpy(padded, g, left * width);
        std::copy_n(mean + at, left, m);
        std::copy_n(square + at, left, v);
        update_block(adam, signed_codes, unsigned_codes, p, r, padded, is_bf16, m, v, mean_scales + block,
                     square_scales + block);
        std::copy_n(p, left, parameter + at);
        std::copy_n(r, left, rest + at);
        std::copy_n(m, left, mean + at);
        std::copy_n(v, left, square + at);
    }
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
