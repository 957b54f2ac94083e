// Causal attention over packed trees, forward and backward, in bf16 with float accumulation.
//
// A row is a run of `length` packed positions: their queries see a trunk (another run, or none) and, causally, the row
// itself. Query heads share key-value heads in groups of g, and the group's queries at one position are g neighbours in a
// list of R = length * g queries. Work goes in blocks of BLOCK queries against all the keys that they may see, transposed
// throughout, keys (or head entries) down and queries across: softmax then runs along vectors without horizontal sums,
// and every product has the form of one small kernel, pairs of bf16 broadcast from A times vectors of pairs from B.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "simd.h"
#include "tile.h"

static const long BLOCK = 64;

static inline __m512i load_pairs(const uint32_t* source) { return _mm512_loadu_si512(source); }

template <int M, int Z>
static inline void tile(float* c, long c_stride, const uint32_t* a, long a_stride, const uint32_t* b, long b_stride, long begin,
                        long end, bool adds) {
    __m512 sums[M][Z];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) sums[m][z] = adds ? _mm512_loadu_ps(c + m * c_stride + z * 16) : _mm512_setzero_ps();
    for (long k = begin; k < end; k++) {
        __m512bh lanes[Z];
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) lanes[z] = (__m512bh)load_pairs(b + k * b_stride + z * 16);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(a[m * a_stride + k]));
#pragma GCC unroll 4
            for (int z = 0; z < Z; z++) sums[m][z] = _mm512_dpbf16_ps(sums[m][z], lanes[z], pair);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) _mm512_storeu_ps(c + m * c_stride + z * 16, sums[m][z]);
}

template <int M>
static void tile_row(float* c, long c_stride, const uint32_t* a, long a_stride, const uint32_t* b, long b_stride, long lanes,
                     long begin, long end, bool adds) {
    long left = 0;
    for (; left + 64 <= lanes; left += 64) tile<M, 4>(c + left, c_stride, a, a_stride, b + left, b_stride, begin, end, adds);
    switch ((lanes - left) / 16) {
        case 1: tile<M, 1>(c + left, c_stride, a, a_stride, b + left, b_stride, begin, end, adds); break;
        case 2: tile<M, 2>(c + left, c_stride, a, a_stride, b + left, b_stride, begin, end, adds); break;
        case 3: tile<M, 3>(c + left, c_stride, a, a_stride, b + left, b_stride, begin, end, adds); break;
    }
}

// C[m][lane] (+)= sum over pairs k in [begin, end) of A[m][k] . B[k][lane]; lanes is a multiple of 16.
static void product(float* c, long c_stride, const uint32_t* a, long a_stride, const uint32_t* b, long b_stride, long rows,
                    long lanes, long begin, long end, bool adds) {
    long m = 0;
    for (; m + 6 <= rows; m += 6)
        tile_row<6>(c + m * c_stride, c_stride, a + m * a_stride, a_stride, b, b_stride, lanes, begin, end, adds);
    c += m * c_stride, a += m * a_stride;
    switch (rows - m) {
        case 1: tile_row<1>(c, c_stride, a, a_stride, b, b_stride, lanes, begin, end, adds); break;
        case 2: tile_row<2>(c, c_stride, a, a_stride, b, b_stride, lanes, begin, end, adds); break;
        case 3: tile_row<3>(c, c_stride, a, a_stride, b, b_stride, lanes, begin, end, adds); break;
        case 4: tile_row<4>(c, c_stride, a, a_stride, b, b_stride, lanes, begin, end, adds); break;
        case 5: tile_row<5>(c, c_stride, a, a_stride, b, b_stride, lanes, begin, end, adds); break;
    }
}

// target[j][i] = source[i][j], 32 bits each; rows and columns are multiples of 16.
static void transpose(const uint32_t* source, long source_stride, uint32_t* target, long target_stride, long rows, long columns) {
    for (long i = 0; i < rows; i += 16)
        for (long j = 0; j < columns; j += 16) {
            __m512i block[16];
            for (int n = 0; n < 16; n++) block[n] = load_pairs(source + (i + n) * source_stride + j);
            transpose16(block);
            for (int n = 0; n < 16; n++) _mm512_storeu_si512(target + (j + n) * target_stride + i, block[n]);
        }
}

