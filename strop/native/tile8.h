// Products in 8 bits: both operands in blocks of 64 along the dimension that is summed over, each block of each row (or
// column) with its own scale, so that its largest entry is 127. Sums within a block are exact integers; a block's sum
// times its two scales joins a float. This is the arithmetic of llama.cpp's Q8_0 with blocks twice as long.
//
// The instruction multiplies unsigned by signed bytes: the rows carry 128 more than they should, and 128 times the sum
// of each column's block is taken off at the start.
#pragma once
#include <algorithm>

#include "simd.h"
#include "tile.h"

constexpr int BLOCK = 64;            // entries that share a scale
constexpr int QUADS = BLOCK / 4;     // words of four entries
// 14 integer and 14 float sums, two weights and one activation; or four matrix tiles of integer sums.
constexpr int MAX_TILE_ROWS_8 = HAS_AMX ? 32 : 7;

// 64 x 32 columns of the second operand.
struct alignas(64) ColumnBlock {
    uint32_t quads[QUADS][GROUP];
    float scales[GROUP];
    int32_t corrections[GROUP];
};

// A tile of ROWS rows of the first operand: per block 16 x ROWS words, then ROWS scales. For matrix tiles the words of a row
// are neighbours, and signed.
constexpr int64_t tile_block_words(int rows) { return (QUADS + 1) * rows; }

inline int64_t num_blocks(int64_t length) { return (length + BLOCK - 1) / BLOCK; }
inline int num_quads(int64_t length, int64_t block) { return int(std::min<int64_t>(QUADS, (length - block * BLOCK + 3) / 4)); }

// The same on matrix tiles; the sums of a block are what they are there, so the results are equal to the bit.
template <int ROWS, bool FETCHES>
inline void product_tile_8_amx(const uint32_t* rows, const ColumnBlock* columns, int64_t length, __m512 (&sums)[ROWS][2]) {
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    const int64_t blocks = num_blocks(length);
    __m512i exact[2][ROWS][2];  // in turn, so that one block is scaled while the next is multiplied
    for (int64_t block = 0; block < blocks; block++, columns++, rows += tile_block_words(ROWS)) {
        if constexpr (FETCHES) fetch_lines(columns + 4, sizeof(ColumnBlock) / 64);
        exact_sums_amx<ROWS>(rows, columns->quads, exact[block % 2]);
        const float* scales = reinterpret_cast<const float*>(rows + QUADS * ROWS);
        const __m512 left = _mm512_load_ps(columns->scales), right = _mm512_load_ps(columns->scales + LANES);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const __m512 scale = _mm512_set1_ps(scales[r]);
            sums[r][0] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(exact[block % 2][r][0]), left), scale, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(exact[block % 2][r][1]), right), scale, sums[r][1]);
        }
    }
}

// LINES cache lines per word of the rows are asked for ahead of their use, from `fetch` on: 0, 1, or 2, which is all that
// this call reads itself.
template <int ROWS, int LINES>
inline void product_tile_8(const uint32_t* rows, const ColumnBlock* columns, int64_t length, const char* fetch, __m512 (&sums)[ROWS][2]) {
    if constexpr (HAS_AMX) return product_tile_8_amx<ROWS, LINES != 0>(rows, columns, length, sums);
#pragma GCC unroll 7
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    const int64_t blocks = num_blocks(length);
    for (int64_t block = 0; block < blocks; block++, columns++, rows += tile_block_words(ROWS)) {
        __m512i exact[ROWS][2];
        const __m512i left_start = _mm512_load_si512(columns->corrections), right_start = _mm512_load_si512(columns->corrections + LANES);
#pragma GCC unroll 7
        for (int r = 0; r < ROWS; r++) exact[r][0] = left_start, exact[r][1] = right_start;
        const uint32_t* row = rows;
        const int quads = num_quads(length, block);
        for (int quad = 0; quad < quads; quad++) {
            for (int line = 0; line < LINES; line++, fetch += 64) _mm_prefetch(fetch, _MM_HINT_T0);
            const __m512i left = _mm512_load_si512(columns->quads[quad]), right = _mm512_load_si512(columns->quads[quad] + LANES);
#pragma GCC unroll 7  // or the sums would live in memory
            for (int r = 0; r < ROWS; r++) {
                const __m512i input = _mm512_set1_epi32(row[r]);
                exact[r][0] = _mm512_dpbusd_epi32(exact[r][0], input, left);
                exact[r][1] = _mm512_dpbusd_epi32(exact[r][1], input, right);
            }
            row += ROWS;
        }
        for (int line = 0; line < (LINES == 2 ? 4 : 0); line++, fetch += 64) _mm_prefetch(fetch, _MM_HINT_T0);
        const float* scales = reinterpret_cast<const float*>(rows + QUADS * ROWS);
        const __m512 left_scale = _mm512_load_ps(columns->scales), right_scale = _mm512_load_ps(columns->scales + LANES);
#pragma GCC unroll 7
        for (int r = 0; r < ROWS; r++) {
            const __m512 scale = _mm512_set1_ps(scales[r]);
            sums[r][0] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(exact[r][0]), left_scale), scale, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(exact[r][1]), right_scale), scale, sums[r][1]);
        }
    }
}

