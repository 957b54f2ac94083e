// One decode step of the whole decoder: S sequences, one new token each, bf16 weights and activations.
//
// What a step needs is small beside what it reads, so everything between two matrix products is done on the way: norms
// and SwiGLU write their result in the order in which the next product reads it. All threads walk through the layers
// together and wait for each other between phases; nothing returns to Python in between. Where torch would store an
// intermediate result as bf16, it is rounded to bf16 here too, so that rollouts and training see the same numbers.
//
// Names: S rows (sequences), D width, N query heads, K key-value heads, H head width, I MLP width, T cache positions.
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "tile.h"

namespace {

// Activations in the order in which the products read them: blocks of `tile` rows; inside a block, pair after pair of
// inputs, and for each pair the rows side by side. Rows that pad the last block are zero.
struct Activations {
    std::vector<uint32_t> pairs;
    int64_t num_pairs = 0;
    int tile = 0, num_tiles = 0;

    void shape(int64_t rows, int64_t width) {
        num_tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
        tile = (rows + num_tiles - 1) / num_tiles;
        num_pairs = width / 2;
        pairs.assign(size_t(num_tiles) * tile * num_pairs, 0);
    }
    uint32_t* row(int64_t index) { return pairs.data() + (index / tile) * tile * num_pairs + index % tile; }
    // Sixteen pairs of one row, starting at input `column`.
    void put(int64_t index, int64_t column, __m512i sixteen_pairs) {
        alignas(64) uint32_t values[LANES];
        _mm512_store_si512(values, sixteen_pairs);
        uint32_t* target = row(index) + column / 2 * tile;
        for (int i = 0; i < LANES; i++) target[i * tile] = values[i];
    }
};

// This thread's share of activations * weights^T. `finish(row, group, left, right)` takes 16 + 16 output columns.
template <int ROWS, typename Finish>
void product_rows(const Activations& input, const bf16* weights, int64_t num_groups, int64_t num_rows, Finish&& finish) {
    const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
    const int64_t group_size = input.num_pairs * 2 * GROUP;
    for (int64_t group = num_groups * thread / num_threads; group < num_groups * (thread + 1) / num_threads; group++) {
        for (int tile = 0; tile < input.num_tiles; tile++) {
            __m512 sums[ROWS][2];
            product_tile<ROWS>(input.pairs.data() + tile * ROWS * input.num_pairs, (const uint32_t*)(weights + group * group_size), input.num_pairs, sums);
            const int used = std::min<int64_t>(ROWS, num_rows - int64_t(tile) * ROWS);
            for (int r = 0; r < used; r++) finish(int64_t(tile) * ROWS + r, group, sums[r][0], sums[r][1]);
        }
    }
}

template <typename Finish>
void product(const Activations& input, const bf16* weights, int64_t num_groups, int64_t num_rows, Finish&& finish) {
    switch (input.tile) {
#define ROWS_CASE(n) \
    case n: return product_rows<n>(input, weights, num_groups, num_rows, finish)
        ROWS_CASE(1); ROWS_CASE(2); ROWS_CASE(3); ROWS_CASE(4); ROWS_CASE(5); ROWS_CASE(6); ROWS_CASE(7);
        ROWS_CASE(8); ROWS_CASE(9); ROWS_CASE(10); ROWS_CASE(11); ROWS_CASE(12); ROWS_CASE(13); ROWS_CASE(14);
#undef ROWS_CASE
    }
}

inline __m512 plus_bias(__m512 value, const bf16* bias, int64_t column) {
    return round16(bias ? _mm512_add_ps(value, load16(bias + column)) : value);
}

inline __m512i both_as_bf16(__m512 left, __m512 right) {
    return (__m512i)_mm512_cvtne2ps_pbh(right, left);
}

inline float inverse_rms(const bf16* x, int64_t width, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES) {
        const __m512 value = load16(x + i);
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / float(width) + eps);
}

inline __m512 normed(const bf16* x, const bf16* weight, float inverse) {
    return _mm512_mul_ps(_mm512_mul_ps(load16(x), _mm512_set1_ps(inverse)), load16(weight));
}

