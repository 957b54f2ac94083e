// One decode step of the whole decoder: S sequences, one new token each, bf16 activations, and weights in bf16 or in 8
// bits (tile8.h), the inputs of whose products are then 8 bits too.
//
// What a step needs is small beside what it reads, so everything between two matrix products is done on the way: norms
// and SwiGLU write their result in the order in which the next product reads it. All threads walk through the layers
// together and wait for each other between phases; nothing returns to Python in between. Every sum has the order and
// every rounding the place that they have in the kernels of a training step, so that rollouts and training see the same
// numbers.
//
// Names: S rows (sequences), D width, N query heads, K key-value heads, H head width, I MLP width, T cache positions.
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "tile.h"
#include "tile8.h"

namespace {

// Rows cut into the fewest tiles: some of them tall, the others `less` lower. Matrix tiles: of 32 rows, and a last one of
// 16 if no more are left; rows that are missing are there, but unused.
struct Tiles {
    int64_t num_rows;
    int height, count, num_tall, less;
    Tiles(int64_t rows, int highest) : num_rows(rows), count(int((rows + highest - 1) / highest)), less(HAS_AMX ? 16 : 1) {
        if (HAS_AMX) {
            height = rows <= 16 ? 16 : 32;
            num_tall = count - (rows > 16 && (rows - 1) % 32 < 16);
            return;
        }
        height = int((rows + count - 1) / count);
        num_tall = int(rows - int64_t(count) * (height - 1));
    }
    int64_t padded_rows() const { return first(count - 1) + rows(count - 1); }
    int64_t first(int tile) const { return int64_t(tile) * height - less * std::max(0, tile - num_tall); }
    int rows(int tile) const { return tile < num_tall ? height : height - less; }
    int used(int tile) const { return int(std::min<int64_t>(rows(tile), num_rows - first(tile))); }
    int of(int64_t row) const {
        const int64_t tall = int64_t(num_tall) * height;
        return int(row < tall ? row / height : num_tall + (row - tall) / (height - less));
    }
};

// Zeros at first, from the beginning of a cache line on.
class Words {
  public:
    explicit Words(int64_t count) : room_(count + LANES) {}
    uint32_t* begin() { return (uint32_t*)(((uintptr_t)room_.data() + 63) / 64 * 64); }
    const uint32_t* begin() const { return const_cast<Words*>(this)->begin(); }

  private:
    std::vector<uint32_t> room_;
};

// The inputs of a product in the order in which it reads them: tile by tile; inside a tile, pair after pair of inputs,
// and for each pair the rows side by side; or as amx.h says.
struct Inputs {
    using Weights = bf16;
    Tiles tiles;
    int64_t num_pairs = 0;
    Words pairs;

    Inputs(int64_t rows, int64_t width)
        : tiles(rows, MAX_TILE_ROWS), num_pairs(num_pairs_of(width)), pairs(tiles.padded_rows() * num_pairs) {}
    // COUNT words of two inputs of one row, starting at input `column`.
    template <int COUNT>
    void put(int64_t row, int64_t column, const uint32_t* values) {
        const int tile = tiles.of(row), height = tiles.rows(tile);
        if constexpr (HAS_AMX) {
            uint32_t* target = pairs.begin() + tiles.first(tile) * num_pairs + column / 32 * height * 16 + (row - tiles.first(tile)) * 16;
            std::memcpy(target + column % 32 / 2, values, COUNT * sizeof(uint32_t));
            return;
        }
        uint32_t* target = pairs.begin() + tiles.first(tile) * num_pairs + row - tiles.first(tile) + column / 2 * height;
        for (int i = 0; i < COUNT; i++) target[i * height] = values[i];
    }
    static constexpr bool IS_ARRANGED_BY_ROW = false;
    void arrange(int64_t) {}

