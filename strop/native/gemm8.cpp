// gemm.cpp's three products of a linear layer in training with 8-bit operands: see tile8.h for what is rounded and how.
// Operands arrive and results leave as bf16; what is 8 bits is made while an operand is arranged, and lives as long as
// the product.
#include <algorithm>

#include "simd.h"
#include "tile8.h"
#include "tiling.h"

namespace {

constexpr long TILES_PER_BATCH = 16;

struct Gemm8 {
    const bf16 *a, *b, *bias;
    bf16* c;
    long rows, columns, length;
    bool a_is_columns, b_is_rows;
    Tiling tiling;
    long blocks, num_panels;
    const ColumnBlock* packed_b = nullptr;  // in place of b: all panels, arranged before
    PanelPlace place;

    long tile_words() const { return blocks * tile_block_words(tiling.height); }
    long num_batches() const { return (tiling.count + TILES_PER_BATCH - 1) / TILES_PER_BATCH; }

    long pack_a(long batch, uint32_t* target) const {
        const long begin = batch * TILES_PER_BATCH, count = std::min<long>(TILES_PER_BATCH, tiling.count - begin);
        const int height = tiling.height;
        for (long block = 0; block < blocks; block++) {
            if (a_is_columns) {
                pack_a_columns(begin * height, count, block, target);
                continue;
            }
            for (long tile = 0; tile < count; tile++) {
                const long row = (begin + tile) * height;
                pack_row_block(a + row * length, length, std::min<long>(height, rows - row), height, block, target + tile * tile_words());
            }
        }
        return count;
    }
    // One block of several tiles side by side: 32 columns at a time, whatever the height of a tile.
    void pack_a_columns(long first, long count, long block, uint32_t* target) const {
        const int height = tiling.height;
        constexpr long GROUPS = (TILES_PER_BATCH * MAX_TILE_ROWS_8 + GROUP - 1) / GROUP;
        alignas(64) uint32_t strip[GROUPS][QUADS][GROUP];
        alignas(64) float scales[GROUPS][GROUP];
        const long wide = std::min<long>(count * height, rows - first), used = std::min<long>(BLOCK, length - block * BLOCK);
        for (long group = 0; group * GROUP < wide; group++)
            quantise_columns(a + block * BLOCK * rows + first + group * GROUP, rows, used, wide - group * GROUP, strip[group], scales[group]);
        for (long row = 0; row < count * height; row++) {
            const long group = row / GROUP, column = row % GROUP;
            uint32_t* out = target + row / height * tile_words() + block * tile_block_words(height) + row % height;
            const bool exists = row < wide;
            for (int quad = 0; quad < QUADS; quad++) out[quad * height] = exists ? strip[group][quad][column] ^ 0x80808080u : 0x80808080u;
            reinterpret_cast<float*>(out)[QUADS * height] = exists ? scales[group][column] : 0.0f;
        }
    }
    void pack_b(long panel, ColumnBlock* target) const {
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
    const ColumnBlock* panel_at(long panel, ColumnBlock* room) const {
        if (packed_b) return packed_b + panel * blocks;
        pack_b(panel, room);
        return room;
    }
    template <int ROWS>
    void multiply_tile(long tile, const uint32_t* packed_tile, long panel, const ColumnBlock* packed_panel) const {
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
    template <int ROWS>
    void run(int threads) const {
        static thread_local Workspace of_caller;
        const bool shares_a = rows <= columns;
        const size_t panel_words = blocks * sizeof(ColumnBlock) / sizeof(uint32_t);
        uint32_t* shared = of_caller.at_least(shares_a ? tiling.count * tile_words() : packed_b ? 0 : num_panels * panel_words);
#pragma omp parallel num_threads(threads)
        {
            static thread_local Workspace own;
            uint32_t* piece = own.at_least(shares_a ? panel_words : TILES_PER_BATCH * tile_words());
            const auto panels = [](uint32_t* words) { return reinterpret_cast<ColumnBlock*>(words); };
            if (shares_a) {
#pragma omp for schedule(static)
                for (long batch = 0; batch < num_batches(); batch++) pack_a(batch, shared + batch * TILES_PER_BATCH * tile_words());
#pragma omp for schedule(static)
                for (long panel = 0; panel < num_panels; panel++) {
                    const ColumnBlock* columns_of = panel_at(panel, panels(piece));
                    for (long tile = 0; tile < tiling.count; tile++) multiply_tile<ROWS>(tile, shared + tile * tile_words(), panel, columns_of);
                }
            } else {
                const ColumnBlock* all = packed_b ? packed_b : panels(shared);
#pragma omp for schedule(static)
                for (long panel = 0; panel < (packed_b ? 0 : num_panels); panel++) pack_b(panel, panels(shared + panel * panel_words));
#pragma omp for schedule(static)
                for (long batch = 0; batch < num_batches(); batch++) {
                    const long count = pack_a(batch, piece);
                    for (long panel = 0; panel < num_panels; panel++)
                        for (long i = 0; i < count; i++)
                            multiply_tile<ROWS>(batch * TILES_PER_BATCH + i, piece + i * tile_words(), panel, all + panel * blocks);
                }
            }
        }
    }
};

void run(const Gemm8& gemm, int threads) {
    switch (gemm.tiling.height) {
#define ROWS_CASE(n) \
    case n: return gemm.run<n>(threads)
        ROWS_CASE(1); ROWS_CASE(2); ROWS_CASE(3); ROWS_CASE(4); ROWS_CASE(5); ROWS_CASE(6); ROWS_CASE(7);
#undef ROWS_CASE
    }
}

}  // namespace

// As strop_gemm. length need not be even.
extern "C" void strop_gemm8(const bf16* a, const bf16* b, const bf16* bias, bf16* c, long rows, long columns, long length, int a_is_columns, int b_is_rows, int threads) {
    const Tiling tiling(rows, MAX_TILE_ROWS_8, 2);
    run(Gemm8{a, b, bias, c, rows, columns, length, a_is_columns != 0, b_is_rows != 0, tiling, num_blocks(length), columns / GROUP}, threads);
}

// As strop_gemm_packed.
extern "C" void strop_gemm_packed8(const bf16* a, const ColumnBlock* packed, const bf16* bias, bf16* c, long rows, long columns, long length, long stride, long second, int threads) {
    const Tiling tiling(rows, MAX_TILE_ROWS_8, 2);
    run(Gemm8{a, nullptr, bias, c, rows, columns, length, false, true, tiling, num_blocks(length), columns / GROUP, packed, {stride, second}}, threads);
}
