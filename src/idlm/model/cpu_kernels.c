/* CPU kernels of the decode hot path: linear layers.
 *
 * Every kernel is row-invariant: a row's result is bitwise the same whatever else is in the call,
 * because one (row, output) pair is always reduced by one vector accumulator, in index order, and
 * then by one fixed tree. Blocking over rows, outputs and threads only chooses what is computed
 * together, never the order of a sum.
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
#elif defined(__AVX2__) && defined(__FMA__)
#define VL 8
#else
#define VL 4
#endif
#define GROUP (2 * VL) /* elements of a weight row that one step of the inner loop consumes */
#define OB 4           /* outputs (weight rows) of a register block */
#if VL == 16
#define RB 6 /* rows of a register block: RB * OB accumulators must fit the register file */
#elif defined(__aarch64__)
#define RB 5
#else
#define RB 2
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef float v4f __attribute__((vector_size(16)));
typedef uint32_t v4u __attribute__((vector_size(16)));
typedef uint16_t v4h __attribute__((vector_size(8)));

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

/* Half `part` (0, 1) of a group of 2 * VL elements at p as fp32. Of bf16 data these are the even
 * and the odd elements (one shift, one mask), so the other operand is stored in that order too. */
INLINE vf load_part(const char *p, bool half, int part) {
    if (!half) return vload(p + part * sizeof(vf));
    vu raw;
    memcpy(&raw, p, sizeof raw);
    return part ? (vf)(raw & 0xffff0000u) : (vf)(raw << 16);
}

/* n <= 4 elements at p as fp32, zero-padded. */
INLINE v4f load4(const char *p, bool half, int64_t n) {
    if (half) {
        uint16_t h[4] = {0};
        if (n == 4)
            memcpy(h, p, 8);
        else
            memcpy(h, p, n * 2);
        const v4u u = {h[0], h[1], h[2], h[3]};
        return (v4f)(u << 16);
    }
    v4f v = {0};
    if (n == 4)
        memcpy(&v, p, 16);
    else
        memcpy(&v, p, n * 4);
    return v;
}

/* Store n <= 4 elements; to bf16 by rounding to nearest even (NaN stays NaN). */
INLINE void store4(char *p, bool half, int64_t n, v4f v) {
    if (half) {
        const v4u u = (v4u)v, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        const v4u nan = (v4u)(v != v), bits = (rounded & ~nan) | (0x7fc0u & nan);
        const v4h h = __builtin_convertvector(bits, v4h);
        if (n == 4)
            memcpy(p, &h, 8);
        else
            memcpy(p, &h, n * 2);
    } else if (n == 4) {
        memcpy(p, &v, 16);
    } else {
        memcpy(p, &v, n * 4);
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

/* Widen n elements to fp32 in the order load_part yields, zero-padded to whole groups. */
INLINE void pack_row(float *dst, const char *src, bool half, int64_t n) {
    const int64_t group_bytes = GROUP * (half ? 2 : 4), full = n / GROUP;
    for (int64_t g = 0; g < full; g++)
        for (int part = 0; part < 2; part++) {
            vf v = load_part(src + g * group_bytes, half, part);
            memcpy(dst + g * GROUP + part * VL, &v, sizeof v);
        }
    const int64_t rest = n - full * GROUP;
    if (!rest) return;
    char tail[GROUP * 4] = {0};
    memcpy(tail, src + full * group_bytes, rest * (half ? 2 : 4));
    for (int part = 0; part < 2; part++) {
        vf v = load_part(tail, half, part);
        memcpy(dst + full * GROUP + part * VL, &v, sizeof v);
    }
}

INLINE void dot_step(vf acc[RB][OB], const int rows, bool half, const float *x, int64_t x_stride,
                     const char *w, int64_t w_stride) {
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
        vf wv[OB];
#pragma GCC unroll 8
        for (int o = 0; o < OB; o++) wv[o] = load_part(w + o * w_stride, half, part);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const vf xv = vload(x + r * x_stride + part * VL);
#pragma GCC unroll 8
            for (int o = 0; o < OB; o++) acc[r][o] = vfma(xv, wv[o], acc[r][o]);
        }
        /* Read the weights again for the second half instead of keeping them: registers are the
         * scarce resource here. */
        __asm__ volatile("" ::: "memory");
    }
}

