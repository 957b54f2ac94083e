// What the large products share beside their inner loops: memory for operands that are arranged anew, and how rows are
// cut into tiles.
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