    static int64_t panel_size(int64_t width) { return 2 * num_pairs_of(width) * GROUP; }
    // A panel of 32 columns from rows of `weight`: see pack_panel.
    static void pack(const bf16* weight, int64_t second, int64_t width, bf16* panel) { pack_panel(weight, second, width, (uint32_t*)panel); }
    template <int ROWS>
    void multiply(const bf16* panel, int number, __m512 (&sums)[ROWS][2]) const {
        const uint32_t* tile = pairs.begin() + tiles.first(number) * num_pairs;
        if (number == 0) product_tile<ROWS, true>(tile, (const uint32_t*)panel, num_pairs, sums);
        else product_tile<ROWS>(tile, (const uint32_t*)panel, num_pairs, sums);
    }
};

// The same in 8 bits. A row is kept as it comes until its scales can be known.
struct Inputs8 {
    using Weights = ColumnBlock;
    Tiles tiles;
    int64_t width, blocks;
    std::vector<bf16> rows;
    Words words;

    Inputs8(int64_t num_rows, int64_t width)
        : tiles(num_rows, MAX_TILE_ROWS_8), width(width), blocks(num_blocks(width)), rows(num_rows * width),
          words(tiles.padded_rows() * blocks * tile_block_words(1)) {}
    template <int COUNT>
    void put(int64_t row, int64_t column, const uint32_t* values) {
        std::memcpy(rows.data() + row * width + column, values, COUNT * sizeof(uint32_t));
    }
    static constexpr bool IS_ARRANGED_BY_ROW = true;
    // After the last put of a row.
    void arrange(int64_t row) {
        const int tile = tiles.of(row), height = tiles.rows(tile);
        const int64_t place = row - tiles.first(tile);
        uint32_t* target = words.begin() + blocks * tile_block_words(tiles.first(tile));
        if constexpr (HAS_AMX) {
            for (int64_t block = 0; block < blocks; block++, target += tile_block_words(height)) {
                float scale;
                _mm512_store_si512(target + place * QUADS, quantise_block(rows.data() + row * width + block * BLOCK, width - block * BLOCK, &scale));
                std::memcpy(target + QUADS * height + place, &scale, sizeof(scale));
            }
            return;
        }
        target += place;
        for (int64_t block = 0; block < blocks; block++, target += tile_block_words(height)) {
            alignas(64) uint32_t quads[QUADS];
            float scale;
            _mm512_store_si512(quads, as_unsigned(quantise_block(rows.data() + row * width + block * BLOCK, width - block * BLOCK, &scale)));
            for (int quad = 0; quad < QUADS; quad++) target[quad * height] = quads[quad];
            std::memcpy(target + QUADS * height, &scale, sizeof(scale));
        }
    }