/* out[r] = the dot products of packed row r with the four weight rows. */
INLINE void dot_block(v4f out[RB], const int rows, bool half, const float *x, int64_t x_stride,
                      const char *w, int64_t w_stride, int64_t n, int64_t ahead, int phase,
                      int period) {
    const int64_t group_bytes = GROUP * (half ? 2 : 4), full = n / GROUP;
    vf acc[RB][OB];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int o = 0; o < OB; o++) acc[r][o] = (vf){0};
    for (int64_t g = 0; g < full; g++) {
        const char *p = w + g * group_bytes;
        if (--phase < 0) {
            phase += period;
#pragma GCC unroll 8
            for (int o = 0; o < OB; o++)
                for (int64_t line = 0; line < group_bytes; line += 64)
                    __builtin_prefetch(p + ahead + o * w_stride + line, 0, 2);
        }
        dot_step(acc, rows, half, x + g * GROUP, x_stride, p, w_stride);
    }
    const int64_t rest = n - full * GROUP;
    if (rest) {
        char tail[OB][GROUP * 4] = {{0}};
        for (int o = 0; o < OB; o++)
            memcpy(tail[o], w + o * w_stride + full * group_bytes, rest * (half ? 2 : 4));
        dot_step(acc, rows, half, x + full * GROUP, x_stride, tail[0], sizeof tail[0]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) out[r] = reduce4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

/* Call CALL(n) with n = rows as a compile-time constant, 1 <= rows <= RB. */
#define DISPATCH_ROWS(rows, CALL)        \
    switch (rows) {                      \
        case 1: CALL(1); break;          \
        case 2: CALL(2); break;          \
        case 3: if (RB >= 3) CALL(3); break; \
        case 4: if (RB >= 4) CALL(4); break; \
        case 5: if (RB >= 5) CALL(5); break; \
        case 6: if (RB >= 6) CALL(6); break; \
    }

#define DEFINE_DOT(NAME)                                                             \
    static void NAME(v4f *out, int rows, const float *x, int64_t xs, const char *w,        \
                     int64_t ws, int64_t n, int64_t ahead, int phase, int period) {        \
        DISPATCH_ROWS(rows, NAME##_call)                                                   \
    }
#define dot_bf16_call(R) dot_block(out, R, true, x, xs, w, ws, n, ahead, phase, period)
#define dot_fp32_call(R) dot_block(out, R, false, x, xs, w, ws, n, ahead, phase, period)
DEFINE_DOT(dot_bf16)
DEFINE_DOT(dot_fp32)

/* ---- linear --------------------------------------------------------------------------------- */

typedef struct {
    const char *x, *w, *bias;
    char *y;
    int64_t ldx, ldy, rows, in, out;
    int64_t row_block, out_block, out_tasks;
    bool half, accumulate;
} Linear;

#define W_CHUNK 32 /* weight rows that stay in cache while all row tiles pass over them */

INLINE void linear_task(const Linear *a, int64_t index, bool half) {
    const int64_t size = half ? 2 : 4;
    const int64_t row0 = index / a->out_tasks * a->row_block;
    const int64_t rows = min64(a->row_block, a->rows - row0);
    const int64_t begin = index % a->out_tasks * a->out_block;
    const int64_t end = min64(a->out, begin + a->out_block);
    const int64_t xs = ceil_div(a->in, GROUP) * GROUP + VL; /* + VL: rows in different cache sets */
    float *x = scratch(rows * xs * sizeof(float));
    for (int64_t r = 0; r < rows; r++)
        pack_row(x + r * xs, a->x + (row0 + r) * a->ldx * size, half, a->in);

    /* All row tiles pass over one chunk of weights; each pass prefetches its share of the next. */
    const int64_t tiles = ceil_div(rows, RB), row_bytes = a->in * size;
    for (int64_t chunk = begin; chunk < end; chunk += W_CHUNK) {
        const int64_t chunk_end = min64(end, chunk + W_CHUNK);
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
            for (int64_t o = chunk, n; o < chunk_end; o += n) {
                n = chunk_end - o < OB ? 1 : OB; /* the last outputs go one by one: stride 0 */
                v4f sums[RB];
                (half ? dot_bf16 : dot_fp32)(sums, (int)(r1 - r0), x + r0 * xs, xs,
                                             a->w + o * row_bytes, n == OB ? row_bytes : 0, a->in,
                                             W_CHUNK * row_bytes, (int)t, (int)tiles);
                v4f bias = {0};
                if (a->bias) bias = load4(a->bias + o * size, half, n);
                for (int64_t r = r0; r < r1; r++) {
                    char *y = a->y + ((row0 + r) * a->ldy + o) * size;
                    v4f v = sums[r - r0] + bias;
                    if (a->accumulate) v += load4(y, half, n);
                    store4(y, half, n, v);
                }
            }
        }
    }
}

static void linear_task_bf16(const void *a, int64_t index) { linear_task(a, index, true); }
static void linear_task_fp32(const void *a, int64_t index) { linear_task(a, index, false); }

/* y[r, o] = sum_i x[r, i] * w[o, i] (+ bias[o]) (+ y[r, o] if accumulate); half: bf16, else fp32. */
EXPORT void idlm_linear(int half, const void *x, int64_t ldx, const void *w, const void *bias,
                        void *y, int64_t ldy, int64_t rows, int64_t in, int64_t out,
                        int accumulate, int64_t threads) {
    const int64_t budget = 384 * 1024; /* bytes of packed rows: they stay in the L2 cache */
    const int64_t row_bytes = (in + GROUP) * 4;
    Linear a = {x, w, bias, y, ldx, ldy, rows, in, out, 0, 0, 0, half, accumulate};
    a.row_block = min64(rows, max64(RB, budget / row_bytes / RB * RB));
    const int64_t row_tasks = ceil_div(rows, a.row_block);
    a.out_block = max64(W_CHUNK, ceil_div(ceil_div(out, threads * 4), OB) * OB);
    a.out_tasks = ceil_div(out, a.out_block);
    parallel_for(half ? linear_task_bf16 : linear_task_fp32, &a, row_tasks * a.out_tasks, threads);
}