// One head's vector, normalised if `norm` is given and turned by its angles if `cos` is, in place.
void prepare_head(bf16* head, int64_t width, const bf16* norm, float eps, const bf16* cos, const bf16* sin) {
    if (norm) {
        const float inverse = inverse_rms(head, width, eps);
        for (int64_t i = 0; i < width; i += LANES) store16(head + i, normed(head + i, norm + i, inverse));
    }
    if (!cos) return;
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const __m512 first = load16(head + i), second = load16(head + half + i);
        const __m512 c1 = load16(cos + i), c2 = load16(cos + half + i), s1 = load16(sin + i), s2 = load16(sin + half + i);
        store16(head + i, _mm512_sub_ps(round16(_mm512_mul_ps(first, c1)), round16(_mm512_mul_ps(second, s1))));
        store16(head + half + i, _mm512_add_ps(round16(_mm512_mul_ps(second, c2)), round16(_mm512_mul_ps(first, s2))));
    }
}

// The sums of sixteen vectors, in order: halves the vectors and the lanes that still belong together in each round.
inline __m512 sum_each(const __m512 (&x)[LANES]) {
    __m512 by_four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 *a = x + 4 * i, *b = a + 2;
        const __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
        const __m512 second = _mm512_add_ps(_mm512_unpacklo_ps(b[0], b[1]), _mm512_unpackhi_ps(b[0], b[1]));
        const __m512d c = _mm512_castps_pd(first), d = _mm512_castps_pd(second);
        by_four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    }
    const auto join = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return join(join(by_four[0], by_four[1]), join(by_four[2], by_four[3]));
}

// scores[t] = query . keys[t] * scale for t in [0, length); returns their maximum. Writes up to a multiple of 16.
float score(const bf16* query, const bf16* keys, int64_t length, int64_t width, float scale, float* scores) {
    __m512 highest = _mm512_set1_ps(-INFINITY);
    for (int64_t t = 0; t < length; t += LANES) {
        __m512 sums[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            // Past the end the last key stands in: it is no new maximum.
            const bf16* key = keys + std::min(t + i, length - 1) * width;
            sums[i] = _mm512_setzero_ps();
            for (int64_t h = 0; h < width; h += 32)
                sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(query + h), (__m512bh)_mm512_loadu_si512(key + h));
        }
        const __m512 value = _mm512_mul_ps(sum_each(sums), _mm512_set1_ps(scale));
        _mm512_storeu_ps(scores + t, value);
        highest = _mm512_max_ps(highest, value);
    }
    return _mm512_reduce_max_ps(highest);
}

// Turns scores into exp(score - highest), zero up to the next multiple of 16, and returns their sum.
float exponentials(float* scores, int64_t length, float highest) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t t = 0; t < length; t += LANES) {
        const __mmask16 mask = length - t >= LANES ? 0xffff : (1u << (length - t)) - 1;
        const __m512 value = _mm512_maskz_mov_ps(mask, exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + t), _mm512_set1_ps(highest))));
        _mm512_storeu_ps(scores + t, value);
        total = _mm512_add_ps(total, value);
    }
    return _mm512_reduce_add_ps(total);
}

// sum_t weights[t] * values[t], 32 columns at a time for HEADS query heads that share the values.
template <int HEADS>
void weighted_sum(const float* weights, int64_t weights_stride, const bf16* values, int64_t length, int64_t width, const float* inverse_totals, Activations& output, int64_t row, int64_t column) {
    const __m512i odd_half = _mm512_set1_epi32(0xffff0000);
    for (int64_t h = 0; h < width; h += 32) {
        __m512 even[HEADS], odd[HEADS];
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) even[g] = odd[g] = _mm512_setzero_ps();
        for (int64_t t = 0; t < length; t++) {
            const __m512i both = _mm512_loadu_si512(values + t * width + h);
            const __m512 value_even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            const __m512 value_odd = _mm512_castsi512_ps(_mm512_and_si512(both, odd_half));
#pragma GCC unroll 4
            for (int g = 0; g < HEADS; g++) {
                const __m512 weight = _mm512_set1_ps(weights[g * weights_stride + t]);
                even[g] = _mm512_fmadd_ps(weight, value_even, even[g]);
                odd[g] = _mm512_fmadd_ps(weight, value_odd, odd[g]);
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) {
            const __m512 inverse = _mm512_set1_ps(inverse_totals[g]);
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(even[g], inverse)));
            const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(odd[g], inverse)));
            output.put(row, column + g * width + h, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

}  // namespace

