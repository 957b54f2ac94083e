// gemm.cpp's three products of a linear layer in training with 8-bit operands: see tile8.h for what is rounded and how.
// Operands arrive and results leave as bf16; what is 8 bits is made while an operand is arranged, and lives as long as
// the product.
#include <algorithm>

#include "simd.h"
#include "tile8.h"
#include "tiling.h"

namespace {

constexpr long TILES_AT_A_TIME = 16;

struct Gemm8 : Pieces {
    const bf16 *a, *b, *bias;
    bf16* c;
    bool a_is_columns, b_is_rows;
    long blocks;
    const ColumnBlock* packed_b = nullptr;  // in place of b: all panels, arranged before
    PanelPlace place;

    Gemm8(const bf16* a, const bf16* b, const bf16* bias, bf16* c, long rows, long columns, long length, bool a_is_columns, bool b_is_rows, int threads)
        : Pieces(rows, columns, length, num_blocks(length) * tile_block_words(1), MAX_TILE_ROWS_8, 2, TILES_AT_A_TIME, threads),
          a(a), b(b), bias(bias), c(c), a_is_columns(a_is_columns), b_is_rows(b_is_rows), blocks(num_blocks(length)) {
        set_panel_words(blocks * sizeof(ColumnBlock) / sizeof(uint32_t), threads);
    }
    const uint32_t* packed_panels() const { return reinterpret_cast<const uint32_t*>(packed_b); }

    long pack_a(long begin, uint32_t* target) const {
        const long count = std::min<long>(tiles_at_a_time, tiling.count - begin);
        const int height = tiling.height;
        for (long block = 0; block < blocks; block++) {
            if (a_is_columns) {
                if constexpr (HAS_AMX) pack_a_columns_amx(begin * height, count, block, target);
                else pack_a_columns(begin * height, count, block, target);
                continue;
            }
            for (long tile = 0; tile < count; tile++) {
                const long row = (begin + tile) * height;
                pack_row_block(a + row * length, length, std::min<long>(height, rows - row), height, block, target + tile * tile_words);
            }
        }
        return count;
    }
    // One block of several tiles side by side: 32 columns at a time, whatever the height of a tile.
    void pack_a_columns(long first, long count, long block, uint32_t* target) const {
        const int height = tiling.height;
        constexpr long GROUPS = (TILES_AT_A_TIME * MAX_TILE_ROWS_8 + GROUP - 1) / GROUP;
        alignas(64) uint32_t strip[GROUPS][QUADS][GROUP];
        alignas(64) float scales[GROUPS][GROUP];
        const long wide = std::min<long>(count * height, rows - first), used = std::min<long>(BLOCK, length - block * BLOCK);
        for (long group = 0; group * GROUP < wide; group++)
            quantise_columns(a + block * BLOCK * rows + first + group * GROUP, rows, used, wide - group * GROUP, strip[group], scales[group]);
        for (long row = 0; row < count * height; row++) {
            const long group = row / GROUP, column = row % GROUP;
            uint32_t* out = target + row / height * tile_words + block * tile_block_words(height) + row % height;
            const bool exists = row < wide;
            for (int quad = 0; quad < QUADS; quad++) out[quad * height] = exists ? strip[group][quad][column] ^ 0x80808080u : 0x80808080u;
            reinterpret_cast<float*>(out)[QUADS * height] = exists ? scales[group][column] : 0.0f;
        }
    }
    // The same where tiles have 16 or 32 rows.
    void pack_a_columns_amx(long first, long count, long block, uint32_t* target) const {
        const int height = tiling.height;
        const long used = std::min<long>(BLOCK, length - block * BLOCK);
        alignas(64) uint32_t strip[QUADS][GROUP];
        alignas(64) float scales[GROUP];
        for (long row = 0; row < count * height; row += GROUP) {
            quantise_columns(a + block * BLOCK * rows + first + row, rows, used, std::max<long>(0, rows - first - row), strip, scales);
            for (long half = 0; half < GROUP && row + half < count * height; half += LANES) {
                __m512i words[LANES];
                for (int quad = 0; quad < QUADS; quad++) words[quad] = _mm512_load_si512(strip[quad] + half);
                transpose16(words);
                const long inside = (row + half) % height;
                uint32_t* tile = target + (row + half) / height * tile_words + block * tile_block_words(height);
                for (int i = 0; i < LANES; i++) _mm512_store_si512(tile + (inside + i) * QUADS, words[i]);
                std::memcpy(tile + QUADS * height + inside, scales + half, LANES * sizeof(float));
            }
        }
    }
    void pack_b(long panel, uint32_t* words) const {
        ColumnBlock* target = reinterpret_cast<ColumnBlock*>(words);
        for (long block = 0; block < blocks; block++) {
            if (b_is_rows) {
                pack_column_block(b + panel * GROUP * length, LANES * length, length, block, target + block);
                continue;
            }
            const long used = std::min<long>(BLOCK, length - block * BLOCK);
            quantise_columns(b + block * BLOCK * columns + panel * GROUP, columns, used, GROUP, target[block].quads, target[block].scales);
            correct(target + block);
        }
    }
    template <int ROWS>
    void multiply_tile(long tile, const uint32_t* packed_tile, long panel, const uint32_t* panel_words) const {
        const ColumnBlock* packed_panel = reinterpret_cast<const ColumnBlock*>(panel_words);
        __m512 sums[ROWS][2];
        const long column = panel * place.stride;
        bf16* target = c + tile * ROWS * columns + column;
        const long used = std::min<long>(ROWS, rows - tile * ROWS);
        for (int r = 0; r < used; r++) __builtin_prefetch(target + r * columns, 1);  // a write waits for the old line too
        product_tile_8<ROWS, 0>(packed_tile, packed_panel, length, nullptr, sums);
        if (bias) {
            const __m512 left = load16(bias + column), right = load16(bias + column + place.second);
            for (int r = 0; r < used; r++) sums[r][0] = _mm512_add_ps(sums[r][0], left), sums[r][1] = _mm512_add_ps(sums[r][1], right);
        }
        for (int r = 0; r < used; r++) place.store(target + r * columns, sums[r][0], sums[r][1]);
    }
};

}  // namespace

// As strop_gemm. length need not be even.
extern "C" void strop_gemm8(const bf16* a, const bf16* b, const bf16* bias, bf16* c, long rows, long columns, long length, int a_is_columns, int b_is_rows, int threads) {
    multiply<MAX_TILE_ROWS_8>(Gemm8(a, b, bias, c, rows, columns, length, a_is_columns != 0, b_is_rows != 0, threads), threads);
}

// As strop_gemm_packed.
extern "C" void strop_gemm_packed8(const bf16* a, const ColumnBlock* packed, const bf16* bias, bf16* c, long rows, long columns, long length, long stride, long second, int threads) {
    Gemm8 gemm(a, nullptr, bias, c, rows, columns, length, false, true, threads);
    gemm.packed_b = packed;
    gemm.place = {stride, second};
    multiply<MAX_TILE_ROWS_8>(gemm, threads);
}
