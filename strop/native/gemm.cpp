// The three products of a linear layer in training, bf16 in and out with float sums: y = x w^T, dx = g w, dw = g^T x.
//
// All are one product C[m][n] = sum over pairs p of A[m][p] . B[p][n], where a pair is two neighbours of the dimension
// that is summed over. Operands are first written in the order in which the inner loop reads them: A in tiles of a few
// rows, pair after pair, the rows of a tile side by side (each is broadcast); B in panels of 32 columns, pair after pair.
// That costs a few per cent of the product, and the inner loop then runs at the rate of its dot-product instructions.
#include <algorithm>

#include "simd.h"
#include "tile.h"
#include "tiling.h"

namespace {

// One tile of A whose pairs are neighbours in memory: target[p][r] = pair p of row r. Missing rows are zero.
void pack_tile(const bf16* source, long stride, long rows, int height, long pairs, uint32_t* target) {
    if constexpr (HAS_AMX) {
        for (long p = 0; p < pairs; p += 16)
            for (long r = 0; r < height; r++)
                _mm512_store_si512(target + p * height + r * 16, r < rows ? _mm512_loadu_si512(source + r * stride + 2 * p) : _mm512_setzero_si512());
        return;
    }
    const __mmask16 mask = __mmask16((1u << height) - 1);
    for (long p = 0; p < pairs; p += 16) {
        __m512i block[16];
        load_block(reinterpret_cast<const uint32_t*>(source) + p, stride / 2, rows, pairs - p, block);
        transpose16(block);
        const long end = std::min<long>(16, pairs - p);
        for (int i = 0; i < end; i++) _mm512_mask_storeu_epi32(target + (p + i) * height, mask, block[i]);
    }
}

// 16 columns of up to 32 rows as the rows of one matrix tile. Missing ones are zero.
void pack_columns_amx(const bf16* source, long stride, long columns, long rows, uint32_t* target) {
    const __mmask16 exists = columns >= 16 ? 0xffff : columns > 0 ? __mmask16((1u << columns) - 1) : 0;
    const auto load = [&](long row) {
        return row < rows ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exists, source + row * stride)) : _mm512_setzero_si512();
    };
    __m512i pairs[16];
    for (int p = 0; p < 16; p++) pairs[p] = _mm512_or_si512(load(2 * p), _mm512_slli_epi32(load(2 * p + 1), 16));
    transpose16(pairs);
    for (int c = 0; c < 16; c++) _mm512_store_si512(target + 16 * c, pairs[c]);
}

