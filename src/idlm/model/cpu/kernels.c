/* CPU kernels of the decode hot path: linear layers, attention and the small operators between.
 *
 * idlm_stack runs all layers of a decoder, idlm_greedy_chain a sampler head; the others are parts.
 *
 * Every kernel is row-invariant: a row's result is bitwise the same whatever else is in the call,
 * because the order in which one output of one row is summed up is fixed: blocking over rows, outputs
 * and threads only chooses what is computed together.
 *
 * bf16 data is widened to fp32 in registers (a bf16 is the upper half of an fp32), so a CPU without
 * bf16 arithmetic streams half the bytes and still multiplies at fp32 speed.
 *
 * Threads: the pool is the OpenMP pool that torch already runs, entered through a pointer to
 * GOMP_parallel given to idlm_init; a second pool would spin against the first.
 */
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

/* ---- vectors -------------------------------------------------------------------------------- */

#if defined(__AVX512F__)
#define VL 16
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define MASKED
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#define VL 8
#else
#define VL 4
#endif
#define GROUP (2 * VL) /* elements that load_part takes in two parts */
/* Register blocks: as many accumulators as fit beside their operands. Products take TILE rows by
 * PANEL outputs, or FEW rows by VL, lanes being outputs; weighted sums take RB rows by VB vectors. */
#define OB 4 /* outputs of a dot product */
#define VB 4 /* vectors of values that are mixed together */
#if VL == 16
#define RB 6
#define TILE 9
#define FEW 16
#define PANEL_VECTORS 3
#elif defined(__aarch64__)
#define RB 5
#define TILE 8
#define FEW 16
#define PANEL_VECTORS 3
#elif VL == 8
#define RB 2
#define TILE 6
#define FEW 6
#define PANEL_VECTORS 2
#else
#define RB 2
#define TILE 4
#define FEW 4
#define PANEL_VECTORS 2
#endif
#define PANEL (PANEL_VECTORS * VL)

typedef float vf __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef float v4f __attribute__((vector_size(16)));

INLINE vf vfma(vf a, vf b, vf c) {
#if VL == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VL == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* The sums of the lanes of four vectors; all four by the same tree. */
INLINE v4f reduce4(vf a, vf b, vf c, vf d) {
#if VL == 16
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b),
                              _mm512_unpackhi_ps((__m512)a, (__m512)b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d),
                              _mm512_unpackhi_ps((__m512)c, (__m512)d));
    __m512d abd = _mm512_castps_pd(ab), cdd = _mm512_castps_pd(cd);
    __m512 s = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(abd, cdd)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(abd, cdd)));
    __m256 lo = _mm512_castps512_ps256(s);
    __m256 hi = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s), 1));
    __m256 t = _mm256_add_ps(lo, hi);
    return (v4f)_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
#elif VL == 8
    __m256 t = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b),
                              _mm256_hadd_ps((__m256)c, (__m256)d));
    return (v4f)_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (v4f)vpaddq_f32(vpaddq_f32((float32x4_t)a, (float32x4_t)b),
                           vpaddq_f32((float32x4_t)c, (float32x4_t)d));
#else
    return (v4f){(a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3]),
                 (c[0] + c[1]) + (c[2] + c[3]), (d[0] + d[1]) + (d[2] + d[3])};
#endif
}

INLINE vf vload(const void *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf splat(float x) {
#if VL == 16
    return (vf)_mm512_set1_ps(x);
#elif VL == 8
    return (vf)_mm256_set1_ps(x);
#else
    return (vf){x, x, x, x};
#endif
}

/* Half `part` (0, 1) of a group of 2 * VL elements at p as fp32. Of bf16 data these are the even
 * and the odd elements (one shift, one mask), so the other operand is stored in that order too. */
INLINE vf load_part(const char *p, bool half, int part) {
    if (!half) return vload(p + part * sizeof(vf));
    vu raw;
    memcpy(&raw, p, sizeof raw);
    return part ? (vf)(raw & 0xffff0000u) : (vf)(raw << 16);
}

/* e^x for x <= 0, within 2 ulp; 0 below the smallest normal result. */
INLINE vf vexp(vf x) {
    const vf magic = (vf){0} + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    const vf shifted = vfma(x, (vf){0} + 1.44269504f, magic);
    const vf n = shifted - magic;
    vf r = vfma(n, (vf){0} - 0.693145752f, x);
    r = vfma(n, (vf){0} - 1.42860677e-6f, r);
    vf p = (vf){0} + 1.0f / 5040;
    p = vfma(p, r, (vf){0} + 1.0f / 720);
    p = vfma(p, r, (vf){0} + 1.0f / 120);
    p = vfma(p, r, (vf){0} + 1.0f / 24);
    p = vfma(p, r, (vf){0} + 1.0f / 6);
    p = vfma(p, r, (vf){0} + 0.5f);
    p = vfma(p, r, (vf){0} + 1.0f);
    p = vfma(p, r, (vf){0} + 1.0f);
    const vu result = (vu)p + ((vu)shifted << 23); /* times 2^n */
    return (vf)(result & ~(vu)(x < -87.0f));
}

/* n <= VL elements at p as fp32 in order, zero-padded. */
INLINE vf load_vector(const char *p, bool half, int64_t n) {
#ifdef MASKED
    if (n < VL) {
        const __mmask16 first = (__mmask16)((1u << n) - 1);
        if (!half) return (vf)_mm512_maskz_loadu_ps(first, p);
        return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, p)), 16);
    }
#endif
    if (half) {
        vh h = {0};
        if (n >= VL)
            memcpy(&h, p, sizeof h);
        else
            memcpy(&h, p, n * 2);
        return (vf)(__builtin_convertvector(h, vu) << 16);
    }
    if (n >= VL) return vload(p);
    vf v = {0};
    memcpy(&v, p, n * 4);
    return v;
}

/* The bits of bf16 numbers, by rounding to nearest even (NaN stays NaN). */
INLINE vu round_bf16(vf v) {
    const vu u = (vu)v, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, nan = (vu)(v != v);
    return (rounded & ~nan) | (0x7fc0u & nan);
}

/* Store the first n <= VL lanes in order. */
INLINE void store_vector(char *p, bool half, int64_t n, vf v) {
#ifdef MASKED
    if (n < VL) {
        const __mmask16 first = (__mmask16)((1u << n) - 1);
        if (half)
            _mm256_mask_storeu_epi16(p, first, _mm512_cvtepi32_epi16((__m512i)round_bf16(v)));
        else
            _mm512_mask_storeu_ps(p, first, (__m512)v);
        return;
    }
#endif
    if (half) {
        const vh h = __builtin_convertvector(round_bf16(v), vh);
        memcpy(p, &h, n >= VL ? sizeof h : (size_t)n * 2);
    } else {
        memcpy(p, &v, n >= VL ? sizeof v : (size_t)n * 4);
    }
}

/* The inverse of load_part: store both parts of a group. */
INLINE void store_group(char *p, bool half, vf part0, vf part1) {
    if (half) {
        const vu u = round_bf16(part0) | round_bf16(part1) << 16;
        memcpy(p, &u, sizeof u);
    } else {
        memcpy(p, &part0, sizeof part0);
        memcpy(p + sizeof part0, &part1, sizeof part1);
    }
}

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ---- threads -------------------------------------------------------------------------------- */

typedef void (*gomp_parallel_fn)(void (*fn)(void *), void *data, unsigned threads, unsigned flags);
static gomp_parallel_fn gomp_parallel;

EXPORT void idlm_init(gomp_parallel_fn parallel) { gomp_parallel = parallel; }

typedef struct {
    void (*task)(const void *args, int64_t index);
    const void *args;
    int64_t count;
    _Atomic int64_t next;
} Job;

static void run_tasks(void *data) {
    Job *job = data;
    for (;;) {
        int64_t i = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (i >= job->count) return;
        job->task(job->args, i);
    }
}

/* Waking a thread costs a few microseconds: each must have this many vector operations to do. */
#define GRAIN 8192

INLINE int64_t useful_threads(int64_t threads, int64_t vector_operations) {
    return min64(threads, 1 + vector_operations / GRAIN);
}

static void parallel_for(void (*task)(const void *, int64_t), const void *args, int64_t count,
                         int64_t threads) {
    Job job = {task, args, count, 0};
    threads = min64(threads, count);
    if (threads <= 1 || !gomp_parallel)
        run_tasks(&job);
    else
        gomp_parallel(run_tasks, &job, (unsigned)threads, 0);
}

/* A buffer of the calling thread, 64-byte aligned, kept between calls. Out of memory is fatal: a
 * few hundred kilobytes are asked for, and there is nobody in the pool to report to. */
static void *scratch(size_t bytes) {
    static _Thread_local void *buffer;
    static _Thread_local size_t size;
    if (size < bytes) {
        free(buffer);
        size = (bytes + 0xffff) & ~(size_t)0xffff;
        buffer = aligned_alloc(64, size);
        if (!buffer) abort();
    }
    return buffer;
}