    static int64_t panel_size(int64_t width) { return num_blocks(width); }
    static void pack(const bf16* weight, int64_t second, int64_t width, ColumnBlock* panel) {
        for (int64_t block = 0; block < num_blocks(width); block++) pack_column_block(weight, second, width, block, panel + block);
    }
    template <int ROWS>
    void multiply(const ColumnBlock* panel, int number, __m512 (&sums)[ROWS][2]) const {
        const uint32_t* tile = words.begin() + blocks * tile_block_words(tiles.first(number));
        if constexpr (HAS_AMX) {
            if (number == 0) product_tile_8<ROWS, 1>(tile, panel, width, nullptr, sums);
            else product_tile_8<ROWS, 0>(tile, panel, width, nullptr, sums);
            return;
        }
        // With one tile what is needed next comes from memory all the time; with several the first ones ask for the next panel.
        if (tiles.count == 1) return product_tile_8<ROWS, 2>(tile, panel, width, (const char*)panel + 8192, sums);
        const char* next = (const char*)(panel + blocks);
        if (tiles.count == 2 && number == 0) return product_tile_8<ROWS, 2>(tile, panel, width, next, sums);
        if (tiles.count > 2 && number < 3) return product_tile_8<ROWS, 1>(tile, panel, width, next + number * blocks * QUADS * 64, sums);
        product_tile_8<ROWS, 0>(tile, panel, width, nullptr, sums);
    }
};

template <int ROWS, typename In, typename Finish>
inline void product_tile_rows(const In& input, const typename In::Weights* panel, int tile, int64_t group, Finish&& finish) {
    __m512 sums[ROWS][2];
    input.template multiply<ROWS>(panel, tile, sums);
    const int used = input.tiles.used(tile);
    for (int r = 0; r < used; r++) finish(input.tiles.first(tile) + r, group, sums[r][0], sums[r][1]);
}

// This thread's share of inputs * weights^T. `finish(row, group, left, right)` takes 16 + 16 output columns.
template <int ROWS, typename In, typename Finish>
void product_rows(const In& input, const typename In::Weights* weights, int64_t panel_size, int64_t num_groups, Finish&& finish) {
    const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
    for (int64_t group = num_groups * thread / num_threads; group < num_groups * (thread + 1) / num_threads; group++) {
        const auto* panel = weights + group * panel_size;
        for (int tile = 0; tile < input.tiles.num_tall; tile++) product_tile_rows<ROWS>(input, panel, tile, group, finish);
        constexpr int LOW = !HAS_AMX ? ROWS - 1 : ROWS == 32 ? 16 : 0;  // see Tiles
        if constexpr (LOW > 0)
            for (int tile = input.tiles.num_tall; tile < input.tiles.count; tile++) product_tile_rows<LOW>(input, panel, tile, group, finish);
    }
}

template <typename In, typename Finish>
void product(const In& input, const typename In::Weights* weights, int64_t width, int64_t num_groups, Finish&& finish) {
    const int64_t size = In::panel_size(width);
    if constexpr (HAS_AMX) {
        if (input.tiles.height == 16) product_rows<16>(input, weights, size, num_groups, finish);
        else product_rows<32>(input, weights, size, num_groups, finish);
        return;
    } else switch (input.tiles.height) {
#define ROWS_CASE(n)     case n: return product_rows<n>(input, weights, size, num_groups, finish)
        ROWS_CASE(1); ROWS_CASE(2); ROWS_CASE(3); ROWS_CASE(4); ROWS_CASE(5); ROWS_CASE(6); ROWS_CASE(7);
        default: break;
    }
    if constexpr (!HAS_AMX && !In::IS_ARRANGED_BY_ROW) switch (input.tiles.height) {
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
        const __m512 first = load16(head + i), second = load16(head + half + i), c = load16(cos + i), s = load16(sin + i);
        store16(head + i, _mm512_fnmadd_ps(second, s, _mm512_mul_ps(first, c)));
        store16(head + half + i, _mm512_fmadd_ps(first, s, _mm512_mul_ps(second, c)));
    }
}

template <typename In>
inline void put_register(In& output, int64_t row, int64_t column, __m512i words) {
    alignas(64) uint32_t values[LANES];
    _mm512_store_si512(values, words);
    output.template put<LANES>(row, column, values);
}

// What HEADS query heads that share keys and values get from them, each sum in the order of attention.cpp's forward pass:
// the trainer's logprobs are then those of the rollout. queries and scores of a head lie query_stride and score_stride
// behind those of the one before; scores have room for `length` rounded up to a multiple of 16.
template <int HEADS, typename In>
void attend(const bf16* queries, int64_t query_stride, const bf16* keys, const bf16* values, int64_t length, int64_t width, float scale, float* scores, int64_t score_stride, In& output, int64_t row, int64_t column) {
    float tops[HEADS];
    __m512 highest[HEADS];
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; g++) highest[g] = _mm512_set1_ps(-INFINITY);
    for (int64_t t = 0; t < length; t += LANES) {
        __m512 sums[HEADS];
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) sums[g] = _mm512_setzero_ps();
        for (int64_t h = 0; h < width; h += GROUP) {
            __m512i pairs[16];  // of entries, one key per lane
            load_block((const uint32_t*)(keys + t * width + h), width / 2, length - t, 16, pairs);
            transpose16(pairs);
            const uint32_t* query = (const uint32_t*)(queries + h);
#pragma GCC unroll 16
            for (int pair = 0; pair < 16; pair++)
#pragma GCC unroll 4
                for (int g = 0; g < HEADS; g++)
                    sums[g] = _mm512_dpbf16_ps(sums[g], (__m512bh)pairs[pair], (__m512bh)_mm512_set1_epi32(query[g * query_stride / 2 + pair]));
        }
        const __mmask16 exists = length - t >= LANES ? 0xffff : __mmask16((1u << (length - t)) - 1);
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) {
            _mm512_storeu_ps(scores + g * score_stride + t, sums[g]);
            highest[g] = _mm512_mask_max_ps(highest[g], exists, highest[g], sums[g]);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; g++) tops[g] = _mm512_reduce_max_ps(highest[g]);
    for (int64_t t = 0; t < length; t += LANES) {
        const __mmask16 exists = length - t >= LANES ? 0xffff : __mmask16((1u << (length - t)) - 1);
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) {
            float* place = scores + g * score_stride + t;
            const __m512 z = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(place), _mm512_set1_ps(tops[g])), _mm512_set1_ps(scale));
            _mm512_storeu_ps(place, _mm512_maskz_mov_ps(exists, exp16(z)));
        }
    }
    float totals[HEADS] = {};
    for (int64_t t = 0; t < length; t++)
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) totals[g] += scores[g * score_stride + t];
    for (int64_t t = 0; t < length; t += LANES)  // in place, as bf16: two keys to a word
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) store16((bf16*)(scores + g * score_stride) + t, _mm512_loadu_ps(scores + g * score_stride + t));
    const __m512i low_order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high_order = _mm512_add_epi16(low_order, _mm512_set1_epi16(16));
    for (int64_t h = 0; h < width; h += GROUP) {
        __m512 sums[HEADS][2];
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) sums[g][0] = sums[g][1] = _mm512_setzero_ps();
        for (int64_t t = 0; t < length; t += 2) {
            const __m512i first = _mm512_loadu_si512(values + t * width + h);
            const __m512i second = t + 1 < length ? _mm512_loadu_si512(values + (t + 1) * width + h) : _mm512_setzero_si512();
            const __m512bh left = (__m512bh)_mm512_permutex2var_epi16(first, low_order, second);
            const __m512bh right = (__m512bh)_mm512_permutex2var_epi16(first, high_order, second);
#pragma GCC unroll 4
            for (int g = 0; g < HEADS; g++) {
                const __m512bh weights = (__m512bh)_mm512_set1_epi32(((const uint32_t*)(scores + g * score_stride))[t / 2]);
                sums[g][0] = _mm512_dpbf16_ps(sums[g][0], weights, left);
                sums[g][1] = _mm512_dpbf16_ps(sums[g][1], weights, right);
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) {
            const __m512 inverse = _mm512_set1_ps(1.0f / totals[g]);
            put_register(output, row, column + g * width + h, both_as_bf16(_mm512_mul_ps(sums[g][0], inverse), _mm512_mul_ps(sums[g][1], inverse)));
        }
    }
}

