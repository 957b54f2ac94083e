// What the large products share beside their inner loops: memory for operands that are arranged anew, how rows are cut
// into tiles, and in which order tiles and panels meet.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

#include "simd.h"
#include "tile.h"

// Memory for packed operands that a thread keeps for its next product: fresh pages cost as much as filling them. It is
// mapped, so that it lies in no heap where it would keep what was freed around it from going back.
class Workspace {
  public:
    ~Workspace() { release(); }
    uint32_t* at_least(size_t count) {
        if (count * sizeof(uint32_t) > num_bytes_) {
            release();
            num_bytes_ = count * sizeof(uint32_t);
            block_ = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (block_ == MAP_FAILED) {
                num_bytes_ = 0;
                throw std::bad_alloc();
            }
        }
        return static_cast<uint32_t*>(block_);
    }

  private:
    void release() {
        if (num_bytes_) munmap(block_, num_bytes_);
    }
    void* block_ = nullptr;
    size_t num_bytes_ = 0;
};

// Where the 16 + 16 columns of panel p go: to column p * stride and to `second` behind it. Neighbours, unless the panels
// were packed in another order (`pack` in decode.cpp).
struct PanelPlace {
    long stride = GROUP, second = LANES;
    void store(bf16* target, __m512 left, __m512 right) const {
        if (second == LANES) {
            _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(right, left));
        } else {
            store16(target, left);
            store16(target + second, right);
        }
    }
};

// Rows of a matrix cut into tiles of equal height: the height that leaves the fewest rows empty.
struct Tiling {
    int height = 0, count = 0;
    Tiling(int height, long rows) : height(height), count(int((rows + height - 1) / height)) {}
    // Heights from `highest` down to `fewer` less, or to the rows if they are fewer still.
    Tiling(long rows, int highest, int fewer) {
        long fewest = 0;
        for (int candidate = highest; candidate >= std::min<long>(highest - fewer, rows) && candidate > 0; candidate--) {
            const long tiles = (rows + candidate - 1) / candidate, padded = tiles * candidate;
            if (!height || padded < fewest) height = candidate, count = int(tiles), fewest = padded;
        }
    }
};

// A product C = A B cut into pieces. Operands are first written in the order in which the inner loop reads them: A in tiles
// of a few rows, B in panels of 32 columns. The smaller operand is written out whole, for all threads; of the larger one
// each thread writes some pieces at a time, and uses them up while they are in its cache.
struct Pieces {
    long rows, columns, length;
    Tiling tiling;
    long num_panels, tile_words, panel_words, tiles_at_a_time, panels_at_a_time;

    // highest, fewer: as for Tiling, where there are no matrix tiles. `few` is then tiles_at_a_time.
    Pieces(long rows, long columns, long length, long words_per_row, int highest, int fewer, long few, int threads)
        : rows(rows), columns(columns), length(length), tiling(HAS_AMX ? Tiling(rows <= 16 ? 16 : 32, rows) : Tiling(rows, highest, fewer)),
          num_panels(columns / GROUP), tile_words(words_per_row * tiling.height), panel_words(0),
          tiles_at_a_time(HAS_AMX ? at_a_time(tiling.count, tile_words, threads) : few), panels_at_a_time(1) {}
    void set_panel_words(long words, int threads) {
        panel_words = words;
        if (HAS_AMX) panels_at_a_time = at_a_time(num_panels, words, threads);
    }

  private:
    // As many of `count` pieces as a thread's second cache holds beside what they meet, and for all threads alike.
    static long at_a_time(long count, long words, int threads) {
        constexpr long CACHED_WORDS = 3 << 16;
        const long each = (count + threads - 1) / threads, most = std::max(1L, CACHED_WORDS / words);
        const long times = (each + most - 1) / most;
        return std::max(1L, (each + times - 1) / times);
    }
};

// Gemm is a Pieces with
//   pack_a(first tile, words): up to tiles_at_a_time tiles; returns how many
//   pack_b(panel, words)
//   multiply_tile<ROWS>(tile, its words, panel, its words)
//   packed_panels(): all panels, if they are there already
template <int ROWS, typename Gemm>
void multiply_all(const Gemm& gemm, int threads) {
    static thread_local Workspace of_caller;
    const uint32_t* packed = gemm.packed_panels();
    const bool shares_a = gemm.rows <= gemm.columns;
    const long shared_words = shares_a ? gemm.tiling.count * gemm.tile_words : packed ? 0 : gemm.num_panels * gemm.panel_words;
    uint32_t* shared = of_caller.at_least(shared_words);
#pragma omp parallel num_threads(threads)
    {
        const AmxTiles matrix_tiles;
        static thread_local Workspace own;
        uint32_t* piece = own.at_least(shares_a ? gemm.panels_at_a_time * gemm.panel_words : gemm.tiles_at_a_time * gemm.tile_words);
        if (shares_a) {
#pragma omp for schedule(static)
            for (long tile = 0; tile < gemm.tiling.count; tile += gemm.tiles_at_a_time) gemm.pack_a(tile, shared + tile * gemm.tile_words);
#pragma omp for schedule(static)
            for (long panel = 0; panel < gemm.num_panels; panel += gemm.panels_at_a_time) {
                const long count = std::min(gemm.panels_at_a_time, gemm.num_panels - panel);
                for (long i = 0; i < (packed ? 0 : count); i++) gemm.pack_b(panel + i, piece + i * gemm.panel_words);
                const uint32_t* some = packed ? packed + panel * gemm.panel_words : piece;
                for (long tile = 0; tile < gemm.tiling.count; tile++)
                    for (long i = 0; i < count; i++)
                        gemm.template multiply_tile<ROWS>(tile, shared + tile * gemm.tile_words, panel + i, some + i * gemm.panel_words);
            }
        } else {
            const uint32_t* all = packed ? packed : shared;
#pragma omp for schedule(static)
            for (long panel = 0; panel < (packed ? 0 : gemm.num_panels); panel++) gemm.pack_b(panel, shared + panel * gemm.panel_words);
#pragma omp for schedule(static)
            for (long tile = 0; tile < gemm.tiling.count; tile += gemm.tiles_at_a_time) {
                const long count = gemm.pack_a(tile, piece);
                for (long panel = 0; panel < gemm.num_panels; panel++)
                    for (long i = 0; i < count; i++)
                        gemm.template multiply_tile<ROWS>(tile + i, piece + i * gemm.tile_words, panel, all + panel * gemm.panel_words);
            }
        }
    }
}

template <int HIGHEST, typename Gemm>
void multiply(const Gemm& gemm, int threads) {
    if (gemm.tiling.height == HIGHEST) return multiply_all<HIGHEST>(gemm, threads);
    constexpr int NEXT = HAS_AMX ? HIGHEST - 16 : HIGHEST - 1;
    if constexpr (NEXT > 0) multiply<NEXT>(gemm, threads);
}