/* ---- dot products --------------------------------------------------------------------------- */

/* Room for n elements in whole groups. */
INLINE int64_t padded(int64_t n) { return ceil_div(n, GROUP) * GROUP; }

/* Widen n elements to fp32, group by group in the order of load_part, zero-padded. */
INLINE void pack_row(float *row, const char *src, bool half, int64_t n) {
    const int64_t size = half ? 2 : 4;
    for (int64_t g = 0; g < n; g += GROUP) {
        char tail[GROUP * 4];
        const char *p = src + g * size;
        if (n - g < GROUP) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, p, (n - g) * size);
            p = tail;
        }
        for (int part = 0; part < 2; part++) {
            const vf v = load_part(p, half, part);
            memcpy(row + g + part * VL, &v, sizeof v);
        }
    }
}

/* The dot products of a packed row with OB weight rows of n elements. */
INLINE v4f dot(const float *x, const char *w, int64_t w_stride, int64_t n, bool half) {
    const int64_t size = half ? 2 : 4;
    vf acc[OB] = {{0}};
    for (int64_t i = 0; i < n; i += GROUP) {
        const char *p = w + i * size;
        int64_t stride = w_stride;
        char tail[OB][GROUP * 4];
        if (n - i < GROUP) {
            memset(tail, 0, sizeof tail);
            for (int o = 0; o < OB; o++) memcpy(tail[o], p + o * w_stride, (n - i) * size);
            p = tail[0], stride = sizeof tail[0];
        }
        for (int part = 0; part < 2; part++) {
            const vf xv = vload(x + i + part * VL);
            for (int o = 0; o < OB; o++)
                acc[o] = vfma(xv, load_part(p + o * stride, half, part), acc[o]);
        }
    }
    return reduce4(acc[0], acc[1], acc[2], acc[3]);
}

/* ---- weighted sums of rows ------------------------------------------------------------------- */

/* Rows of equal length: row i lies in block table[i / tokens] at i % tokens; without a table all of
 * them lie in one block. Strides in bytes. */
typedef struct {
    const char *base;
    const int32_t *table;
    int64_t block_stride, row_stride;
    uint32_t tokens; /* divisions by 64 bits would take as long as what is done with a block */
} Rows;

INLINE const char *row_at(const Rows *v, int64_t i) {
    if (!v->table) return v->base + i * v->row_stride;
    const uint32_t block = (uint32_t)i / v->tokens, at = (uint32_t)i % v->tokens;
    return v->base + v->table[block] * v->block_stride + at * v->row_stride;
}

/* Where the block ends that row i lies in, but no more than `end`. */
INLINE int64_t block_end(const Rows *v, int64_t i, int64_t end) {
    return v->table ? min64(end, i + v->tokens - (uint32_t)i % v->tokens) : end;
}

/* Call CALL(n) with n = rows as a compile-time constant, 1 <= rows <= most <= 16. */
#define DISPATCH_UP_TO(most, rows, CALL)          \
    switch (rows) {                               \
        case 1: CALL(1); break;                   \
        case 2: if (most >= 2) CALL(2); break;    \
        case 3: if (most >= 3) CALL(3); break;    \
        case 4: if (most >= 4) CALL(4); break;    \
        case 5: if (most >= 5) CALL(5); break;    \
        case 6: if (most >= 6) CALL(6); break;    \
        case 7: if (most >= 7) CALL(7); break;    \
        case 8: if (most >= 8) CALL(8); break;    \
        case 9: if (most >= 9) CALL(9); break;    \
        case 10: if (most >= 10) CALL(10); break; \
        case 11: if (most >= 11) CALL(11); break; \
        case 12: if (most >= 12) CALL(12); break; \
        case 13: if (most >= 13) CALL(13); break; \
        case 14: if (most >= 14) CALL(14); break; \
        case 15: if (most >= 15) CALL(15); break; \
        case 16: if (most >= 16) CALL(16); break; \
    }

/* o[r, 0 : count * VL] += sum_j p[r][j - first] * v[j, from byte `at`], first <= j < end, in the
 * order of j. With count == VB whole groups in the order of load_part, with count == 1 the first
 * n <= VL elements in their own order. */
INLINE void mix_block(const int rows, const int count, bool half, float *o, int64_t o_stride,
                      const float *const *p, const Rows *v, int64_t first, int64_t end, int64_t at,
                      int64_t n) {
    vf acc[RB][VB];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) acc[r][i] = vload(o + r * o_stride + i * VL);
    for (int64_t j = first, stop; j < end; j = stop) {
        stop = block_end(v, j, end);
        const char *vj = row_at(v, j) + at;
        for (int64_t w = j - first; w < stop - first; w++, vj += v->row_stride) {
            vf vv[VB];
#pragma GCC unroll 8
            for (int i = 0; i < count; i++)
                vv[i] = count == 1 ? load_vector(vj, half, n)
                                   : load_part(vj + i / 2 * GROUP * (half ? 2 : 4), half, i % 2);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                const vf weight = splat(p[r][w]);
#pragma GCC unroll 8
                for (int i = 0; i < count; i++) acc[r][i] = vfma(weight, vv[i], acc[r][i]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            memcpy(o + r * o_stride + i * VL, &acc[r][i], sizeof(vf));
}

INLINE void mix_vector(int rows, bool half, float *o, int64_t o_stride, const float *const *p,
                       const Rows *v, int64_t first, int64_t end, int64_t at, int64_t n) {
#define MIX_VECTOR(R) mix_block(R, 1, half, o, o_stride, p, v, first, end, at, n)
    DISPATCH_UP_TO(RB, rows, MIX_VECTOR)
}

/* ---- linear --------------------------------------------------------------------------------- */

typedef struct Linear {
    const char *x, *w, *bias;
    char *y;
    /* Row r is row r % inner of batch r / inner; strides in elements. */
    int64_t rows, inner, x_batch, x_row, y_batch, y_row;
    int64_t in, out, row_block, out_block, out_tasks;
    bool accumulate, wide; /* wide: y is fp32 whatever x is */
    /* Low-rank update of the last `masks` of each `inner` rows: output o, which is of the first part
     * with o < part_end[part], gets z[row, part, :] @ up[o, :]. */
    const float *z;
    const char *up;
    int64_t masks, rank, z_row;
    const int64_t *part_end;
    /* The product that makes z: its tasks come first, and nobody reads z before all are done. */
    const struct Linear *down;
    int64_t down_tasks;
    _Atomic int64_t *down_done;
} Linear;

/* Inputs that are multiplied at a time: the weights of a panel's slice stay in the L1 cache. An
 * output is the sum of its slices' sums, each in the order of the inputs. */
#define SLICE 192
#define STORES_AHEAD 8 /* rows of results that are fetched before they are written */
#define UNIT 4         /* 32-bit elements of a 128-bit block */

/* Block b of the result: 16 bytes of row UNIT * b; rows are `stride` bytes apart. */
INLINE vf load_blocks(const char *row, int64_t stride) {
    (void)stride; /* where a vector is one block */
#if VL == 16
    const char *row8 = row + 8 * stride;
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps((const float *)row));
    v = _mm512_insertf32x4(v, _mm_loadu_ps((const float *)(row + 4 * stride)), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps((const float *)row8), 2);
    return (vf)_mm512_insertf32x4(v, _mm_loadu_ps((const float *)(row8 + 4 * stride)), 3);
#elif VL == 8
    const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps((const float *)row));
    return (vf)_mm256_insertf128_ps(v, _mm_loadu_ps((const float *)(row + 4 * stride)), 1);
#else
    return vload(row);
#endif
}