// target[i / 2][j] = the pair (source[i][j], source[i + 1][j]); rows even, width a multiple of 16.
static void interleave(const bf16* source, uint32_t* target, long rows, long width) {
    for (long i = 0; i < rows; i += 2)
        for (long j = 0; j < width; j += 16) {
            __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(source + i * width + j)));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(source + (i + 1) * width + j)));
            _mm512_storeu_si512(target + i / 2 * width + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

static inline long round_up(long value, long step) { return (value + step - 1) / step * step; }

// Memory of one task, given out piece by piece, each on a cache line of its own.
class Arena {
  public:
    explicit Arena(size_t bytes) : memory_((char*)std::aligned_alloc(64, round_up(long(bytes), 64))) {
        if (!memory_) throw std::bad_alloc();
    }
    ~Arena() { std::free(memory_); }
    template <class T> T* take(long count) {
        T* result = (T*)(memory_ + used_);
        used_ += round_up(count * long(sizeof(T)), 64);
        return result;
    }

  private:
    char* memory_;
    size_t used_ = 0;
};

struct Row {
    int64_t start, length, trunk_start, trunk_length;
};

// Strided packed tensors: position p, head h, entry i at base[p * stride + h * width + i].
struct Shape {
    long num_heads, num_kv_heads, width, stride;
    long group() const { return num_heads / num_kv_heads; }
};

// A row's keys (or values) of one head, contiguous and padded with zeros to a multiple of 32.
static void gather_keys(const bf16* base, const Row& row, long stride, long head, long width, bf16* target, long padded) {
    const long size = width * sizeof(bf16);
    for (long i = 0; i < row.trunk_length; i++)
        std::memcpy(target + i * width, base + (row.trunk_start + i) * stride + head * width, size);
    for (long i = 0; i < row.length; i++)
        std::memcpy(target + (row.trunk_length + i) * width, base + (row.start + i) * stride + head * width, size);
    const long count = row.trunk_length + row.length;
    std::memset(target + count * width, 0, (padded - count) * size);
}

// Queries [first, first + BLOCK) of a row and key-value head, contiguous, zeros beyond the last.
static void gather_queries(const bf16* base, const Row& row, const Shape& shape, long stride, long kv_head, long first,
                           bf16* target) {
    const long group = shape.group(), count = row.length * group;
    for (long i = 0; i < BLOCK; i++) {
        const long query = first + i;
        if (query >= count) {
            std::memset(target + i * shape.width, 0, (BLOCK - i) * shape.width * sizeof(bf16));
            return;
        }
        const long head = kv_head * group + query % group;
        std::memcpy(target + i * shape.width, base + (row.start + query / group) * stride + head * shape.width,
                    shape.width * sizeof(bf16));
    }
}

// How many keys the queries [first, first + BLOCK) may see together, and which of them each may see.
static long visible(const Row& row, long group, long first) {
    return row.trunk_length + std::min(row.length, (first + BLOCK - 1) / group + 1);
}

static inline __mmask16 sees(const Row& row, long group, long key, long first) {
    const long lowest = (key - row.trunk_length) * group - first;  // the first query at this key's own position
    if (lowest <= 0) return 0xffff;
    return lowest >= 16 ? 0 : __mmask16(0xffffu << lowest);
}

static void forward_task(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const Row& row, const Shape& shape,
                         long kv_head, float scale) {
    const long width = shape.width, group = shape.group(), count = row.length * group;
    const long padded = round_up(row.trunk_length + row.length, 32), half = width / 2;
    Arena arena(padded * width * 8 + padded * BLOCK * 6 + BLOCK * width * 12 + 4096);
    bf16* keys = arena.take<bf16>(padded * width);
    bf16* values = arena.take<bf16>(padded * width);
    uint32_t* value_pairs = arena.take<uint32_t>(padded / 2 * width);
    uint32_t* values_down = arena.take<uint32_t>(padded / 2 * width);  // (width, padded / 2)
    bf16* queries = arena.take<bf16>(BLOCK * width);
    uint32_t* queries_down = arena.take<uint32_t>(half * BLOCK);
    float* scores = arena.take<float>(padded * BLOCK);
    uint32_t* weights = arena.take<uint32_t>(padded / 2 * BLOCK);
    float* result = arena.take<float>(width * BLOCK);
    float* rows_out = arena.take<float>(BLOCK * width);
    gather_keys(k, row, shape.stride, kv_head, width, keys, padded);
    gather_keys(v, row, shape.stride, kv_head, width, values, padded);
    interleave(values, value_pairs, padded, width);
    transpose(value_pairs, width, values_down, padded / 2, padded / 2, width);

    for (long first = 0; first < count; first += BLOCK) {
        const long num_keys = visible(row, group, first), pairs = (num_keys + 1) / 2;
        gather_queries(q, row, shape, shape.stride, kv_head, first, queries);
        transpose((const uint32_t*)queries, half, queries_down, BLOCK, BLOCK, half);
        product(scores, BLOCK, (const uint32_t*)keys, half, queries_down, BLOCK, 2 * pairs, BLOCK, 0, half, false);
        float tops[BLOCK], totals[BLOCK];
        for (long lane = 0; lane < BLOCK; lane += 16) {
            __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
            for (long key = 0; key < num_keys; key++)
                top = _mm512_mask_max_ps(top, sees(row, group, key, first + lane), top, _mm512_load_ps(scores + key * BLOCK + lane));
            __m512 total = _mm512_setzero_ps();
            const __m512 scale16 = _mm512_set1_ps(scale);
            for (long key = 0; key < 2 * pairs; key += 2) {
                __m512 e[2];
                for (int n = 0; n < 2; n++) {
                    const __mmask16 mask = key + n < num_keys ? sees(row, group, key + n, first + lane) : __mmask16(0);
                    __m512 z = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(scores + (key + n) * BLOCK + lane), top), scale16);
                    e[n] = _mm512_maskz_mov_ps(mask, exp16(z));
                    total = _mm512_add_ps(total, e[n]);
                }
                __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(e[0]));
                __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(e[1]));
                _mm512_store_si512(weights + key / 2 * BLOCK + lane, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
            _mm512_storeu_ps(tops + lane, top);
            _mm512_storeu_ps(totals + lane, total);
        }
        product(result, BLOCK, values_down, padded / 2, weights, BLOCK, width, BLOCK, 0, pairs, false);
        transpose((const uint32_t*)result, BLOCK, (uint32_t*)rows_out, width, width, BLOCK);
        for (long i = 0; i < BLOCK && first + i < count; i++) {
            const long position = row.start + (first + i) / group, head = kv_head * group + (first + i) % group;
            const __m512 inverse = _mm512_set1_ps(1.0f / totals[i]);
            for (long j = 0; j < width; j += 16)
                store16(out + (position * shape.num_heads + head) * width + j,
                        _mm512_mul_ps(_mm512_loadu_ps(rows_out + i * width + j), inverse));
            lse[position * shape.num_heads + head] = tops[i] * scale + std::log(totals[i]);
        }
    }
}