// Magnitudes of bf16 in their order: also of those that are not finite, which are above all others.
inline __m512i magnitudes(__m512i entries) { return _mm512_and_si512(entries, _mm512_set1_epi16(0x7fff)); }

// What a block's entries are multiplied by, from its largest magnitude; its scale goes to `scale`. Where an entry is not
// finite the scale is none either, and so is every result.
inline __m512 inverse_scales(__m512 largest, __m512* scale) {
    const __m512 limit = _mm512_set1_ps(127.0f);
    *scale = _mm512_div_ps(largest, limit);
    // Not where 127 / largest would be infinite: such entries would be zero in any other block.
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(largest, _mm512_set1_ps(1e-30f), _CMP_GE_OQ), limit, largest);
}

inline __m512 even_entries(__m512i both) { return _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)); }
inline __m512 odd_entries(__m512i both) { return _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000))); }

// 64 neighbours, of which `count` exist, as signed bytes; returns their scale.
inline __m512i quantise_block(const bf16* source, int64_t count, float* scale) {
    const __mmask64 exists = count >= BLOCK ? ~__mmask64(0) : (__mmask64(1) << count) - 1;
    const __m512i first = _mm512_maskz_loadu_epi16(__mmask32(exists), source);
    const __m512i second = _mm512_maskz_loadu_epi16(__mmask32(exists >> 32), source + 32);
    const __m512i both = _mm512_max_epu16(magnitudes(first), magnitudes(second));
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const uint16_t largest = ~uint16_t(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)))));
    __m512 scales;
    const __m512 inverse = inverse_scales(_mm512_set1_ps(to_float(largest)), &scales);
    *scale = _mm512_cvtss_f32(scales);
    const auto bytes_of = [&](__m512i entries) {  // of 32 entries, in order
        const __m512i even = _mm512_cvtps_epi32(_mm512_mul_ps(even_entries(entries), inverse));
        const __m512i odd = _mm512_cvtps_epi32(_mm512_mul_ps(odd_entries(entries), inverse));
        return _mm512_cvtepi16_epi8(_mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_slli_epi32(odd, 16)));
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(bytes_of(first)), bytes_of(second), 1);
}

inline __m512i as_unsigned(__m512i bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(char(0x80))); }

// The corrections of a block whose words are in place.
inline void correct(ColumnBlock* block) {
    for (int half = 0; half < 2; half++) {
        __m512i total = _mm512_setzero_si512();
        for (int quad = 0; quad < QUADS; quad++)
            total = _mm512_sub_epi32(total, _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(char(0x80)), _mm512_load_si512(block->quads[quad] + half * LANES)));
        _mm512_store_si512(block->corrections + half * LANES, total);
    }
}

// Block `block` of 32 columns whose entries are rows of `length` neighbours: the first 16 at `rows`, the others `second`
// behind it.
inline void pack_column_block(const bf16* rows, int64_t second, int64_t length, int64_t block, ColumnBlock* target) {
    for (int half = 0; half < 2; half++) {
        __m512i words[LANES];
        for (int i = 0; i < LANES; i++)
            words[i] = quantise_block(rows + half * second + i * length + block * BLOCK, length - block * BLOCK, target->scales + half * LANES + i);
        transpose16(words);
        for (int quad = 0; quad < QUADS; quad++) _mm512_store_si512(target->quads[quad] + half * LANES, words[quad]);
    }
    correct(target);
}

