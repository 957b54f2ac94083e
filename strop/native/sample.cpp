// The next token of each row of bf16 logits: the inverse of its cumulative distribution at a uniform number.
//
// The search has two levels, sums over blocks and then the entries of one block, so that no probability is ever stored:
// a row is read twice, and one block a third time. What is drawn does not depend on the other rows or on the threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t BLOCK = 256;  // entries; near the square root of usual vocabularies

inline __mmask16 mask_of(int64_t left) { return left >= 16 ? 0xffff : left > 0 ? __mmask16((1u << left) - 1) : 0; }

// The largest logit, NaN if any is.
float largest(const bf16* logits, int64_t width) {
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 result = lowest;
    __mmask16 is_nan = 0;
    for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 mask = mask_of(width - i);
        const __m512 value = _mm512_mask_mov_ps(lowest, mask, load16_masked(logits + i, mask));
        is_nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        result = _mm512_max_ps(result, value);
    }
    return is_nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(result);
}

int64_t first_equal(const bf16* logits, int64_t width, float value) {
    for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 mask = mask_of(width - i);
        const __mmask16 is_equal = _mm512_mask_cmp_ps_mask(mask, load16_masked(logits + i, mask), _mm512_set1_ps(value), _CMP_EQ_OQ);
        if (is_equal) return i + __builtin_ctz(is_equal);
    }
    return 0;
}

// exp((logit - highest) / temperature) of sixteen entries, 0 past the end.
inline __m512 weights16(const bf16* logits, int64_t left, __m512 highest, __m512 temperature) {
    const __mmask16 mask = mask_of(left);
    const __m512 scaled = _mm512_div_ps(_mm512_sub_ps(load16_masked(logits, mask), highest), temperature);
    return _mm512_maskz_mov_ps(mask, exp16(scaled));
}

// Brought back just below the total, so that the search ends on an entry that has weight.
inline double below(double target, double total) { return std::fmin(target, std::nextafter(total, 0.0)); }

void draw(const bf16* logits, int64_t width, float temperature, double uniform, double* cumulative, int64_t* token, float* logprob) {
    const float top = largest(logits, width);
    *token = 0;
    *logprob = top - top;  // 0, but NaN where it is not finite
    if (!std::isfinite(top)) return;
    if (temperature == 0) {
        *token = first_equal(logits, width, top);
        return;
    }
    const __m512 highest = _mm512_set1_ps(top), divisor = _mm512_set1_ps(temperature);
    const int64_t num_blocks = (width + BLOCK - 1) / BLOCK;
    double total = 0;
    for (int64_t block = 0; block < num_blocks; block++) {
        const int64_t begin = block * BLOCK, end = std::min(width, begin + BLOCK);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = begin; i < end; i += 16) sum = _mm512_add_ps(sum, weights16(logits + i, width - i, highest, divisor));
        cumulative[block] = total += double(_mm512_reduce_add_ps(sum));
    }
    double target = below(uniform * total, total);
    int64_t block = 0;
    while (cumulative[block] <= target) block++;
    if (block) target -= cumulative[block - 1];

    alignas(64) float weights[BLOCK];
    double inside[BLOCK], sum = 0;
    const int64_t begin = block * BLOCK, count = std::min(BLOCK, width - begin);
    for (int64_t i = 0; i < count; i += 16) _mm512_store_ps(weights + i, weights16(logits + begin + i, width - begin - i, highest, divisor));
    for (int64_t i = 0; i < count; i++) inside[i] = sum += double(weights[i]);
    target = below(target, sum);
    int64_t place = 0;
    while (inside[place] <= target) place++;
    *token = begin + place;
    *logprob = float(std::log(double(weights[place])) - std::log(total));
}

}  // namespace

// temperature 0 takes the largest logit, the first of equals. A row whose largest logit is not finite gets NaN.
extern "C" void strop_sample(const bf16* logits, const float* temperatures, const double* uniforms, int64_t* tokens, float* logprobs, long rows, long width, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> cumulative((width + BLOCK - 1) / BLOCK);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++)
            draw(logits + row * width, width, temperatures[row], uniforms[row], cumulative.data(), tokens + row, logprobs + row);
    }
}