struct Gradients {
    bf16 *dq, *dk, *dv;
};

// One segment (its rows in packed order from `start`) and key-value head. Sums of keys that several rows see are kept in
// float until the last row is done.
static void backward_task(const bf16* q, const bf16* k, const bf16* v, const bf16* out, const bf16* grad, const float* lse,
                          const Gradients& gradients, const Row* rows, long num_rows, const Shape& shape, long kv_head,
                          float scale) {
    const long width = shape.width, group = shape.group(), half = width / 2, grad_stride = shape.num_heads * width;
    long start = rows[0].start, end = start, longest = 0;
    for (long r = 0; r < num_rows; r++) {
        start = std::min(start, rows[r].start);
        end = std::max(end, rows[r].start + rows[r].length);
        longest = std::max(longest, rows[r].trunk_length + rows[r].length);
    }
    const long padded_most = round_up(longest, 32);
    Arena arena((end - start) * width * 8 + padded_most * width * (2 + 2 + 2 + 2 + 8) + padded_most * BLOCK * (8 + 4 + 2) +
                BLOCK * width * (4 + 4 + 4 + 8) + 8192);
    float* dk_total = arena.take<float>((end - start) * width);
    float* dv_total = arena.take<float>((end - start) * width);
    std::fill(dk_total, dk_total + (end - start) * width, 0.0f);
    std::fill(dv_total, dv_total + (end - start) * width, 0.0f);
    bf16* keys = arena.take<bf16>(padded_most * width);
    bf16* values = arena.take<bf16>(padded_most * width);
    uint32_t* key_pairs = arena.take<uint32_t>(padded_most / 2 * width);
    uint32_t* keys_down = arena.take<uint32_t>(padded_most / 2 * width);
    float* dk = arena.take<float>(padded_most * width);
    float* dv = arena.take<float>(padded_most * width);
    float* scores = arena.take<float>(padded_most * BLOCK);
    float* dscores = arena.take<float>(padded_most * BLOCK);
    uint32_t* pairs_across = arena.take<uint32_t>(padded_most / 2 * BLOCK);  // d(scores), keys paired
    bf16* queries = arena.take<bf16>(BLOCK * width);
    bf16* grads = arena.take<bf16>(BLOCK * width);
    uint32_t* down = arena.take<uint32_t>(half * BLOCK);
    uint32_t* query_pairs = arena.take<uint32_t>(BLOCK / 2 * width);
    uint32_t* grad_pairs = arena.take<uint32_t>(BLOCK / 2 * width);
    float* result = arena.take<float>(BLOCK * width);
    float* rows_out = arena.take<float>(BLOCK * width);

    for (long r = 0; r < num_rows; r++) {
        const Row& row = rows[r];
        const long num_all = row.trunk_length + row.length, padded = round_up(num_all, 32), count = row.length * group;
        gather_keys(k, row, shape.stride, kv_head, width, keys, padded);
        gather_keys(v, row, shape.stride, kv_head, width, values, padded);
        interleave(keys, key_pairs, padded, width);
        transpose(key_pairs, width, keys_down, padded / 2, padded / 2, width);
        std::fill(dk, dk + padded * width, 0.0f);
        std::fill(dv, dv + padded * width, 0.0f);
        for (long first = 0; first < count; first += BLOCK) {
            const long num_keys = visible(row, group, first), even_keys = round_up(num_keys, 2);
            gather_queries(q, row, shape, shape.stride, kv_head, first, queries);
            gather_queries(grad, row, shape, grad_stride, kv_head, first, grads);
            float lses[BLOCK] = {}, deltas[BLOCK] = {};
            for (long i = 0; i < BLOCK && first + i < count; i++) {
                const long position = row.start + (first + i) / group, head = kv_head * group + (first + i) % group;
                const bf16* o = out + position * grad_stride + head * width;
                __m512 sum = _mm512_setzero_ps();
                for (long j = 0; j < width; j += 16) sum = _mm512_fmadd_ps(load16(o + j), load16(grads + i * width + j), sum);
                deltas[i] = _mm512_reduce_add_ps(sum);
                lses[i] = lse[position * shape.num_heads + head];
            }
            interleave(queries, query_pairs, BLOCK, width);
            interleave(grads, grad_pairs, BLOCK, width);
            transpose((const uint32_t*)queries, half, down, BLOCK, BLOCK, half);
            product(scores, BLOCK, (const uint32_t*)keys, half, down, BLOCK, even_keys, BLOCK, 0, half, false);
            transpose((const uint32_t*)grads, half, down, BLOCK, BLOCK, half);
            product(dscores, BLOCK, (const uint32_t*)values, half, down, BLOCK, even_keys, BLOCK, 0, half, false);

            // scores become the bf16 weights and dscores their bf16 gradients, each in the first half of its row's memory.
            for (long key = 0; key < even_keys; key += 2) {
                __m256i weights[2][BLOCK / 16], slopes[2][BLOCK / 16];
                for (int n = 0; n < 2; n++)
                    for (long lane = 0; lane < BLOCK; lane += 16) {
                        __mmask16 mask = key + n < num_keys ? sees(row, group, key + n, first + lane) : __mmask16(0);
                        const long left = count - first - lane;
                        if (left < 16) mask &= left <= 0 ? __mmask16(0) : __mmask16((1u << left) - 1);
                        const long at = (key + n) * BLOCK + lane;
                        __m512 z = _mm512_fmsub_ps(_mm512_load_ps(scores + at), _mm512_set1_ps(scale), _mm512_loadu_ps(lses + lane));
                        __m512 p = _mm512_maskz_mov_ps(mask, exp16(z));
                        __m512 d = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_load_ps(dscores + at), _mm512_loadu_ps(deltas + lane)));
                        weights[n][lane / 16] = (__m256i)_mm512_cvtneps_pbh(p);
                        slopes[n][lane / 16] = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(d, _mm512_set1_ps(scale)));
                    }
                for (long lane = 0; lane < BLOCK; lane += 16) {
                    for (int n = 0; n < 2; n++) {
                        _mm256_store_si256((__m256i*)((bf16*)(scores + (key + n) * BLOCK) + lane), weights[n][lane / 16]);
                        _mm256_store_si256((__m256i*)((bf16*)(dscores + (key + n) * BLOCK) + lane), slopes[n][lane / 16]);
                    }
                    __m512i low = _mm512_cvtepu16_epi32(slopes[0][lane / 16]), high = _mm512_cvtepu16_epi32(slopes[1][lane / 16]);
                    _mm512_store_si512(pairs_across + key / 2 * BLOCK + lane, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
                }
            }
            product(dv, width, (const uint32_t*)scores, BLOCK, grad_pairs, width, num_keys, width, 0, BLOCK / 2, true);
            product(dk, width, (const uint32_t*)dscores, BLOCK, query_pairs, width, num_keys, width, 0, BLOCK / 2, true);
            product(result, BLOCK, keys_down, padded / 2, pairs_across, BLOCK, width, BLOCK, 0, even_keys / 2, false);
            transpose((const uint32_t*)result, BLOCK, (uint32_t*)rows_out, width, width, BLOCK);
            for (long i = 0; i < BLOCK && first + i < count; i++) {
                const long position = row.start + (first + i) / group, head = kv_head * group + (first + i) % group;
                for (long j = 0; j < width; j += 16)
                    store16(gradients.dq + position * shape.stride + head * width + j, _mm512_loadu_ps(rows_out + i * width + j));
            }
        }
        for (long key = 0; key < num_all; key++) {
            const long position = key < row.trunk_length ? row.trunk_start + key : row.start + key - row.trunk_length;
            float *dk_at = dk_total + (position - start) * width, *dv_at = dv_total + (position - start) * width;
            for (long j = 0; j < width; j += 16) {
                _mm512_store_ps(dk_at + j, _mm512_add_ps(_mm512_load_ps(dk_at + j), _mm512_load_ps(dk + key * width + j)));
                _mm512_store_ps(dv_at + j, _mm512_add_ps(_mm512_load_ps(dv_at + j), _mm512_load_ps(dv + key * width + j)));
            }
        }
    }
    for (long position = start; position < end; position++)
        for (long j = 0; j < width; j += 16) {
            const long at = position * shape.stride + kv_head * width + j;
            store16(gradients.dk + at, _mm512_load_ps(dk_total + (position - start) * width + j));
            store16(gradients.dv + at, _mm512_load_ps(dv_total + (position - start) * width + j));
        }
}