// qkv, output, gate_up and down are packed, in bf16 or in 8 bits.
struct Layer {
    const bf16* attention_norm;
    const void* qkv;
    const bf16 *qkv_bias, *q_norm, *k_norm;
    const void* output;
    const bf16 *output_bias, *mlp_norm;
    const void* gate_up;
    const bf16* gate_up_bias;
    const void* down;
    const bf16* down_bias;
    int64_t has_rope;
};

struct Shape {
    int64_t num_layers, D, N, K, H, I;
    float eps, scale;
};

// Where a step leaves what a training step on the same weights would compute again, one row per sequence from each layer's
// pointers on: queries, keys and values as attention reads them, what attention and MLP add to the stream, and (where the
// layer's pointer is not null) gate and up.
struct Record {
    bf16 *const *projections, *const *attended, *const *mlps, *const *gate_ups;
};

// Rows of `weight` (N, K) in the order in which the products read them: group g holds rows [g * stride, + 16) and
// [g * stride + second, + 16).
template <typename In>
void pack(const bf16* weight, typename In::Weights* packed, int64_t num_groups, int64_t width, int64_t stride, int64_t second, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t group = 0; group < num_groups; group++)
        In::pack(weight + group * stride * width, second * width, width, packed + group * In::panel_size(width));
}