/* Transpose each 128-bit block of four vectors as a matrix of 4 x 4. */
INLINE void transpose_blocks(vf t[UNIT]) {
#if VL == 16
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps((__m512)t[0], (__m512)t[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps((__m512)t[0], (__m512)t[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps((__m512)t[2], (__m512)t[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps((__m512)t[2], (__m512)t[3]));
    t[0] = (vf)_mm512_unpacklo_pd(a, c), t[1] = (vf)_mm512_unpackhi_pd(a, c);
    t[2] = (vf)_mm512_unpacklo_pd(b, d), t[3] = (vf)_mm512_unpackhi_pd(b, d);
#elif VL == 8
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps((__m256)t[0], (__m256)t[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps((__m256)t[0], (__m256)t[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps((__m256)t[2], (__m256)t[3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps((__m256)t[2], (__m256)t[3]));
    t[0] = (vf)_mm256_unpacklo_pd(a, c), t[1] = (vf)_mm256_unpackhi_pd(a, c);
    t[2] = (vf)_mm256_unpacklo_pd(b, d), t[3] = (vf)_mm256_unpackhi_pd(b, d);
#else
    const vf a = t[0], b = t[1], c = t[2], d = t[3];
    for (int i = 0; i < UNIT; i++) t[i] = (vf){a[i], b[i], c[i], d[i]};
#endif
}

/* n <= SLICE elements of VL or PANEL weight rows, `stride` bytes apart; whole units may be read. What
 * lies `ahead` bytes after them is wanted next. */
typedef struct {
    const char *w;
    int64_t stride, n, ahead;
} Slice;

typedef char Part[PANEL][SLICE * 4];

/* Of weights w[out, in], inputs `first` and after of outputs begin .. end - 1; all others, of
 * `origin` .. origin + width - 1, are zero. They are copied to `part` if need be. */
INLINE Slice slice_of(Part part, const char *w, int64_t in, int64_t origin, int64_t width,
                      int64_t begin, int64_t end, int64_t first, bool half) {
    const int64_t size = half ? 2 : 4, n = min64(SLICE, in - first);
    int64_t ahead = SLICE;
    if (first + ahead >= in) ahead += width * in - ceil_div(in, SLICE) * SLICE;
    const Slice slice = {w + (origin * in + first) * size, in * size, n, ahead * size};
    begin = max64(begin, origin) - origin, end = min64(end, origin + width) - origin;
    if (end - begin == width && n * size % 16 == 0) return slice;
    memset(part, 0, (size_t)width * sizeof part[0]); /* nothing may be read beside the weights */
    for (int64_t o = begin; o < end; o++)
        memcpy(part[o], slice.w + o * slice.stride, (size_t)(n * size));
    return (Slice){part[0], sizeof part[0], n, 0};
}

/* Elements `at` bytes after those at w, of VL rows: t[i] of all rows has lanes in their order, and
 * is of two elements each if they are bf16. */
INLINE void load_unit(vf t[UNIT], const char *w, const Slice *s, int64_t at) {
    const char *next = w + s->ahead + at / 16 % 4 * (VL / 4) * s->stride + at;
#pragma GCC unroll 4
    for (int i = 0; i < VL / 4; i++) __builtin_prefetch(next + i * s->stride, 0, 3);
#pragma GCC unroll 4
    for (int i = 0; i < UNIT; i++) t[i] = load_blocks(w + i * s->stride + at, s->stride);
    transpose_blocks(t);
}

/* Element 0 or 1 of those that load_unit leaves in a lane. */
INLINE vf element(vf t, bool half, int which) {
    if (!half) return t;
    return which ? (vf)((vu)t & 0xffff0000u) : (vf)((vu)t << 16);
}

/* panel[i, o] = element i of weight row o as fp32. */
INLINE void pack_panel(float *panel, const Slice *s, bool half) {
    const int both = half ? 2 : 1;
    for (int64_t o = 0; o < PANEL; o += VL)
        for (int64_t i = 0; i < s->n; i += both * UNIT) {
            vf t[UNIT];
            load_unit(t, s->w + o * s->stride, s, i / both * 4);
#pragma GCC unroll 8
            for (int j = 0; j < both * UNIT; j++) {
                const vf v = element(t[j / both], half, j % both);
                memcpy(panel + (i + j) * PANEL + o, &v, sizeof v);
            }
        }
}

/* sums[r * stride + o] += sum_i x[r, i] * (element i of weight row o), o < VL, for so few rows that
 * their accumulators leave room to turn the weights round on the way. */
INLINE void multiply_few_block(const int rows, float *sums, int64_t stride, const float *x,
                               const Slice *s, bool half) {
    const int both = half ? 2 : 1;
    vf acc[FEW];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) acc[r] = (vf){0};
    for (int64_t i = 0; i < s->n; i += both * UNIT) {
        vf t[UNIT];
        load_unit(t, s->w, s, i / both * 4);
#pragma GCC unroll 8
        for (int j = 0; j < both * UNIT; j++) {
            const vf v = element(t[j / both], half, j % both);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) acc[r] = vfma(splat(x[r * SLICE + i + j]), v, acc[r]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        const vf sum = vload(sums + r * stride) + acc[r];
        memcpy(sums + r * stride, &sum, sizeof sum);
    }
}

/* `rows` <= FEW. */
#define DEFINE_MULTIPLY_FEW(NAME)                                                             \
    static void NAME(int rows, float *sums, int64_t stride, const float *x, const Slice *s) { \
        DISPATCH_UP_TO(FEW, rows, NAME##_block)                                               \
    }
#define multiply_few_bf16_block(R) multiply_few_block(R, sums, stride, x, s, true)
#define multiply_few_fp32_block(R) multiply_few_block(R, sums, stride, x, s, false)
DEFINE_MULTIPLY_FEW(multiply_few_bf16)
DEFINE_MULTIPLY_FEW(multiply_few_fp32)

/* sums[r, o] += sum_i x[r, i] * panel[i, o], 0 <= i < n; rows of x are SLICE apart. */
INLINE void multiply_block(const int rows, float *sums, const float *x, const float *panel,
                           int64_t n) {
    vf acc[TILE][PANEL_VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; v++) acc[r][v] = (vf){0};
    for (int64_t i = 0; i < n; i++) {
        vf w[PANEL_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; v++) w[v] = vload(panel + i * PANEL + v * VL);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const vf xv = splat(x[r * SLICE + i]);
#pragma GCC unroll 4
            for (int v = 0; v < PANEL_VECTORS; v++) acc[r][v] = vfma(xv, w[v], acc[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; v++) {
            float *to = sums + r * PANEL + v * VL;
            const vf sum = vload(to) + acc[r][v];
            memcpy(to, &sum, sizeof sum);
        }
}

/* `rows` <= TILE. */
static void multiply(int rows, float *sums, const float *x, const float *panel, int64_t n) {
#define MULTIPLY(R) multiply_block(R, sums, x, panel, n)
    DISPATCH_UP_TO(TILE, rows, MULTIPLY)
}

/* Row r of a tile of `rows` rows as fp32, slice by slice; the slices of the rows alternate. Zeros
 * up to a whole unit. */
INLINE void pack_slices(float *tile, int64_t rows, int64_t r, const char *src, bool half,
                        int64_t n) {
    for (int64_t i = 0; i < ceil_div(n, 2 * UNIT) * 2 * UNIT; i += VL) {
        const vf v = i < n ? load_vector(src + i * (half ? 2 : 4), half, n - i) : (vf){0};
        memcpy(tile + (i / SLICE * rows + r) * SLICE + i % SLICE, &v, sizeof v);
    }
}

/* Add z[rows, n] @ up[outputs, n] of the outputs begin .. end - 1 to the sums of a panel. */
INLINE void add_up(const Linear *a, float *sums, const float *z, int64_t rows, Part spare,
                   int64_t origin, int64_t begin, int64_t end, int64_t first, bool half) {
    for (int64_t o = origin; o < end; o += VL) {
        if (begin >= o + VL) continue;
        const Slice up = slice_of(spare, a->up, a->rank, o, VL, begin, end, first, half);
        (half ? multiply_few_bf16 : multiply_few_fp32)((int)rows, sums + o - origin, PANEL, z, &up);
    }
}

/* Add the low-rank update to the sums [rows, PANEL] of outputs `origin` and after. */
INLINE void add_low_rank(const Linear *a, float *sums, float *panel, Part spare, int64_t row0,
                         int64_t rows, int64_t origin, bool half) {
    const int64_t clean = a->inner - a->masks, stop = min64(a->out, origin + PANEL);
    for (int64_t part = 0, begin = 0; begin < stop; begin = a->part_end[part++]) {
        const int64_t end = min64(stop, a->part_end[part]);
        if (end <= origin) continue;
        for (int64_t first = 0; first < a->rank; first += SLICE) {
            const int64_t width = min64(SLICE, a->rank - first);
            if (rows > FEW) {
                const Slice up = slice_of(spare, a->up, a->rank, origin, PANEL, begin, end, first,
                                          half);
                pack_panel(panel, &up, half);
            }
            float x[TILE * SLICE];
            for (int64_t r = 0, n; r < rows; r += n) {
                const int64_t b = (row0 + r) / a->inner, i = (row0 + r) % a->inner;
                if (i < clean) {
                    n = clean - i;
                    continue;
                }
                n = min64(min64(rows - r, a->inner - i), min64(TILE, FEW));
                const float *z = a->z + (b * a->masks + i - clean) * a->z_row + part * a->rank;
                for (int64_t j = 0; j < n; j++)
                    pack_slices(x, n, j, (const char *)(z + j * a->z_row + first), false, width);
                if (rows > FEW)
                    multiply((int)n, sums + r * PANEL, x, panel, width);
                else
                    add_up(a, sums + r * PANEL, x, n, spare, origin, begin, end, first, half);
            }
        }
    }
}

INLINE void linear_task(const Linear *a, int64_t index, bool half) {
    const int64_t size = half ? 2 : 4, y_size = a->wide ? 4 : size;
    const int64_t row0 = index / a->out_tasks * a->row_block;
    const int64_t rows = min64(a->row_block, a->rows - row0);
    const int64_t begin = index % a->out_tasks * a->out_block;
    const int64_t end = min64(a->out, begin + a->out_block);
    const int64_t xs = ceil_div(a->in, SLICE) * SLICE, tiles = rows <= FEW ? 1 : ceil_div(rows, TILE);
    float *panel = scratch((PANEL * SLICE + rows * (PANEL + xs)) * sizeof(float) +
                           rows * sizeof(char *));
    float *sums = panel + PANEL * SLICE, *x = sums + rows * PANEL;
    char **y = (char **)(x + rows * xs);
    const int64_t tile = rows / tiles, taller = rows % tiles; /* so many have one row more */
    for (int64_t t = 0, r = 0, r0 = 0; t < tiles; t++, r0 = r) {
        const int64_t n = tile + (t < taller);
        for (; r < r0 + n; r++) {
            const int64_t b = (row0 + r) / a->inner, i = (row0 + r) % a->inner;
            const char *src = a->x + (b * a->x_batch + i * a->x_row) * size;
            pack_slices(x + r0 * xs, n, r - r0, src, half, a->in);
            y[r] = a->y + (b * a->y_batch + i * a->y_row) * y_size;
        }
    }

    const int64_t width = rows <= FEW ? VL : PANEL;
    Part part;
    for (int64_t origin = begin; origin < end; origin += PANEL) {
        memset(sums, 0, rows * PANEL * sizeof(float));
        for (int64_t o = 0; o < min64(PANEL, end - origin); o += width)
            for (int64_t first = 0; first < a->in; first += SLICE) {
                const Slice slice =
                    slice_of(part, a->w, a->in, origin + o, width, begin, end, first, half);
                if (rows <= FEW) {
                    (half ? multiply_few_bf16 : multiply_few_fp32)(
                        (int)rows, sums + o, PANEL, x + rows * first, &slice);
                    continue;
                }
                pack_panel(panel, &slice, half);
                for (int64_t t = 0, r = 0, height; t < tiles; t++, r += height) {
                    height = tile + (t < taller);
                    multiply((int)height, sums + r * PANEL, x + r * xs + height * first, panel,
                             slice.n);
                }
            }
        if (a->up) {
            while (atomic_load_explicit(a->down_done, memory_order_acquire) < a->down_tasks)
                continue;
            add_low_rank(a, sums, panel, part, row0, rows, origin, half);
        }
        const int64_t stop = min64(end, origin + PANEL);
        for (int64_t r = 0; r < rows; r++) {
            const char *later = y[min64(r + STORES_AHEAD, rows - 1)] + origin * y_size;
            for (int64_t line = 0; line < PANEL * y_size; line += 64)
                __builtin_prefetch(later + line, 1, 3);
            for (int64_t o = origin; o < stop; o += VL) {
                const int64_t n = stop - o;
                char *to = y[r] + o * y_size;
                vf v = vload(sums + r * PANEL + o - origin);
                if (a->bias) v += load_vector(a->bias + o * size, half, n);
                if (a->accumulate) v += load_vector(to, half, n);
                store_vector(to, half && !a->wide, n, v);
            }
        }
    }
}

INLINE void linear_or_down_task(const Linear *a, int64_t index, bool half) {
    if (index >= a->down_tasks) {
        linear_task(a, index - a->down_tasks, half);
    } else {
        linear_task(a->down, index, half);
        atomic_fetch_add_explicit(a->down_done, 1, memory_order_release);
    }
}

static void linear_task_bf16(const void *a, int64_t index) { linear_or_down_task(a, index, true); }
static void linear_task_fp32(const void *a, int64_t index) { linear_or_down_task(a, index, false); }

/* Cut the product into tasks for so many threads; returns their number. */
static int64_t cut(Linear *a, int64_t threads) {
    const int64_t budget = 2 << 20; /* bytes of packed rows and their sums */
    a->row_block = min64(a->rows, max64(TILE, budget / ((a->in + PANEL) * 4) / TILE * TILE));
    const int64_t shares = threads == 1 ? 1 : threads * 2;
    a->out_block = ceil_div(ceil_div(a->out, shares), PANEL) * PANEL;
    a->out_tasks = ceil_div(a->out, a->out_block);
    return ceil_div(a->rows, a->row_block) * a->out_tasks;
}

/* `down`, which may be NULL, makes a->z. */
static void linear(Linear *a, Linear *down, bool half, int64_t threads) {
    if (a->rows == 0 || a->out == 0) return;
    _Atomic int64_t done = 0;
    threads = useful_threads(threads, (1 + a->rows / 2) * a->in * a->out / VL);
    const int64_t tasks = cut(a, threads);
    if (down) {
        a->down = down;
        a->down_tasks = cut(down, 1);
        a->down_done = &done;
    }
    parallel_for(half ? linear_task_bf16 : linear_task_fp32, a, a->down_tasks + tasks, threads);
}

/* y[r, o] = sum_i x[r, i] * w[o, i] (+ bias[o]) (+ y[r, o] if accumulate), rounded once. */
EXPORT void idlm_linear(int half, const void *x, int64_t x_batch, int64_t x_row, const void *w,
                        const void *bias, void *y, int64_t y_batch, int64_t y_row, int64_t rows,
                        int64_t inner, int64_t in, int64_t out, int accumulate, int64_t threads) {
    Linear a = {.x = x, .w = w, .bias = bias, .y = y, .rows = rows, .inner = inner,
                .x_batch = x_batch, .x_row = x_row, .y_batch = y_batch, .y_row = y_row,
                .in = in, .out = out, .accumulate = accumulate};
    linear(&a, NULL, half, threads);
}

/* ---- attention ------------------------------------------------------------------------------ */

/* Replace n scores by exp((score - max) * scale); returns the inverse of their sum. `s` has room
 * up to a multiple of VL. */
static float softmax(float *s, int64_t n, float scale) {
    if (n == 0) return 0;
    const int64_t whole = ceil_div(n, VL) * VL;
    for (int64_t i = n; i < whole; i++) s[i] = -__builtin_inff();
    vf m = vload(s);
    for (int64_t i = VL; i < whole; i += VL) {
        const vf v = vload(s + i);
        const vu greater = (vu)(v > m);
        m = (vf)(((vu)v & greater) | ((vu)m & ~greater));
    }
    float max = m[0];
    for (int i = 1; i < VL; i++) max = m[i] > max ? m[i] : max;
    vf sum = {0};
    for (int64_t i = 0; i < whole; i += VL) {
        const vf e = vexp((vload(s + i) - max) * scale);
        memcpy(s + i, &e, sizeof e);
        sum += e;
    }
    return 1.0f / reduce4(sum, sum, sum, sum)[0];
}

/* Elements of a value that mix handles as whole groups; the rest goes vector by vector. */
INLINE int64_t grouped(int64_t head_dim) { return head_dim / (VB * VL) * (VB * VL); }

INLINE void mix(int rows, bool half, int64_t head_dim, float *o, int64_t o_stride,
                const float *const *p, const Rows *v, int64_t first, int64_t end) {
    const int64_t size = half ? 2 : 4, middle = grouped(head_dim);
    for (int64_t d = 0; d < middle; d += VB * VL) {
#define MIX_GROUPS(R) mix_block(R, VB, half, o + d, o_stride, p, v, first, end, d * size, VL)
        DISPATCH_UP_TO(RB, rows, MIX_GROUPS)
    }
    for (int64_t d = middle; d < head_dim; d += VL)
        mix_vector(rows, half, o + d, o_stride, p, v, first, end, d * size,
                   min64(VL, head_dim - d));
}

static void mix_bf16(int rows, int64_t d, float *o, int64_t os, const float *const *p,
                     const Rows *v, int64_t first, int64_t end) {
    mix(rows, true, d, o, os, p, v, first, end);
}

static void mix_fp32(int rows, int64_t d, float *o, int64_t os, const float *const *p,
                     const Rows *v, int64_t first, int64_t end) {
    mix(rows, false, d, o, os, p, v, first, end);
}

/* A cache of blocks of `tokens` keys or values: index i of request b lies in block
 * table[b * most + i / tokens]. Strides in elements; the last dimension is dense. */
typedef struct {
    const int32_t *table;
    int64_t most, blocks, tokens, block_stride, head_stride, row_stride;
} Pages;

typedef struct {
    const char *q, *k, *v;
    char *out;
    int64_t q_batch, q_row, q_head; /* strides in elements; the last dimension is dense */
    Pages pages;
    const int64_t *start, *positions;
    const uint8_t *visible;
    int64_t rows, kv_heads, group, head_dim, window, tile, tiles;
    float scale;
} Attention;

/* Which keys a row sees: bit i of word g stands for key g * VL + i. */
typedef uint32_t Seen;
#define ALL_SEEN (((Seen)1 << VL) - 1)

INLINE bool sees(const Seen *seen, int64_t j) { return seen[j / VL] >> j % VL & 1; }

/* The first key after j, which is before `end`, that differs from it; `end` if none does. */
INLINE int64_t run_end(const Seen *seen, int64_t j, int64_t end) {
    const Seen same = sees(seen, j) ? ALL_SEEN : 0;
    for (; j < end; j = (j / VL + 1) * VL) {
        const Seen other = (seen[j / VL] ^ same) >> j % VL;
        if (other) return min64(end, j + __builtin_ctz(other));
    }
    return end;
}

INLINE void mark_visible(const Attention *a, int64_t b, int64_t row, Seen *seen) {
    const int64_t start = a->start[b], R = a->rows;
    const int64_t *positions = a->positions + b * R;
    const uint8_t *visible = a->visible + (b * R + row) * R;
    const int64_t first = a->window ? max64(0, positions[row] - a->window + 1) : 0;
    memset(seen, 0, (size_t)ceil_div(start + R, VL) * sizeof *seen);
    for (int64_t j = first, end; j < start; j = end) {
        end = min64(start, (j / VL + 1) * VL);
        seen[j / VL] |= (ALL_SEEN >> (VL - (end - j))) << j % VL;
    }
    for (int64_t c = 0; c < R; c += 8) {
        uint64_t bytes = 0;
        memcpy(&bytes, visible + c, (size_t)min64(8, R - c));
        uint64_t bits = bytes * 0x0102040810204080u >> 56; /* little endian */
        for (int64_t i = 0; a->window && i < min64(8, R - c); i++)
            if (positions[c + i] < first) bits &= ~((uint64_t)1 << i);
        bits <<= (start + c) % VL;
        for (int64_t g = (start + c) / VL; bits; bits >>= VL) seen[g++] |= bits & ALL_SEEN;
    }
}

/* Elements `first` and after of the keys of group g, of which `keys` there are in all. */
INLINE Slice slice_of_keys(Part part, const Attention *a, const Rows *k, int64_t g, int64_t keys,
                           int64_t first, bool half) {
    const int64_t size = half ? 2 : 4, n = min64(SLICE, a->head_dim - first), j = g * VL;
    const int64_t next = j + VL < keys ? row_at(k, j + VL) - row_at(k, j) : 0;
    if (k->tokens % VL == 0 && n * size % 16 == 0) /* may read dead keys after the last one */
        return (Slice){row_at(k, j) + first * size, k->row_stride, n, next};
    memset(part, 0, VL * sizeof part[0]);
    for (int64_t i = 0; i < min64(VL, keys - j); i++)
        memcpy(part[i], row_at(k, j + i) + first * size, (size_t)(n * size));
    return (Slice){part[0], sizeof part[0], n, 0};
}

/* s[i, 0 .. count[i]) = the scores of the keys that row i sees, in their order. */
INLINE void score_keys(const Attention *a, int rows, const float *q, const Rows *k, int64_t keys,
                       const Seen *seen, int64_t groups, float *s, int64_t ss, int64_t *count,
                       bool half) {
    Part part;
    bool even = true; /* all rows have seen the same number of keys so far */
    memset(s, 0, rows * ss * sizeof *s);
    for (int64_t g = 0; g < groups; g++) {
        Seen any = 0, every = ALL_SEEN;
        for (int i = 0; i < rows; i++) any |= seen[i * groups + g], every &= seen[i * groups + g];
        if (!any) continue;
        /* Straight to their places if all rows see the keys and have seen as many. */
        const bool direct = even && every == ALL_SEEN;
        float scores[FEW * VL] = {0}, *to = direct ? s + count[0] : scores;
        for (int64_t first = 0; first < a->head_dim; first += SLICE) {
            const Slice slice = slice_of_keys(part, a, k, g, keys, first, half);
            (half ? multiply_few_bf16 : multiply_few_fp32)(rows, to, direct ? ss : VL,
                                                           q + rows * first, &slice);
        }
        for (int i = 0; i < rows; i++) {
            if (direct) {
                count[i] += VL;
                continue;
            }
            for (Seen left = seen[i * groups + g]; left; left &= left - 1)
                s[i * ss + count[i]++] = scores[i * VL + __builtin_ctz(left)];
            even = i ? even && count[i] == count[0] : true;
        }
    }
}

/* o[i] = the sum of the values that row i sees, weighted by p[i], for up to RB rows. A run of keys
 * that all see is mixed as one, others row by row; `every` has room for its word of each group. */
INLINE void mix_values(int rows, int64_t D, float *o, int64_t os, const float **p, const Rows *v,
                       const Seen *seen, int64_t groups, int64_t keys, Seen *every, bool half) {
    for (int64_t g = 0; g < groups; g++) {
        every[g] = ALL_SEEN;
        for (int i = 0; i < rows; i++) every[g] &= seen[i * groups + g];
    }
    for (int64_t j = 0, end; j < keys; j = end) {
        end = run_end(every, j, keys);
        if (sees(every, j)) {
            (half ? mix_bf16 : mix_fp32)(rows, D, o, os, p, v, j, end);
            for (int i = 0; i < rows; i++) p[i] += end - j;
            continue;
        }
        for (int i = 0; i < rows; i++)
            for (int64_t first = j, last; first < end; first = last) {
                last = run_end(seen + i * groups, first, end);
                if (!sees(seen + i * groups, first)) continue;
                (half ? mix_bf16 : mix_fp32)(1, D, o + i * os, os, p + i, v, first, last);
                p[i] += last - first;
            }
    }
}

/* One tile: up to FEW of the rows * group query rows that share a KV head.
 *
 * A row's scores are stored without gaps, so that its sums run over the keys it sees, in order,
 * and do not depend on what lies between them. */
INLINE void attention_task(const Attention *a, int64_t index, bool half) {
    const int64_t size = half ? 2 : 4, D = a->head_dim;
    const int64_t b = index / a->tiles / a->kv_heads, head = index / a->tiles % a->kv_heads;
    const int64_t m0 = index % a->tiles * a->tile;
    const int rows = (int)min64(a->tile, a->rows * a->group - m0);
    const int64_t keys = a->start[b] + a->rows, groups = ceil_div(keys, VL);
    const Pages *pages = &a->pages;
    const Rows k = {a->k + head * pages->head_stride * size, pages->table + b * pages->most,
                    pages->block_stride * size, pages->row_stride * size,
                    (uint32_t)pages->tokens};
    Rows v = k;
    v.base = a->v + head * pages->head_stride * size;

    const int64_t qs = ceil_div(D, SLICE) * SLICE, os = padded(D), ss = groups * VL + VL;
    float *q = scratch(rows * (qs + os + ss) * sizeof(float) + (rows + 1) * groups * sizeof(Seen));
    float *o = q + rows * qs, *s = o + rows * os;
    Seen *seen = (Seen *)(s + rows * ss), *every = seen + rows * groups;
    int64_t row[FEW], count[FEW] = {0};
    for (int i = 0; i < rows; i++) {
        row[i] = (m0 + i) / a->group;
        const int64_t offset = b * a->q_batch + row[i] * a->q_row +
                               (head * a->group + (m0 + i) % a->group) * a->q_head;
        pack_slices(q, rows, i, a->q + offset * size, half, D);
        if (i && row[i] == row[i - 1])
            memcpy(seen + i * groups, seen + (i - 1) * groups, (size_t)groups * sizeof *seen);
        else
            mark_visible(a, b, row[i], seen + i * groups);
    }
    score_keys(a, rows, q, &k, keys, seen, groups, s, ss, count, half);

    float scale[FEW];
    const float *p[FEW];
    for (int i = 0; i < rows; i++) {
        scale[i] = softmax(s + i * ss, count[i], a->scale);
        p[i] = s + i * ss;
    }
    memset(o, 0, rows * os * sizeof(float));
    for (int i = 0; i < rows; i += RB)
        mix_values((int)min64(RB, rows - i), D, o + i * os, os, p + i, &v, seen + i * groups,
                   groups, keys, every, half);

    const int64_t heads = a->kv_heads * a->group;
    for (int i = 0; i < rows; i++) {
        const int64_t h = head * a->group + (m0 + i) % a->group;
        char *out = a->out + ((b * a->rows + row[i]) * heads + h) * D * size;
        const float *oi = o + i * os;
        for (int64_t d = 0; d < grouped(D); d += GROUP)
            store_group(out + d * size, half, vload(oi + d) * scale[i],
                        vload(oi + d + VL) * scale[i]);
        for (int64_t d = grouped(D); d < D; d += VL)
            store_vector(out + d * size, half, D - d, vload(oi + d) * scale[i]);
    }
}

static void attention_task_bf16(const void *a, int64_t index) { attention_task(a, index, true); }
static void attention_task_fp32(const void *a, int64_t index) { attention_task(a, index, false); }

static void attention(Attention *a, int64_t batch, bool half, int64_t threads) {
    int64_t keys = 0;
    for (int64_t b = 0; b < batch; b++) keys += a->start[b] + a->rows;
    threads = useful_threads(threads,
                             keys * a->rows * a->kv_heads * a->group * a->head_dim * 2 / VL);
    /* Few rows: smaller tiles, so that there is work for every thread. */
    const int64_t all_rows = batch * a->kv_heads * a->rows * a->group;
    a->tile = max64(1, min64(FEW, ceil_div(all_rows, 4 * threads)));
    if (a->tile > a->group) a->tile -= a->tile % a->group; /* whole rows see the same keys */
    a->tiles = ceil_div(a->rows * a->group, a->tile);
    parallel_for(half ? attention_task_bf16 : attention_task_fp32, a,
                 batch * a->kv_heads * a->tiles, threads);
}

/* Whether rows after `start` lie within the blocks of their requests, all of which there are. */
static bool rows_fit(const Pages *p, const int64_t *start, int64_t batch, int64_t rows) {
    for (int64_t b = 0; b < batch; b++) {
        if (start[b] < 0 || start[b] + rows > p->most * p->tokens) return false;
        for (int64_t i = 0; i < ceil_div(start[b] + rows, p->tokens); i++) {
            const int32_t block = p->table[b * p->most + i];
            if (block < 0 || block >= p->blocks) return false;
        }
    }
    return true;
}

/* Attention of in-flight rows over a KV cache; see cpu_kernels.py for the shapes. `out` is dense,
 * window 0 means none. False, and nothing done, if the rows do not fit into the cache. */
EXPORT bool idlm_attention(int half, const void *q, int64_t q_batch, int64_t q_row, int64_t q_head,
                           const void *k, const void *v, const Pages *pages, void *out,
                           const int64_t *start, const uint8_t *visible, const int64_t *positions,
                           int64_t batch, int64_t rows, int64_t kv_heads, int64_t group,
                           int64_t head_dim, float scale, int64_t window, int64_t threads) {
    Attention a = {.q = q, .k = k, .v = v, .out = out, .q_batch = q_batch, .q_row = q_row,
                   .q_head = q_head, .pages = *pages, .start = start, .positions = positions,
                   .visible = visible, .rows = rows, .kv_heads = kv_heads, .group = group,
                   .head_dim = head_dim, .window = window, .scale = scale};
    if (!rows_fit(pages, start, batch, rows)) return false;
    if (rows > 0) attention(&a, batch, half, threads);
    return true;
}

/* Copy in-flight rows [batch, rows, heads, width] to the cache, row r of request b to index
 * start[b] + r. Strides in elements. */
static void append(bool half, const char *x, int64_t x_batch, int64_t x_row, int64_t x_head,
                   char *cache, const Pages *p, const int64_t *start, int64_t batch, int64_t rows,
                   int64_t heads, int64_t width) {
    const int64_t size = half ? 2 : 4;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t r = 0; r < rows; r++) {
            const int64_t block = p->table[b * p->most + (start[b] + r) / p->tokens];
            const int64_t at = (start[b] + r) % p->tokens;
            for (int64_t h = 0; h < heads; h++)
                memcpy(cache + (block * p->block_stride + h * p->head_stride + at * p->row_stride) *
                                   size,
                       x + (b * x_batch + r * x_row + h * x_head) * size, (size_t)(width * size));
        }
}

/* append to the cache; false, and nothing done, if the rows do not fit. */
EXPORT bool idlm_append(int half, const void *x, int64_t x_batch, int64_t x_row, int64_t x_head,
                        void *cache, const Pages *pages, const int64_t *start, int64_t batch,
                        int64_t rows, int64_t heads, int64_t width) {
    if (!rows_fit(pages, start, batch, rows)) return false;
    append(half, x, x_batch, x_row, x_head, cache, pages, start, batch, rows, heads, width);
    return true;
}

/* ---- small operators ------------------------------------------------------------------------ */

/* Rows x[rows, heads, width] to y, each with strides in elements; y may be x. */
typedef struct {
    const char *x, *a, *b;
    char *y;
    int64_t rows, heads, x_row, x_head, y_row, y_head, width, block;
    float eps;
} RowWise;

INLINE const char *x_at(const RowWise *op, int64_t row, int64_t head, int64_t size) {
    return op->x + (row * op->x_row + head * op->x_head) * size;
}

INLINE char *y_at(const RowWise *op, int64_t row, int64_t head, int64_t size) {
    return op->y + (row * op->y_row + head * op->y_head) * size;
}

/* a: weight[width] */
INLINE void rms_norm_row(const RowWise *op, int64_t row, int64_t head, bool half) {
    const int64_t size = half ? 2 : 4, n = op->width;
    const char *x = x_at(op, row, head, size);
    char *y = y_at(op, row, head, size);
    vf squares = {0};
    for (int64_t d = 0; d < n; d += VL) {
        const vf v = load_vector(x + d * size, half, n - d);
        squares = vfma(v, v, squares);
    }
    const float mean = reduce4(squares, squares, squares, squares)[0] / (float)n;
    const float inverse = 1.0f / __builtin_sqrtf(mean + op->eps);
    for (int64_t d = 0; d < n; d += VL) {
        const vf v = load_vector(x + d * size, half, n - d) * inverse;
        const vf w = load_vector(op->a + d * size, half, n - d);
        store_vector(y + d * size, half, n - d, v * w);
    }
}

/* a, b: cosines and signed sines [rows, width] */
INLINE void rotate_row(const RowWise *op, int64_t row, int64_t head, bool half) {
    const int64_t size = half ? 2 : 4, n = op->width / 2, far = n * size;
    const char *x = x_at(op, row, head, size);
    char *y = y_at(op, row, head, size);
    const int64_t table = row * 2 * far;
    const char *cosine = op->a + table, *sine = op->b + table;
    for (int64_t d = 0; d < n; d += VL) {
        const int64_t at = d * size, left = n - d;
        const vf x1 = load_vector(x + at, half, left), x2 = load_vector(x + far + at, half, left);
        const vf c1 = load_vector(cosine + at, half, left);
        const vf c2 = load_vector(cosine + far + at, half, left);
        const vf s1 = load_vector(sine + at, half, left);
        const vf s2 = load_vector(sine + far + at, half, left);
        store_vector(y + at, half, left, vfma(x1, c1, x2 * s1));
        store_vector(y + far + at, half, left, vfma(x2, c2, x1 * s2));
    }
}

/* x: gate and up side by side, 2 * width elements */
INLINE void silu_mul_row(const RowWise *op, int64_t row, int64_t head, bool half) {
    const int64_t size = half ? 2 : 4, n = op->width;
    const char *gate = x_at(op, row, head, size), *up = gate + n * size;
    char *y = y_at(op, row, head, size);
    for (int64_t d = 0; d < n; d += VL) {
        const vf g = load_vector(gate + d * size, half, n - d);
        const vf u = load_vector(up + d * size, half, n - d);
        const vu negative = (vu)(g < 0.0f), one = (vu)((vf){0} + 1.0f);
        const vf e = vexp((vf)((vu)g | 0x80000000u)); /* e^-|g| */
        const vf sigmoid = (vf)(((vu)e & negative) | (one & ~negative)) / (1.0f + e);
        store_vector(y + d * size, half, n - d, g * sigmoid * u);
    }
}

#define DEFINE_ROW_WISE(NAME)                                                                     \
    INLINE void NAME##_task(const RowWise *op, int64_t index, bool half) {                        \
        const int64_t end = min64(op->rows, (index + 1) * op->block);                             \
        for (int64_t row = index * op->block; row < end; row++)                                   \
            for (int64_t head = 0; head < op->heads; head++) NAME##_row(op, row, head, half);     \
    }                                                                                             \
    static void NAME##_task_bf16(const void *op, int64_t i) { NAME##_task(op, i, true); }         \
    static void NAME##_task_fp32(const void *op, int64_t i) { NAME##_task(op, i, false); }        \
    static void NAME(RowWise op, bool half, int64_t threads) {                                    \
        if (op.rows == 0) return;                                                                 \
        threads = useful_threads(threads, op.rows * op.heads * op.width * 16 / VL);               \
        op.block = max64(1, ceil_div(op.rows, 2 * threads));                                      \
        parallel_for(half ? NAME##_task_bf16 : NAME##_task_fp32, &op,                             \
                     ceil_div(op.rows, op.block), threads);                                       \
    }
DEFINE_ROW_WISE(rms_norm)
DEFINE_ROW_WISE(rotate)
DEFINE_ROW_WISE(silu_mul)

/* y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight; dense. */
EXPORT void idlm_rms_norm(int half, const void *x, const void *weight, void *y, int64_t rows,
                          int64_t width, float eps, int64_t threads) {
    rms_norm((RowWise){.x = x, .a = weight, .y = y, .rows = rows, .heads = 1, .x_row = width,
                       .y_row = width, .width = width, .eps = eps},
             half, threads);
}

/* ---- decoder layers ------------------------------------------------------------------------- */

/* Structures as in cpu_kernels.py. All tensors are dense but for the cache; a pointer to what a
 * model does not have is NULL. */
typedef struct {
    const void *weight, *bias;
} Projection;

typedef struct {
    const void *attn_norm, *mlp_norm, *q_norm, *k_norm;
    Projection qkv, o, gate_up, down;
} Layer;

/* down: [parts * rank, in]; up: [out, rank]. */
typedef struct {
    const void *down, *up;
    int64_t rank;
} LowRank;

typedef struct {
    LowRank qkv, o, gate_up, down;
} LayerUpdate;

typedef struct {
    int64_t half, threads, batch, rows, masks;
    int64_t layers, hidden, inner, heads, kv_heads, head_dim;
    float eps, scale;
    const Layer *layer;
    const LayerUpdate *update; /* of the last `masks` of each request's rows; NULL: none */
    const void *norm;
    void *x; /* [batch, rows, hidden]: embeddings in, normed hidden states out */
    const void *cosine, *sine;
    void *k, *v;
    int64_t kv_layer; /* stride in elements */
    Pages pages;
    int64_t window;
    const int64_t *start, *positions;
    const uint8_t *visible;
} Stack;

static void project(const Stack *s, const void *x, int64_t in, Projection p, LowRank update,
                    const int64_t *part_end, int parts, void *y, bool accumulate, float *z) {
    const int64_t out = part_end[parts - 1], rows = s->batch * s->rows;
    const int64_t z_row = parts * update.rank;
    const int64_t clean = (s->rows - s->masks) * in * (s->half ? 2 : 4);
    Linear down = {.x = (const char *)x + clean, .w = update.down, .y = (char *)z,
                   .rows = s->batch * s->masks, .inner = s->masks, .x_batch = s->rows * in,
                   .x_row = in, .y_batch = s->masks * z_row, .y_row = z_row, .in = in,
                   .out = z_row, .wide = true};
    Linear a = {.x = x, .w = p.weight, .bias = p.bias, .y = y, .rows = rows, .inner = s->rows,
                .x_batch = s->rows * in, .x_row = in, .y_batch = s->rows * out, .y_row = out,
                .in = in, .out = out, .accumulate = accumulate, .z = z, .up = update.up,
                .masks = s->masks, .rank = update.rank, .z_row = z_row, .part_end = part_end};
    linear(&a, update.down ? &down : NULL, s->half, s->threads);
}

static void attend(const Stack *s, int64_t layer, const char *qkv, char *out) {
    const int64_t size = s->half ? 2 : 4, D = s->head_dim;
    const int64_t row = (s->heads + 2 * s->kv_heads) * D;
    char *cache[2] = {(char *)s->k + layer * s->kv_layer * size,
                      (char *)s->v + layer * s->kv_layer * size};
    for (int i = 0; i < 2; i++)
        append(s->half, qkv + (s->heads + i * s->kv_heads) * D * size, s->rows * row, row, D,
               cache[i], &s->pages, s->start, s->batch, s->rows, s->kv_heads, D);
    Attention a = {.q = qkv, .k = cache[0], .v = cache[1], .out = out, .q_batch = s->rows * row,
                   .q_row = row, .q_head = D, .pages = s->pages, .start = s->start,
                   .positions = s->positions, .visible = s->visible, .rows = s->rows,
                   .kv_heads = s->kv_heads, .group = s->heads / s->kv_heads, .head_dim = D,
                   .window = s->window, .scale = s->scale};
    attention(&a, s->batch, s->half, s->threads);
}

static void norm_rows(const Stack *s, const void *x, const void *weight, void *y, int64_t heads,
                      int64_t row, int64_t width) {
    rms_norm((RowWise){.x = x, .a = weight, .y = y, .rows = s->batch * s->rows, .heads = heads,
                       .x_row = row, .x_head = width, .y_row = row, .y_head = width,
                       .width = width, .eps = s->eps},
             s->half, s->threads);
}

/* All layers and the final norm. False, and nothing done, if the rows do not fit into the cache or
 * memory is short. */
EXPORT bool idlm_stack(const Stack *s) {
    const int64_t size = s->half ? 2 : 4, rows = s->batch * s->rows, D = s->head_dim;
    const int64_t H = s->hidden, I = s->inner, Q = s->heads * D, K = s->kv_heads * D;
    const int64_t qkv_end[] = {Q, Q + K, Q + 2 * K}, h_end[] = {H}, gate_up_end[] = {I, 2 * I};
    const int64_t W = Q + 2 * K;
    if (!rows_fit(&s->pages, s->start, s->batch, s->rows)) return false;
    int64_t rank = 0;
    for (int64_t l = 0; s->update && l < s->layers; l++) {
        const LayerUpdate *u = s->update + l;
        rank = max64(rank, max64(max64(3 * u->qkv.rank, u->o.rank),
                                 max64(2 * u->gate_up.rank, u->down.rank)));
    }
    float *z = malloc((size_t)(s->batch * s->masks * rank * 4 + rows * (H + W + Q + 3 * I) * size));
    if (!z) return false;
    char *normed = (char *)(z + s->batch * s->masks * rank), *qkv = normed + rows * H * size;
    char *attended = qkv + rows * W * size, *gate_up = attended + rows * Q * size;
    char *act = gate_up + rows * 2 * I * size;

    for (int64_t l = 0; l < s->layers; l++) {
        const Layer *layer = s->layer + l;
        const LayerUpdate none = {{0}, {0}, {0}, {0}}, *update = s->update ? s->update + l : &none;
        norm_rows(s, s->x, layer->attn_norm, normed, 1, H, H);
        project(s, normed, H, layer->qkv, update->qkv, qkv_end, 3, qkv, false, z);
        if (layer->q_norm) norm_rows(s, qkv, layer->q_norm, qkv, s->heads, W, D);
        if (layer->k_norm)
            norm_rows(s, qkv + Q * size, layer->k_norm, qkv + Q * size, s->kv_heads, W, D);
        rotate((RowWise){.x = qkv, .a = s->cosine, .b = s->sine, .y = qkv, .rows = rows,
                         .heads = s->heads + s->kv_heads, .x_row = W, .x_head = D, .y_row = W,
                         .y_head = D, .width = D},
               s->half, s->threads);
        attend(s, l, qkv, attended);
        project(s, attended, Q, layer->o, update->o, h_end, 1, s->x, true, z);
        norm_rows(s, s->x, layer->mlp_norm, normed, 1, H, H);
        project(s, normed, H, layer->gate_up, update->gate_up, gate_up_end, 2, gate_up, false, z);
        silu_mul((RowWise){.x = gate_up, .y = act, .rows = rows, .heads = 1, .x_row = 2 * I,
                           .y_row = I, .width = I},
                 s->half, s->threads);
        project(s, act, I, layer->down, update->down, h_end, 1, s->x, true, z);
    }
    norm_rows(s, s->x, s->norm, s->x, 1, H, H);
    free(z);
    return true;
}

/* ---- choosing tokens ------------------------------------------------------------------------ */

#define KEYS 32
typedef int16_t vk __attribute__((vector_size(2 * KEYS)));

/* The leading 16 bits of row `x` as numbers of the same order, padded with the least. */
INLINE void order_keys(const char *x, bool half, int64_t n, int16_t *key) {
    for (int64_t i = 0; i < n; i++) {
        int16_t bits;
        memcpy(&bits, half ? x + i * 2 : x + i * 4 + 2, 2); /* little endian */
        key[i] = bits ^ ((bits >> 15) & 0x7fff);
    }
    for (int64_t i = n; i % KEYS; i++) key[i] = INT16_MIN;
}

INLINE int64_t count_above(const int16_t *key, int64_t n, int threshold) {
    int64_t count = 0;
    for (int64_t begin = 0; begin < n; begin += KEYS * INT16_MAX) {
        const int64_t end = min64(n, begin + KEYS * INT16_MAX);
        vk lanes = {0};
        for (int64_t i = begin; i < end; i += KEYS) {
            vk k;
            memcpy(&k, key + i, sizeof k);
            lanes -= k > (int16_t)threshold;
        }
        for (int lane = 0; lane < KEYS; lane++) count += lanes[lane];
    }
    return count;
}

typedef struct {
    const char *x;
    int64_t *ids;
    int64_t x_row, n, k;
} Top;

INLINE void top_task(const Top *a, int64_t row, bool half) {
    int16_t *key = scratch((size_t)(a->n + KEYS) * 2);
    order_keys(a->x + row * a->x_row * (half ? 2 : 4), half, a->n, key);
    int low = INT16_MIN - 1, high = INT16_MAX; /* at most k keys are above `high` */
    while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        if (count_above(key, a->n, middle) > a->k)
            low = middle;
        else
            high = middle;
    }
    /* All above `high`, and of those equal to it the first. */
    int64_t *ids = a->ids + row * a->k, found = 0, ties = a->k - count_above(key, a->n, high);
    for (int64_t i = 0; i < a->n && found < a->k; i += KEYS) {
        vk k;
        memcpy(&k, key + i, sizeof k);
        const vk hit = k >= (int16_t)high;
        uint64_t any[KEYS / 4], some = 0;
        memcpy(any, &hit, sizeof any);
        for (int j = 0; j < KEYS / 4; j++) some |= any[j];
        if (!some) continue;
        for (int64_t j = i; j < min64(i + KEYS, a->n) && found < a->k; j++)
            if (key[j] > high || (key[j] == high && ties-- > 0)) ids[found++] = j;
    }
}

static void top_task_bf16(const void *a, int64_t row) { top_task(a, row, true); }
static void top_task_fp32(const void *a, int64_t row) { top_task(a, row, false); }

/* ids[rows, k], ascending: the k <= n largest of each row by their leading 16 bits; of equal ones
 * the first. */
EXPORT void idlm_top(int half, const void *x, int64_t x_row, int64_t *ids, int64_t rows, int64_t n,
                     int64_t k, int64_t threads) {
    const Top a = {x, ids, x_row, n, k};
    parallel_for(half ? top_task_bf16 : top_task_fp32, &a, rows,
                 useful_threads(threads, rows * n / 2));
}

typedef struct {
    const char *x;
    int64_t *ids;
    int64_t n;
} Argmax;

INLINE void argmax_task(const Argmax *a, int64_t row, bool half) {
    const char *x = a->x + row * a->n * (half ? 2 : 4);
    vf best = load_vector(x, half, a->n);
    vu at = {0}; /* where the best of each lane was read, less the lane */
    for (int64_t i = VL; i < a->n; i += VL) {
        vf v = load_vector(x + i * (half ? 2 : 4), half, a->n - i);
        for (int64_t lane = a->n - i; lane < VL; lane++) v[lane] = -__builtin_inff();
        const vu greater = (vu)(v > best), index = (vu){0} + (uint32_t)i;
        best = (vf)(((vu)v & greater) | ((vu)best & ~greater));
        at = (index & greater) | (at & ~greater);
    }
    int64_t found = -1;
    float most = 0;
    for (int lane = 0; lane < min64(VL, a->n); lane++) {
        const int64_t id = (int64_t)at[lane] + lane;
        if (found < 0 || best[lane] > most || (best[lane] == most && id < found))
            found = id, most = best[lane];
    }
    a->ids[row] = found;
}

static void argmax_task_bf16(const void *a, int64_t row) { argmax_task(a, row, true); }
static void argmax_task_fp32(const void *a, int64_t row) { argmax_task(a, row, false); }

/* ids[r] = the first index of the largest of x[r, n]; dense, 0 < n < 2^32. */
EXPORT void idlm_argmax(int half, const void *x, int64_t *ids, int64_t rows, int64_t n,
                        int64_t threads) {
    const Argmax a = {x, ids, n};
    parallel_for(half ? argmax_task_bf16 : argmax_task_fp32, &a, rows,
                 useful_threads(threads, rows * n / VL * 4));
}

typedef struct {
    const char *x, *w;
    const int64_t *ids;
    float *y;
    int64_t n, k, in;
} Score;

#define SCORED 32 /* ids of a task */

INLINE void score_task(const Score *a, int64_t index, bool half) {
    const int64_t width = a->in * (half ? 2 : 4), tasks = ceil_div(a->k, SCORED);
    const int64_t row = index / tasks, begin = index % tasks * SCORED;
    const int64_t end = min64(a->k, begin + SCORED), *ids = a->ids + row * a->k;
    float *x = scratch(padded(a->in) * sizeof(float) + SCORED * width);
    char *w = (char *)(x + padded(a->in));
    pack_row(x, a->x + row * width, half, a->in);
    for (int64_t i = begin; i < end; i++)
        memcpy(w + (i - begin) * width, a->w + ids[i] * width, (size_t)width);
    for (int64_t i = begin, n; i < end; i += n) {
        n = end - i < OB ? 1 : OB;
        const v4f sums = dot(x, w + (i - begin) * width, n == OB ? width : 0, a->in, half);
        memcpy(a->y + row * a->k + i, &sums, (size_t)n * sizeof(float));
    }
}

static void score_task_bf16(const void *a, int64_t index) { score_task(a, index, true); }
static void score_task_fp32(const void *a, int64_t index) { score_task(a, index, false); }

/* y[r, i] = sum_j x[r, j] * w[ids[r, i], j], fp32; x[rows, in], w[n, in], ids[rows, k]. False, and
 * nothing done, if an id is not below n. */
EXPORT bool idlm_score(int half, const void *x, const void *w, const int64_t *ids, float *y,
                       int64_t rows, int64_t n, int64_t k, int64_t in, int64_t threads) {
    for (int64_t i = 0; i < rows * k; i++)
        if (ids[i] < 0 || ids[i] >= n) return false;
    const Score a = {x, w, ids, y, n, k, in};
    parallel_for(half ? score_task_bf16 : score_task_fp32, &a, rows * ceil_div(k, SCORED),
                 useful_threads(threads, rows * k * in / VL));
    return true;
}

/* ---- sampler head --------------------------------------------------------------------------- */

/* Structures as in cpu_kernels.py; all tensors are dense. */
typedef struct {
    const void *state_norm, *from_state, *out;
} HeadBlock;

typedef struct {
    int64_t half, threads, batch, places, depth, hidden, width, vocabulary, candidates;
    float eps;
    const HeadBlock *block;
    const void *from_hidden, *hidden_bias, *token_norm, *from_token, *embedding, *output;
    const void *h;        /* [batch, places, hidden] */
    const int64_t *first; /* [batch]: the tokens before the first place */
    const int64_t *ids;   /* [batch, places, candidates] */
    int64_t *tokens;      /* [batch, places], written */
} Chain;

static void head_product(const Chain *c, const void *x, int64_t rows, int64_t in, const void *w,
                         const void *bias, void *y, int64_t out, int64_t y_row, bool accumulate) {
    Linear a = {.x = x, .w = w, .bias = bias, .y = y, .rows = rows, .inner = rows, .x_row = in,
                .y_row = y_row, .in = in, .out = out, .accumulate = accumulate};
    linear(&a, NULL, c->half, c->threads);
}

static void add_rows(bool half, const char *a, const char *b, char *y, int64_t n) {
    const int64_t size = half ? 2 : 4;
    for (int64_t i = 0; i < n; i += VL)
        store_vector(y + i * size, half, n - i, load_vector(a + i * size, half, n - i) +
                                                    load_vector(b + i * size, half, n - i));
}

/* The likeliest chain of candidates: each place's token is the best under the head's state, which
 * has seen the one before. False, and nothing done, if a token or candidate is not in the
 * vocabulary or memory is short. */
EXPORT bool idlm_greedy_chain(const Chain *c) {
    const int64_t size = c->half ? 2 : 4, B = c->batch, M = c->places, H = c->hidden;
    const int64_t K = c->candidates, W = c->depth * 2 * c->width; /* of all blocks' inputs */
    for (int64_t i = 0; i < B * M * K; i++)
        if (c->ids[i] < 0 || c->ids[i] >= c->vocabulary) return false;
    for (int64_t b = 0; b < B; b++)
        if (c->first[b] < 0 || c->first[b] >= c->vocabulary) return false;
    const int64_t rows = B * M * W + B * (W + 3 * H + c->width);
    char *projected = calloc((size_t)(rows * size + B * K * 4), 1);
    if (!projected) return false;
    char *given = projected + B * M * W * size, *state = given + B * W * size;
    char *row = state + B * H * size, *normed = row + B * H * size, *act = normed + B * H * size;
    float *scores = (float *)(act + B * c->width * size);
    head_product(c, c->h, B * M, H, c->from_hidden, c->hidden_bias, projected, W, W, false);
    for (int64_t j = 0; j < M; j++) {
        for (int64_t b = 0; b < B; b++) {
            const int64_t token = j ? c->tokens[b * M + j - 1] : c->first[b];
            memcpy(row + b * H * size, (const char *)c->embedding + token * H * size, H * size);
            memcpy(given + b * W * size, projected + (b * M + j) * W * size, W * size);
        }
        idlm_rms_norm((int)c->half, row, c->token_norm, normed, B, H, c->eps, c->threads);
        head_product(c, normed, B, H, c->from_token, NULL, given, W, W, true);
        for (int64_t d = 0; d < c->depth; d++) {
            char *part = given + d * 2 * c->width * size;
            const HeadBlock *block = c->block + d;
            idlm_rms_norm((int)c->half, state, block->state_norm, normed, B, H, c->eps, c->threads);
            head_product(c, normed, B, H, block->from_state, NULL, part, 2 * c->width, W, true);
            silu_mul((RowWise){.x = part, .y = act, .rows = B, .heads = 1, .x_row = W,
                               .y_row = c->width, .width = c->width},
                     c->half, c->threads);
            head_product(c, act, B, c->width, block->out, NULL, state, H, H, true);
        }
        for (int64_t b = 0; b < B; b++) {
            const int64_t at = (b * M + j) * K;
            const char *h = (const char *)c->h + (b * M + j) * H * size;
            add_rows(c->half, h, state + b * H * size, row, H);
            idlm_score((int)c->half, row, c->output, c->ids + at, scores, 1, c->vocabulary, K, H,
                       c->threads);
            int64_t best;
            idlm_argmax(false, scores, &best, 1, K, c->threads);
            c->tokens[b * M + j] = c->ids[at + best];
        }
    }
    free(projected);
    return true;
}