// q, k, v (and the gradients) share one stride between positions; out and grad are contiguous (T, num_heads, width), lse is
// (T, num_heads). width is a multiple of 32. Rows cover every position once.
extern "C" void strop_attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const int64_t* rows,
                                long num_rows, long num_heads, long num_kv_heads, long width, long stride, float scale,
                                int threads) {
    const Shape shape = {num_heads, num_kv_heads, width, stride};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long task = 0; task < num_rows * num_kv_heads; task++)
        forward_task(q, k, v, out, lse, ((const Row*)rows)[task / num_kv_heads], shape, task % num_kv_heads, scale);
}

// segments[i] is the index of segment i's first row; there are num_segments + 1 of them. A trunk is a row of its segment.
extern "C" void strop_attention_backward(const bf16* q, const bf16* k, const bf16* v, const bf16* out, const bf16* grad,
                                         const float* lse, bf16* dq, bf16* dk, bf16* dv, const int64_t* rows,
                                         const int64_t* segments, long num_segments, long num_heads, long num_kv_heads,
                                         long width, long stride, float scale, int threads) {
    const Shape shape = {num_heads, num_kv_heads, width, stride};
    const Gradients gradients = {dq, dk, dv};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long task = 0; task < num_segments * num_kv_heads; task++) {
        const long segment = task / num_kv_heads, begin = segments[segment], count = segments[segment + 1] - begin;
        backward_task(q, k, v, out, grad, lse, gradients, (const Row*)rows + begin, count, shape, task % num_kv_heads, scale);
    }
}
