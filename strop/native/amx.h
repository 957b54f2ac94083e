// The inner loop of tile.h on processors with matrix tiles (Intel's AMX): sixteen times the rate of their dot products.
//
// A tile of rows is stored for it in pieces of 32 entries: piece after piece, the rows of a piece one after the other, 64
// bytes each. Columns are stored as for the other processors: sixteen pairs of them are one matrix tile already. Sums run
// over the pieces in order, whatever the shape, so that all products of the same numbers are equal to the bit.
#pragma once
#include <immintrin.h>

#include <cstdint>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

constexpr bool HAS_AMX = true;

// Whether the system lets this process use the tiles: it has to be asked once.
inline bool may_use_amx() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

struct alignas(64) AmxShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline const AmxShapes AMX_SHAPES;

// A thread's eight tiles, all of 16 rows of 64 bytes, while it lives. Others configure them for themselves.
class AmxTiles {
  public:
    AmxTiles() { _tile_loadconfig(&AMX_SHAPES); }
    ~AmxTiles() { _tile_release(); }
    AmxTiles(const AmxTiles&) = delete;
};

inline void fetch_lines(const void* begin, int count) {
#pragma GCC unroll 36
    for (int line = 0; line < count; line++) _mm_prefetch((const char*)begin + 64 * line, _MM_HINT_T0);
}

// product_tile of tile.h: ROWS is 16 or 32, num_pairs a multiple of 16. FETCHES: the columns come from memory.
template <int ROWS, bool FETCHES>
inline void product_tile_amx(const uint32_t* rows, const uint32_t* columns, int64_t num_pairs, __m512 (&sums)[ROWS][2]) {
    static_assert(ROWS == 16 || ROWS == 32);
    asm volatile("" ::: "memory");  // tile loads do not say what they read
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (ROWS == 32) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t pair = 0; pair < num_pairs; pair += 16) {
        if constexpr (FETCHES) fetch_lines(columns + 2048, 32);
        _tile_loadd(6, columns, 128);
        _tile_loadd(4, rows, 64);
        _tile_loadd(7, columns + 16, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (ROWS == 32) {
            _tile_loadd(5, rows + 256, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        columns += 512;
        rows += 16 * ROWS;
    }
    _tile_stored(0, &sums[0][0], 128);
    _tile_stored(1, &sums[0][1], 128);
    if constexpr (ROWS == 32) {
        _tile_stored(2, &sums[16][0], 128);
        _tile_stored(3, &sums[16][1], 128);
    }
}

// Sums of one block of 64 signed bytes: ROWS rows of 64 bytes, and 32 columns, four entries to a word.
template <int ROWS>
inline void exact_sums_amx(const uint32_t* rows, const void* columns, __m512i (&sums)[ROWS][2]) {
    static_assert(ROWS == 16 || ROWS == 32);
    asm volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(6, columns, 128);
    _tile_loadd(4, rows, 64);
    _tile_loadd(7, (const char*)columns + 64, 128);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if constexpr (ROWS == 32) {
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(5, rows + 256, 64);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, &sums[0][0], 128);
    _tile_stored(1, &sums[0][1], 128);
    if constexpr (ROWS == 32) {
        _tile_stored(2, &sums[16][0], 128);
        _tile_stored(3, &sums[16][1], 128);
    }
}

#else

constexpr bool HAS_AMX = false;
inline bool may_use_amx() { return true; }
struct AmxTiles {
    ~AmxTiles() {}  // so that a variable that is only there to live is no unused one
};
template <int ROWS, bool FETCHES>
inline void product_tile_amx(const uint32_t*, const uint32_t*, int64_t, __m512 (&)[ROWS][2]) {}
template <int ROWS>
inline void exact_sums_amx(const uint32_t*, const void*, __m512i (&)[ROWS][2]) {}
inline void fetch_lines(const void*, int) {}

#endif