// Block `block` of up to 16 rows of `length` neighbours as a tile of `height`. Missing rows are zero.
inline void pack_row_block(const bf16* source, int64_t length, int64_t rows, int height, int64_t block, uint32_t* tile) {
    if constexpr (HAS_AMX) {
        uint32_t* target = tile + block * tile_block_words(height);
        for (int i = 0; i < height; i++) {
            float scale = 0;
            _mm512_store_si512(target + i * QUADS, i < rows ? quantise_block(source + i * length + block * BLOCK, length - block * BLOCK, &scale) : _mm512_setzero_si512());
            std::memcpy(target + QUADS * height + i, &scale, sizeof(scale));
        }
        return;
    }
    const __mmask16 mask = __mmask16((1u << height) - 1);
    alignas(64) float scales[LANES] = {};
    __m512i words[LANES];
    for (int i = 0; i < LANES; i++)
        words[i] = as_unsigned(i < rows ? quantise_block(source + i * length + block * BLOCK, length - block * BLOCK, scales + i) : _mm512_setzero_si512());
    transpose16(words);
    uint32_t* target = tile + block * tile_block_words(height);
    for (int quad = 0; quad < QUADS; quad++) _mm512_mask_storeu_epi32(target + quad * height, mask, words[quad]);
    _mm512_mask_storeu_ps(reinterpret_cast<float*>(target + QUADS * height), mask, _mm512_load_ps(scales));
}

// One block of 32 columns, of which `columns` exist, summed over the `rows` <= 64 rows of the matrix: words of four signed
// bytes, 16 columns and then 16. Missing rows and columns are zero.
inline void quantise_columns(const bf16* source, int64_t stride, int64_t rows, int64_t columns, uint32_t (*quads)[GROUP], float* scales) {
    // A copy: rows are often a multiple of the cache's size apart, and would push each other out before they are read again.
    alignas(64) bf16 entries[BLOCK][GROUP];
    const __mmask32 exists = columns >= GROUP ? ~__mmask32(0) : (__mmask32(1) << columns) - 1;
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < rows; i++) {
        _mm_prefetch((const char*)(source + (i + BLOCK) * stride), _MM_HINT_T0);
        const __m512i both = _mm512_maskz_loadu_epi16(exists, source + i * stride);
        _mm512_store_si512(entries[i], both);
        largest = _mm512_max_epu16(largest, magnitudes(both));
    }
    for (int64_t i = rows; i < (rows + 3) / 4 * 4; i++) _mm512_store_si512(entries[i], _mm512_setzero_si512());
    __m512 scale_even, scale_odd;
    const __m512 inverse_even = inverse_scales(even_entries(largest), &scale_even);
    const __m512 inverse_odd = inverse_scales(odd_entries(largest), &scale_odd);
    // Even and odd columns are words apart until here; now they become neighbours again.
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_ps(scales, _mm512_permutex2var_ps(scale_even, first, scale_odd));
    _mm512_storeu_ps(scales + LANES, _mm512_permutex2var_ps(scale_even, second, scale_odd));
    const __m512i byte = _mm512_set1_epi32(0xff);
    for (int quad = 0; quad < QUADS; quad++) {
        __m512i even = _mm512_setzero_si512(), odd = even;
        if (4 * quad < rows) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m512i both = _mm512_load_si512(entries[4 * quad + i]);
                const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(even_entries(both), inverse_even));
                const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(odd_entries(both), inverse_odd));
                even = _mm512_or_si512(even, _mm512_slli_epi32(_mm512_and_si512(low, byte), 8 * i));
                odd = _mm512_or_si512(odd, _mm512_slli_epi32(_mm512_and_si512(high, byte), 8 * i));
            }
        }
        _mm512_storeu_si512(quads[quad], _mm512_permutex2var_epi32(even, first, odd));
        _mm512_storeu_si512(quads[quad] + LANES, _mm512_permutex2var_epi32(even, second, odd));
    }
}