extern "C" {

struct Layer {
    const bf16 *attention_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *output, *output_bias;
    const bf16 *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
    int64_t has_rope;
};

struct Shape {
    int64_t num_layers, D, N, K, H, I;
    float eps, scale;
};

// Asks the system for large pages behind a block that is not in use yet: a step reads all weights once, in order.
void strop_use_large_pages(void* block, int64_t num_bytes) {
    const uintptr_t page = 1 << 21, begin = ((uintptr_t)block + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)block + num_bytes) / page * page;
    if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
}

// Rows of `weight` (N, K) in the order in which product_tile reads them: group g holds rows [g * stride, + 16) and
// [g * stride + second, + 16), pair after pair of their inputs.
void strop_pack(const bf16* weight, bf16* packed, int64_t num_groups, int64_t width, int64_t stride, int64_t second, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t group = 0; group < num_groups; group++)
        pack_panel(weight + group * stride * width, second * width, width, (uint32_t*)(packed + group * width * GROUP));
}

// One token for each of num_rows sequences. `stream` (S, D) holds their embeddings and is overwritten; `hidden` (S, D)
// gets the final norm's output. Keys and values of layer l start at keys + l * layer_stride, (slot, K, T, H) with
// T = capacity; position lengths[s] of slot s is written, and [0, lengths[s]] is read. cos and sin are (S, H).
void strop_decode_step(const Shape* shape, const Layer* layers, const bf16* final_norm, int64_t num_rows, bf16* stream, bf16* hidden, bf16* keys, bf16* values, int64_t layer_stride, int64_t capacity, const int64_t* lengths, const bf16* cos, const bf16* sin, int64_t num_threads) {
    const int64_t D = shape->D, N = shape->N, K = shape->K, H = shape->H, I = shape->I, S = num_rows;
    const int64_t heads_per_kv = N / K, qkv_width = (N + 2 * K) * H;
    const int64_t scores_stride = (capacity + LANES) / LANES * LANES + LANES;
    std::vector<bf16> qkv(S * qkv_width);
    std::vector<float> scores(num_threads * heads_per_kv * scores_stride);
    Activations normed_input, attended, gated;
    normed_input.shape(S, D);
    attended.shape(S, N * H);
    gated.shape(S, I);

    const auto norm_rows = [&](const bf16* weight) {
#pragma omp for schedule(static)
        for (int64_t s = 0; s < S; s++) {
            const bf16* x = stream + s * D;
            const float inverse = inverse_rms(x, D, shape->eps);
            for (int64_t i = 0; i < D; i += GROUP)
                normed_input.put(s, i, both_as_bf16(normed(x + i, weight + i, inverse), normed(x + i + LANES, weight + i + LANES, inverse)));
        }
    };
    const auto add_to_stream = [&](const bf16* bias) {
        return [=](int64_t row, int64_t group, __m512 left, __m512 right) {
            bf16* x = stream + row * D + group * GROUP;
            store16(x, _mm512_add_ps(load16(x), plus_bias(left, bias, group * GROUP)));
            store16(x + LANES, _mm512_add_ps(load16(x + LANES), plus_bias(right, bias, group * GROUP + LANES)));
        };
    };

#pragma omp parallel num_threads(num_threads)
    for (int64_t l = 0; l < shape->num_layers; l++) {
        const Layer& layer = layers[l];
        norm_rows(layer.attention_norm);
        product(normed_input, layer.qkv, qkv_width / GROUP, S, [&](int64_t row, int64_t group, __m512 left, __m512 right) {
            bf16* target = qkv.data() + row * qkv_width + group * GROUP;
            store16(target, plus_bias(left, layer.qkv_bias, group * GROUP));
            store16(target + LANES, plus_bias(right, layer.qkv_bias, group * GROUP + LANES));
        });
#pragma omp barrier
#pragma omp for schedule(dynamic, 2)
        for (int64_t item = 0; item < S * K; item++) {
            const int64_t s = item / K, k = item % K, length = lengths[s] + 1;
            bf16* row = qkv.data() + s * qkv_width;
            bf16 *query = row + k * heads_per_kv * H, *key = row + (N + k) * H, *value = row + (N + K + k) * H;
            const bf16 *row_cos = layer.has_rope ? cos + s * H : nullptr, *row_sin = sin + s * H;
            for (int64_t g = 0; g < heads_per_kv; g++) prepare_head(query + g * H, H, layer.q_norm, shape->eps, row_cos, row_sin);
            prepare_head(key, H, layer.k_norm, shape->eps, row_cos, row_sin);
            bf16* own_keys = keys + l * layer_stride + item * capacity * H;
            bf16* own_values = values + l * layer_stride + item * capacity * H;
            std::memcpy(own_keys + lengths[s] * H, key, H * sizeof(bf16));
            std::memcpy(own_values + lengths[s] * H, value, H * sizeof(bf16));
            // The values of this head and the keys of the next come from memory while products are computed.
            const auto fetch = [&](const bf16* begin, int64_t count) {
                for (int64_t i = 0; i < count * H; i += 32) _mm_prefetch((const char*)(begin + i), _MM_HINT_T1);
            };
            fetch(own_values, length);
            if (item + 1 < S * K) fetch(keys + l * layer_stride + (item + 1) * capacity * H, lengths[(item + 1) / K] + 1);
            float* own_scores = scores.data() + omp_get_thread_num() * heads_per_kv * scores_stride;
            for (int64_t g = 0; g < heads_per_kv;) {
                const int64_t together = std::min<int64_t>(4, heads_per_kv - g);
                float inverse_totals[4];
                for (int64_t i = 0; i < together; i++) {
                    float* head_scores = own_scores + i * scores_stride;
                    const float highest = score(query + (g + i) * H, own_keys, length, H, shape->scale, head_scores);
                    inverse_totals[i] = 1.0f / exponentials(head_scores, length, highest);
                }
                const int64_t column = (k * heads_per_kv + g) * H;
                const auto sum = together == 4 ? weighted_sum<4> : together == 3 ? weighted_sum<3> : together == 2 ? weighted_sum<2> : weighted_sum<1>;
                sum(own_scores, scores_stride, own_values, length, H, inverse_totals, attended, s, column);
                g += together;
            }
        }
        product(attended, layer.output, D / GROUP, S, add_to_stream(layer.output_bias));
#pragma omp barrier
        norm_rows(layer.mlp_norm);
        product(normed_input, layer.gate_up, I / LANES, S, [&](int64_t row, int64_t group, __m512 gate, __m512 up) {
            gate = plus_bias(gate, layer.gate_up_bias, group * LANES);
            up = plus_bias(up, layer.gate_up_bias ? layer.gate_up_bias + I : nullptr, group * LANES);
            const __m512 one = _mm512_set1_ps(1.0f);
            const __m512 silu = _mm512_div_ps(gate, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), gate))));
            alignas(32) uint32_t pairs[LANES / 2];
            _mm256_store_si256((__m256i*)pairs, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(round16(silu), up)));
            uint32_t* target = gated.row(row) + group * (LANES / 2) * gated.tile;
            for (int i = 0; i < LANES / 2; i++) target[i * gated.tile] = pairs[i];
        });
#pragma omp barrier
        product(gated, layer.down, D / GROUP, S, add_to_stream(layer.down_bias));
#pragma omp barrier
    }
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t s = 0; s < S; s++) {
        const bf16* x = stream + s * D;
        const float inverse = inverse_rms(x, D, shape->eps);
        for (int64_t i = 0; i < D; i += LANES) store16(hidden + s * D + i, normed(x + i, final_norm + i, inverse));
    }
}

// output (S, num_groups * 32) = input (S, width) * weights^T, for a packed weight such as the LM head.
void strop_packed_product(const bf16* input, const bf16* weights, bf16* output, int64_t num_rows, int64_t width, int64_t num_groups, int64_t num_threads) {
    Activations activations;
    activations.shape(num_rows, width);
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < num_rows; row++)
            for (int64_t i = 0; i < width; i += GROUP) activations.put(row, i, _mm512_loadu_si512(input + row * width + i));
        product(activations, weights, num_groups, num_rows, [&](int64_t row, int64_t group, __m512 left, __m512 right) {
            _mm512_storeu_si512(output + (row * num_groups + group) * GROUP, both_as_bf16(left, right));
        });
    }
}

}  // extern "C"