// One token for each of num_rows sequences. `stream` (S, D) holds their embeddings and is overwritten; `hidden` (S, D)
// gets the final norm's output. Keys and values of layer l start at keys + l * layer_stride, (slot, K, T, H) with
// T = capacity; position lengths[s] of slot s is written, and [0, lengths[s]] is read. cos and sin are (S, H). `record` may
// be null; its rows are behind first_recorded others.
template <typename In>
void decode_step(const Shape* shape, const Layer* layers, const bf16* final_norm, int64_t num_rows, bf16* stream, bf16* hidden, bf16* keys, bf16* values, int64_t layer_stride, int64_t capacity, const int64_t* lengths, const bf16* cos, const bf16* sin, const Record* record, int64_t first_recorded, int64_t num_threads) {
    const int64_t D = shape->D, N = shape->N, K = shape->K, H = shape->H, I = shape->I, S = num_rows;
    const int64_t heads_per_kv = N / K, qkv_width = (N + 2 * K) * H;
    const int64_t scores_stride = (capacity + LANES) / LANES * LANES + LANES;
    std::vector<bf16> unrecorded(record ? 0 : S * qkv_width);
    std::vector<float> scores(num_threads * heads_per_kv * scores_stride);
    In normed_input(S, D), attended(S, N * H), gated(S, I);
    using Weights = const typename In::Weights*;

    const auto norm_rows = [&](const bf16* weight) {
#pragma omp for schedule(static)
        for (int64_t s = 0; s < S; s++) {
            const bf16* x = stream + s * D;
            const float inverse = inverse_rms(x, D, shape->eps);
            for (int64_t i = 0; i < D; i += GROUP)
                put_register(normed_input, s, i, both_as_bf16(normed(x + i, weight + i, inverse), normed(x + i + LANES, weight + i + LANES, inverse)));
            normed_input.arrange(s);
        }
    };
    // Where a product's inputs were put by several threads.
    const auto arrange_rows = [&](In& input) {
        if constexpr (In::IS_ARRANGED_BY_ROW) {
#pragma omp for schedule(static)
            for (int64_t s = 0; s < S; s++) input.arrange(s);
        }
    };
    const auto add_to_stream = [&](const bf16* bias, bf16* recorded) {
        return [=](int64_t row, int64_t group, __m512 left, __m512 right) {
            const int64_t place = row * D + group * GROUP;
            bf16* x = stream + place;
            left = plus_bias(left, bias, group * GROUP), right = plus_bias(right, bias, group * GROUP + LANES);
            if (recorded) _mm512_storeu_si512(recorded + place, both_as_bf16(left, right));
            store16(x, _mm512_add_ps(load16(x), left));
            store16(x + LANES, _mm512_add_ps(load16(x + LANES), right));
        };
    };

#pragma omp parallel num_threads(num_threads)
    {
        const AmxTiles matrix_tiles;
        for (int64_t l = 0; l < shape->num_layers; l++) {
            const Layer& layer = layers[l];
            bf16* qkv = record ? record->projections[l] + first_recorded * qkv_width : unrecorded.data();
            norm_rows(layer.attention_norm);
            product(normed_input, (Weights)layer.qkv, D, qkv_width / GROUP, [&](int64_t row, int64_t group, __m512 left, __m512 right) {
                bf16* target = qkv + row * qkv_width + group * GROUP;
                store16(target, plus_bias(left, layer.qkv_bias, group * GROUP));
                store16(target + LANES, plus_bias(right, layer.qkv_bias, group * GROUP + LANES));
            });
#pragma omp barrier
#pragma omp for schedule(dynamic, 2)
            for (int64_t item = 0; item < S * K; item++) {
                const int64_t s = item / K, k = item % K, length = lengths[s] + 1;
                bf16* row = qkv + s * qkv_width;
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
                if (item + 1 < S * K) fetch(own_keys + capacity * H, lengths[(item + 1) / K] + 1);
                float* own_scores = scores.data() + omp_get_thread_num() * heads_per_kv * scores_stride;
                for (int64_t g = 0; g < heads_per_kv; g += 4) {
                    // Calls, no choice between pointers: that GCC 12 has compiled wrongly (a cmov after an inc).
                    switch (std::min<int64_t>(4, heads_per_kv - g)) {
#define HEADS_CASE(n) \
        case n: attend<n>(query + g * H, H, own_keys, own_values, length, H, shape->scale, own_scores, scores_stride, attended, s, (k * heads_per_kv + g) * H); break
                        HEADS_CASE(1); HEADS_CASE(2); HEADS_CASE(3); HEADS_CASE(4);
#undef HEADS_CASE
                    }
                }
            }
            arrange_rows(attended);
            product(attended, (Weights)layer.output, N * H, D / GROUP, add_to_stream(layer.output_bias, record ? record->attended[l] + first_recorded * D : nullptr));
#pragma omp barrier
            bf16* gate_up = record && record->gate_ups[l] ? record->gate_ups[l] + first_recorded * 2 * I : nullptr;
            norm_rows(layer.mlp_norm);
            product(normed_input, (Weights)layer.gate_up, D, I / LANES, [&](int64_t row, int64_t group, __m512 gate, __m512 up) {
                gate = plus_bias(gate, layer.gate_up_bias, group * LANES);
                up = plus_bias(up, layer.gate_up_bias ? layer.gate_up_bias + I : nullptr, group * LANES);
                if (gate_up) {
                    bf16* target = gate_up + row * 2 * I + group * LANES;
                    store16(target, gate);
                    store16(target + I, up);
                }
                const __m512 silu = _mm512_mul_ps(gate, sigmoid16(gate));
                alignas(32) uint32_t pairs[LANES / 2];
                _mm256_store_si256((__m256i*)pairs, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(silu, up)));
                gated.template put<LANES / 2>(row, group * LANES, pairs);
            });
#pragma omp barrier
            arrange_rows(gated);
            product(gated, (Weights)layer.down, I, D / GROUP, add_to_stream(layer.down_bias, record ? record->mlps[l] + first_recorded * D : nullptr));
#pragma omp barrier
        }
    }
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t s = 0; s < S; s++) {
        const bf16* x = stream + s * D;
        const float inverse = inverse_rms(x, D, shape->eps);
        for (int64_t i = 0; i < D; i += LANES) store16(hidden + s * D + i, normed(x + i, final_norm + i, inverse));
    }
}