// The same for a matrix that is summed over its rows: a pair is (source[2p][r], source[2p + 1][r]). Several tiles side by
// side in one go, or every one would read a fraction of a cache line of every row.
void pack_tiles_of_columns(const bf16* source, long stride, long columns, int height, long count, long length, uint32_t* target) {
    const long tile_words = num_pairs_of(length) * height;
    if constexpr (HAS_AMX) {
        for (long i = 0; i < length; i += 32)
            for (long tile = 0; tile < count; tile++)
                for (long left = 0; left < height; left += 16) {
                    const long wide = columns - tile * height - left;
                    uint32_t* rows = target + tile * tile_words + i / 2 * height + left * 16;
                    pack_columns_amx(source + i * stride + tile * height + left, stride, wide, length - i, rows);
                }
        return;
    }
    const __mmask16 mask = __mmask16((1u << height) - 1);
    for (long i = 0; i < length; i += 2) {
        const bf16 *first = source + i * stride, *second = first + stride;
        for (long tile = 0; tile < count; tile++) {
            const __mmask16 exists = __mmask16((1u << std::min<long>(height, columns - tile * height)) - 1);
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exists, first + tile * height));
            const __m512i high = i + 1 < length ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exists, second + tile * height)) : _mm512_setzero_si512();
            _mm512_mask_storeu_epi32(target + tile * tile_words + i / 2 * height, mask, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

// One panel of B from 32 columns, summed over the rows.
void pack_panel_of_columns(const bf16* source, long stride, long length, uint32_t* target) {
    const __m512i low_order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high_order = _mm512_add_epi16(low_order, _mm512_set1_epi16(16));
    for (long i = 0; i < 2 * num_pairs_of(length); i += 2) {
        const __m512i first = i < length ? _mm512_loadu_si512(source + i * stride) : _mm512_setzero_si512();
        const __m512i second = i + 1 < length ? _mm512_loadu_si512(source + (i + 1) * stride) : _mm512_setzero_si512();
        _mm512_store_si512(target + i / 2 * GROUP, _mm512_permutex2var_epi16(first, low_order, second));
        _mm512_store_si512(target + i / 2 * GROUP + LANES, _mm512_permutex2var_epi16(first, high_order, second));
    }
}

struct Gemm : Pieces {
    const bf16 *a, *b, *bias;
    bf16* c;
    bool a_is_columns, b_is_rows;
    long pairs;
    const uint32_t* packed_b = nullptr;  // in place of b: all panels, arranged before
    PanelPlace place;

    Gemm(const bf16* a, const bf16* b, const bf16* bias, bf16* c, long rows, long columns, long length, bool a_is_columns, bool b_is_rows, int threads)
        : Pieces(rows, columns, length, num_pairs_of(length), MAX_TILE_ROWS, 4, 4, threads), a(a), b(b), bias(bias), c(c),
          a_is_columns(a_is_columns), b_is_rows(b_is_rows), pairs(num_pairs_of(length)) {
        set_panel_words(pairs * GROUP, threads);
    }
    const uint32_t* packed_panels() const { return packed_b; }

    // Tiles from `begin` on, at most tiles_at_a_time; returns how many they are.
    long pack_a(long begin, uint32_t* target) const {
        const long count = std::min(tiles_at_a_time, tiling.count - begin), first = begin * tiling.height;
        if (a_is_columns) {
            pack_tiles_of_columns(a + first, rows, rows - first, tiling.height, count, length, target);
            return count;
        }
        for (long tile = 0; tile < count; tile++) {
            const long row = first + tile * tiling.height, used = std::min<long>(tiling.height, rows - row);
            pack_tile(a + row * length, length, used, tiling.height, pairs, target + tile * tile_words);
        }
        return count;
    }
    void pack_b(long panel, uint32_t* target) const {
        if (b_is_rows) pack_panel(b + panel * GROUP * length, LANES * length, length, target);
        else pack_panel_of_columns(b + panel * GROUP, columns, length, target);
    }
    template <int ROWS>
    void multiply_tile(long tile, const uint32_t* packed_tile, long panel, const uint32_t* packed_panel) const {
        __m512 sums[ROWS][2];
        product_tile<ROWS>(packed_tile, packed_panel, pairs, sums);
        const long column = panel * place.stride;
        bf16* target = c + tile * ROWS * columns + column;
        const long used = std::min<long>(ROWS, rows - tile * ROWS);
        if (bias) {
            const __m512 left = load16(bias + column), right = load16(bias + column + place.second);
            for (int r = 0; r < used; r++) sums[r][0] = _mm512_add_ps(sums[r][0], left), sums[r][1] = _mm512_add_ps(sums[r][1], right);
        }
        for (int r = 0; r < used; r++) place.store(target + r * columns, sums[r][0], sums[r][1]);
    }
};

}  // namespace

// Whether this process may use everything that the kernels were compiled with; to be asked before any of them runs.
extern "C" int strop_can_run() { return may_use_amx(); }
extern "C" int strop_has_amx() { return HAS_AMX; }

// C (rows, columns) = A B, contiguous, plus `bias` (columns) where there is one. a_is_columns: A is stored as (length, rows), else (rows, length); b_is_rows: B is
// stored as (columns, length), else (length, columns). columns is a multiple of 32; length is even where an operand has
// it as its last dimension.
extern "C" void strop_gemm(const bf16* a, const bf16* b, const bf16* bias, bf16* c, long rows, long columns, long length, int a_is_columns, int b_is_rows, int threads) {
    multiply<MAX_TILE_ROWS>(Gemm(a, b, bias, c, rows, columns, length, a_is_columns != 0, b_is_rows != 0, threads), threads);
}

// C (rows, columns) = A B^T plus bias, A (rows, length), where B is there as decode.cpp's `pack` arranged it, with this
// stride and second.
extern "C" void strop_gemm_packed(const bf16* a, const uint32_t* packed, const bf16* bias, bf16* c, long rows, long columns, long length, long stride, long second, int threads) {
    Gemm gemm(a, nullptr, bias, c, rows, columns, length, false, true, threads);
    gemm.packed_b = packed;
    gemm.place = {stride, second};
    multiply<MAX_TILE_ROWS>(gemm, threads);
}
