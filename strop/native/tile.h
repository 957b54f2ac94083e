// The inner loop of every large product: a tile of rows times 32 columns, pairs of bf16, float sums in registers.
#pragma once
#include <algorithm>

#include "amx.h"
#include "simd.h"

constexpr int LANES = 16;          // output columns of one vector register
constexpr int GROUP = 2 * LANES;   // output columns that a tile computes: two registers per row
// 28 accumulators, two weights and one activation fill the 32 registers; or four of eight matrix tiles hold the sums.
constexpr int MAX_TILE_ROWS = HAS_AMX ? 32 : 14;

// Pairs that `length` entries take up: to fill whole matrix tiles, the last ones may be zero.
constexpr int64_t num_pairs_of(int64_t length) { return HAS_AMX ? (length + 31) / 32 * 16 : (length + 1) / 2; }

// rows: pair after pair, ROWS words each (amx.h has another order); columns: pair after pair, GROUP words each.
// FETCHES: the columns come from memory, which matrix tiles want to be told.
template <int ROWS, bool FETCHES = false>
inline void product_tile(const uint32_t* rows, const uint32_t* columns, int64_t num_pairs, __m512 (&sums)[ROWS][2]) {
    if constexpr (HAS_AMX) return product_tile_amx<ROWS, FETCHES>(rows, columns, num_pairs, sums);
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < num_pairs; pair++) {
        _mm_prefetch((const char*)columns + 8192, _MM_HINT_T0);
        _mm_prefetch((const char*)columns + 8192 + 64, _MM_HINT_T0);
        const __m512bh left = (__m512bh)_mm512_loadu_si512(columns);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(columns + LANES);
#pragma GCC unroll 14  // or the sums would live in memory
        for (int r = 0; r < ROWS; r++) {
            const __m512bh input = (__m512bh)_mm512_set1_epi32(rows[r]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], input, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], input, right);
        }
        columns += GROUP;
        rows += ROWS;
    }
}

// Sixteen rows of sixteen words, transposed.
inline void transpose16(__m512i (&rows)[16]) {
    __m512i half[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i low = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88), high = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
        half[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
        half[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        half[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
        half[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) rows[i] = half[i];
}

// 16 x 16 words from `source`, of which `rows` rows and `columns` columns exist; the others are zero.
inline void load_block(const uint32_t* source, int64_t stride, int64_t rows, int64_t columns, __m512i (&block)[16]) {
    const __mmask16 mask = columns >= 16 ? 0xffff : __mmask16((1u << columns) - 1);
    for (int i = 0; i < 16; i++) block[i] = i < rows ? _mm512_maskz_loadu_epi32(mask, source + i * stride) : _mm512_setzero_si512();
}

// A panel of 32 columns from rows that hold what is summed over: words p of rows [0, 16) at target + p * GROUP, of the
// sixteen rows that start at `rows + second` behind them. width is even and a row's length.
inline void pack_panel(const bf16* rows, int64_t second, int64_t width, uint32_t* target) {
    const int64_t pairs = width / 2;
    for (int half = 0; half < 2; half++)
        for (int64_t p = 0; p < pairs; p += 16) {
            __m512i block[16];
            load_block(reinterpret_cast<const uint32_t*>(rows + half * second) + p, pairs, 16, pairs - p, block);
            transpose16(block);
            const int64_t end = std::min<int64_t>(16, num_pairs_of(width) - p);
            for (int i = 0; i < end; i++) _mm512_storeu_si512(target + (p + i) * GROUP + half * LANES, block[i]);
        }
}