// output (S, num_groups * 32) = input (S, width) * weights^T, for a packed weight such as the LM head.
template <typename In>
void packed_product(const bf16* input, const typename In::Weights* weights, bf16* output, int64_t num_rows, int64_t width, int64_t num_groups, int64_t num_threads) {
    In inputs(num_rows, width);
#pragma omp parallel num_threads(num_threads)
    {
        const AmxTiles matrix_tiles;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < num_rows; row++) {
            for (int64_t i = 0; i < width; i += GROUP) put_register(inputs, row, i, _mm512_loadu_si512(input + row * width + i));
            inputs.arrange(row);
        }
        product(inputs, weights, width, num_groups, [&](int64_t row, int64_t group, __m512 left, __m512 right) {
            _mm512_storeu_si512(output + (row * num_groups + group) * GROUP, both_as_bf16(left, right));
        });
    }
}

}  // namespace

extern "C" {

// Asks the system for large pages behind a block that is not in use yet: a step reads all weights once, in order.
void strop_use_large_pages(void* block, int64_t num_bytes) {
    const uintptr_t page = 1 << 21, begin = ((uintptr_t)block + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)block + num_bytes) / page * page;
    if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
}

#define FOR_WEIGHTS(In, suffix) \
    /* Bytes of a packed weight of num_groups * 32 rows. */ \
    int64_t strop_packed_bytes##suffix(int64_t num_groups, int64_t width) { return num_groups * In::panel_size(width) * sizeof(In::Weights); } \
    void strop_pack##suffix(const bf16* weight, In::Weights* packed, int64_t num_groups, int64_t width, int64_t stride, int64_t second, int64_t num_threads) { \
        pack<In>(weight, packed, num_groups, width, stride, second, num_threads); \
    } \
    void strop_decode_step##suffix(const Shape* shape, const Layer* layers, const bf16* final_norm, int64_t num_rows, bf16* stream, bf16* hidden, bf16* keys, bf16* values, int64_t layer_stride, int64_t capacity, const int64_t* lengths, const bf16* cos, const bf16* sin, const Record* record, int64_t first_recorded, int64_t num_threads) { \
        decode_step<In>(shape, layers, final_norm, num_rows, stream, hidden, keys, values, layer_stride, capacity, lengths, cos, sin, record, first_recorded, num_threads); \
    } \
    void strop_packed_product##suffix(const bf16* input, const In::Weights* weights, bf16* output, int64_t num_rows, int64_t width, int64_t num_groups, int64_t num_threads) { \
        packed_product<In>(input, weights, output, num_rows, width, num_groups, num_threads); \
    }

FOR_WEIGHTS(Inputs, )
FOR_WEIGHTS(Inputs8, 8)

}  // extern "C"
