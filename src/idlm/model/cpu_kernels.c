/* CPU kernels of the decode hot path: linear layers, attention and the small operators between.
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

/* Widen row r of a tile of `rows` rows to fp32, group by group in the order of load_part,
 * zero-padded. The groups of the rows alternate, so that the inner loop reads one dense stream. */
INLINE void pack_row(float *tile, int64_t rows, int64_t r, const char *src, bool half, int64_t n) {
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
            memcpy(tile + g * rows + r * GROUP + part * VL, &v, sizeof v);
        }
    }
}

INLINE void dot_step(vf acc[RB][OB], const int rows, bool half, const float *x,
                     const char *w, int64_t w_stride) {
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
        vf wv[OB];
#pragma GCC unroll 8
        for (int o = 0; o < OB; o++) wv[o] = load_part(w + o * w_stride, half, part);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const vf xv = vload(x + r * GROUP + part * VL);
#pragma GCC unroll 8
            for (int o = 0; o < OB; o++) acc[r][o] = vfma(xv, wv[o], acc[r][o]);
        }
        /* Read the weights again for the second half instead of keeping them: registers are the
         * scarce resource here. */
        __asm__ volatile("" ::: "memory");
    }
}

/* out[r * out_stride + o] = the dot product of row r of the packed tile with weight row o. */
INLINE void dot_block(float *out, int64_t out_stride, const int rows, bool half, const float *x,
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
        dot_step(acc, rows, half, x + g * rows * GROUP, p, w_stride);
    }
    const int64_t rest = n - full * GROUP;
    if (rest) {
        char tail[OB][GROUP * 4] = {{0}};
        for (int o = 0; o < OB; o++)
            memcpy(tail[o], w + o * w_stride + full * group_bytes, rest * (half ? 2 : 4));
        dot_step(acc, rows, half, x + full * rows * GROUP, tail[0], sizeof tail[0]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const v4f sums = reduce4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
        memcpy(out + r * out_stride, &sums, sizeof sums);
    }
}

/* Call CALL(n) with n = rows as a compile-time constant, 1 <= rows <= RB. */
#define DISPATCH_ROWS(rows, CALL)            \
    switch (rows) {                          \
        case 1: CALL(1); break;              \
        case 2: CALL(2); break;              \
        case 3: if (RB >= 3) CALL(3); break; \
        case 4: if (RB >= 4) CALL(4); break; \
        case 5: if (RB >= 5) CALL(5); break; \
        case 6: if (RB >= 6) CALL(6); break; \
    }

#define DEFINE_DOT(NAME)                                                                     \
    static void NAME(float *out, int64_t os, int rows, const float *x, const char *w,        \
                     int64_t ws, int64_t n, int64_t ahead, int phase, int period) {          \
        DISPATCH_ROWS(rows, NAME##_call)                                                     \
    }
#define dot_bf16_call(R) dot_block(out, os, R, true, x, w, ws, n, ahead, phase, period)
#define dot_fp32_call(R) dot_block(out, os, R, false, x, w, ws, n, ahead, phase, period)
DEFINE_DOT(dot_bf16)
DEFINE_DOT(dot_fp32)

/* ---- linear --------------------------------------------------------------------------------- */

typedef struct {
    const char *x, *w, *bias;
    char *y;
    /* Row r is row r % inner of batch r / inner; strides in elements. */
    int64_t rows, inner, x_batch, x_row, y_batch, y_row;
    int64_t in, out, row_block, out_block, out_tasks;
    bool accumulate;
} Linear;

#define W_CHUNK 16 /* weight rows that stay in cache while all row tiles pass over them */

INLINE void linear_task(const Linear *a, int64_t index, bool half) {
    const int64_t size = half ? 2 : 4;
    const int64_t row0 = index / a->out_tasks * a->row_block;
    const int64_t rows = min64(a->row_block, a->rows - row0);
    const int64_t begin = index % a->out_tasks * a->out_block;
    const int64_t end = min64(a->out, begin + a->out_block);
    const int64_t xs = padded(a->in), tiles = ceil_div(rows, RB), w_stride = a->in * size;
    float *x = scratch(rows * (xs * sizeof(float) + sizeof(char *)));
    char **y = (char **)(x + rows * xs);
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
        for (int64_t r = r0; r < r1; r++) {
            const int64_t b = (row0 + r) / a->inner, i = (row0 + r) % a->inner;
            const char *src = a->x + (b * a->x_batch + i * a->x_row) * size;
            pack_row(x + r0 * xs, r1 - r0, r - r0, src, half, a->in);
            y[r] = a->y + (b * a->y_batch + i * a->y_row) * size;
        }
    }

    /* All row tiles pass over one chunk of weights; each pass prefetches its share of the next. */
    for (int64_t chunk = begin; chunk < end; chunk += W_CHUNK) {
        const int64_t chunk_end = min64(end, chunk + W_CHUNK);
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
            for (int64_t o = chunk, n; o < chunk_end; o += n) {
                n = chunk_end - o < OB ? 1 : OB; /* the last outputs go one by one: stride 0 */
                v4f sums[RB];
                (half ? dot_bf16 : dot_fp32)((float *)sums, OB, (int)(r1 - r0), x + r0 * xs,
                                             a->w + o * w_stride, n == OB ? w_stride : 0, a->in,
                                             W_CHUNK * w_stride, (int)t, (int)tiles);
                v4f bias = {0};
                if (a->bias) bias = load4(a->bias + o * size, half, n);
                for (int64_t r = r0; r < r1; r++) {
                    v4f v = sums[r - r0] + bias;
                    if (a->accumulate) v += load4(y[r] + o * size, half, n);
                    store4(y[r] + o * size, half, n, v);
                }
            }
        }
    }
}

static void linear_task_bf16(const void *a, int64_t index) { linear_task(a, index, true); }
static void linear_task_fp32(const void *a, int64_t index) { linear_task(a, index, false); }

/* y[r, o] = sum_i x[r, i] * w[o, i] (+ bias[o]) (+ y[r, o] if accumulate), rounded once. */
EXPORT void idlm_linear(int half, const void *x, int64_t x_batch, int64_t x_row, const void *w,
                        const void *bias, void *y, int64_t y_batch, int64_t y_row, int64_t rows,
                        int64_t inner, int64_t in, int64_t out, int accumulate, int64_t threads) {
    if (rows == 0 || out == 0) return;
    const int64_t budget = 384 * 1024; /* bytes of packed rows: they stay in the L2 cache */
    Linear a = {.x = x, .w = w, .bias = bias, .y = y, .rows = rows, .inner = inner,
                .x_batch = x_batch, .x_row = x_row, .y_batch = y_batch, .y_row = y_row,
                .in = in, .out = out, .accumulate = accumulate};
    threads = useful_threads(threads, (1 + rows / 2) * in * out / VL);
    a.row_block = min64(rows, max64(RB, budget / ((in + GROUP) * 4) / RB * RB));
    a.out_block = max64(W_CHUNK, ceil_div(ceil_div(out, threads * 2), OB) * OB);
    a.out_tasks = ceil_div(out, a.out_block);
    parallel_for(half ? linear_task_bf16 : linear_task_fp32, &a,
                 ceil_div(rows, a.row_block) * a.out_tasks, threads);
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

#define VB 4 /* vectors of values that are mixed together */

/* o[r, 0 : count * VL] += sum_j p[r][j] * v[j, :], in the order of j. With count == VB whole groups
 * in the order of load_part, with count == 1 the first n <= VL elements in their own order. */
INLINE void mix_block(const int rows, const int count, bool half, float *o, int64_t o_stride,
                      const float *const *p, const char *v, int64_t v_stride, int64_t keys,
                      int64_t n) {
    vf acc[RB][VB];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) acc[r][i] = vload(o + r * o_stride + i * VL);
    for (int64_t j = 0; j < keys; j++) {
        const char *vj = v + j * v_stride;
        vf vv[VB];
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            vv[i] = count == 1 ? load_vector(vj, half, n)
                               : load_part(vj + i / 2 * GROUP * (half ? 2 : 4), half, i % 2);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const vf weight = (vf){0} + p[r][j];
#pragma GCC unroll 8
            for (int i = 0; i < count; i++) acc[r][i] = vfma(weight, vv[i], acc[r][i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            memcpy(o + r * o_stride + i * VL, &acc[r][i], sizeof(vf));
}

/* Elements of a value that mix handles as whole groups; the rest goes vector by vector. */
INLINE int64_t grouped(int64_t head_dim) { return head_dim / (VB * VL) * (VB * VL); }

INLINE void mix(int rows, bool half, int64_t head_dim, float *o, int64_t o_stride,
                const float *const *p, const char *v, int64_t v_stride, int64_t keys) {
    const int64_t size = half ? 2 : 4, middle = grouped(head_dim);
    for (int64_t d = 0; d < middle; d += VB * VL) {
#define MIX_GROUPS(R) mix_block(R, VB, half, o + d, o_stride, p, v + d * size, v_stride, keys, VL)
        DISPATCH_ROWS(rows, MIX_GROUPS)
    }
    for (int64_t d = middle; d < head_dim; d += VL) {
        const int64_t n = min64(VL, head_dim - d);
#define MIX_VECTOR(R) mix_block(R, 1, half, o + d, o_stride, p, v + d * size, v_stride, keys, n)
        DISPATCH_ROWS(rows, MIX_VECTOR)
    }
}

static void mix_bf16(int rows, int64_t d, float *o, int64_t os, const float *const *p,
                     const char *v, int64_t vs, int64_t keys) {
    mix(rows, true, d, o, os, p, v, vs, keys);
}

static void mix_fp32(int rows, int64_t d, float *o, int64_t os, const float *const *p,
                     const char *v, int64_t vs, int64_t keys) {
    mix(rows, false, d, o, os, p, v, vs, keys);
}

typedef struct {
    const char *q, *k, *v;
    char *out;
    /* Strides in elements; the last dimension is dense. */
    int64_t q_batch, q_row, q_head, kv_batch, kv_head, kv_row;
    const int64_t *start, *positions;
    const uint8_t *visible;
    int64_t rows, kv_heads, group, head_dim, cache_length, window, tile, tiles;
    float scale;
} Attention;

/* seen[j], bit i: does row row[i] of request b see key j? Zero for OB keys after the last. */
INLINE void mark_visible(const Attention *a, int64_t b, const int64_t *row, int rows,
                         uint8_t *seen) {
    const int64_t start = a->start[b], R = a->rows;
    const int64_t *positions = a->positions + b * R;
    memset(seen, 0, start + R + OB);
    for (int i = 0; i < rows; i++) {
        const uint8_t bit = (uint8_t)(1u << i), *visible = a->visible + (b * R + row[i]) * R;
        const int64_t first = a->window ? max64(0, positions[row[i]] - a->window + 1) : 0;
        for (int64_t j = first; j < start; j++) seen[j] |= bit;
        for (int64_t c = 0; c < R; c++)
            if (!a->window || positions[c] >= first) seen[start + c] |= visible[c] ? bit : 0;
    }
}

/* One tile: up to RB of the rows * group query rows that share a KV head.
 *
 * A row's scores are stored without gaps, so that its sums run over the keys it sees, in order,
 * and do not depend on what lies between them. */
INLINE void attention_task(const Attention *a, int64_t index, bool half) {
    const int64_t size = half ? 2 : 4, D = a->head_dim;
    const int64_t b = index / a->tiles / a->kv_heads, head = index / a->tiles % a->kv_heads;
    const int64_t m0 = index % a->tiles * a->tile;
    const int rows = (int)min64(a->tile, a->rows * a->group - m0);
    const int64_t keys = a->start[b] + a->rows;
    const int64_t kv_offset = (b * a->kv_batch + head * a->kv_head) * size;
    const char *k = a->k + kv_offset, *v = a->v + kv_offset;
    const int64_t stride = a->kv_row * size;

    const int64_t qs = padded(D), ss = ceil_div(keys + OB, VL) * VL + VL;
    float *q = scratch(rows * (2 * qs + ss) * sizeof(float) + keys + OB);
    float *o = q + rows * qs, *s = o + rows * qs;
    uint8_t *seen = (uint8_t *)(s + rows * ss);
    int64_t row[RB], count[RB] = {0};
    for (int i = 0; i < rows; i++) {
        row[i] = (m0 + i) / a->group;
        const int64_t offset = b * a->q_batch + row[i] * a->q_row +
                               (head * a->group + (m0 + i) % a->group) * a->q_head;
        pack_row(q, rows, i, a->q + offset * size, half, D);
    }
    memset(o, 0, rows * qs * sizeof(float));
    mark_visible(a, b, row, rows, seen);
    const uint8_t all = (uint8_t)((1u << rows) - 1);
    bool even = true; /* all rows have seen the same number of keys so far */

    for (int64_t j = 0, n; j < keys; j += n) {
        n = j + OB <= a->cache_length ? OB : 1; /* may read dead keys after the last one */
        uint32_t any;
        memcpy(&any, seen + j, sizeof any);
        if (!any) continue;
        /* Straight to their places if all rows see the block and have seen as many keys. */
        const bool direct = even && n == OB && any == all * 0x01010101u;
        float block[RB * OB];
        (half ? dot_bf16 : dot_fp32)(direct ? s + count[0] : block, direct ? ss : OB, rows, q,
                                     k + j * stride, n == OB ? stride : 0, D, 2 * OB * stride, 0,
                                     1);
        if (direct) {
            for (int i = 0; i < rows; i++) count[i] += OB;
            continue;
        }
        for (int64_t c = 0; c < n; c++)
            for (int i = 0; i < rows; i++)
                if (seen[j + c] >> i & 1) s[i * ss + count[i]++] = block[i * OB + c];
        even = true;
        for (int i = 1; i < rows; i++) even &= count[i] == count[0];
    }

    float scale[RB];
    const float *p[RB];
    for (int i = 0; i < rows; i++) {
        scale[i] = softmax(s + i * ss, count[i], a->scale);
        p[i] = s + i * ss;
    }

    /* A run of keys that all rows see is mixed as one; other keys row by row. */
    for (int64_t j = 0, n; j < keys; j += n) {
        const char *vj = v + j * stride;
        for (n = 0; j + n < keys && seen[j + n] == all; n++) continue;
        if (n) {
            (half ? mix_bf16 : mix_fp32)(rows, D, o, qs, p, vj, stride, n);
            for (int i = 0; i < rows; i++) p[i] += n;
            continue;
        }
        n = 1;
        for (int i = 0; i < rows; i++)
            if (seen[j] >> i & 1) {
                (half ? mix_bf16 : mix_fp32)(1, D, o + i * qs, qs, p + i, vj, stride, 1);
                p[i]++;
            }
    }

    const int64_t heads = a->kv_heads * a->group;
    for (int i = 0; i < rows; i++) {
        const int64_t h = head * a->group + (m0 + i) % a->group;
        char *out = a->out + ((b * a->rows + row[i]) * heads + h) * D * size;
        const float *oi = o + i * qs;
        for (int64_t d = 0; d < grouped(D); d += GROUP)
            store_group(out + d * size, half, vload(oi + d) * scale[i],
                        vload(oi + d + VL) * scale[i]);
        for (int64_t d = grouped(D); d < D; d += VL)
            store_vector(out + d * size, half, D - d, vload(oi + d) * scale[i]);
    }
}

static void attention_task_bf16(const void *a, int64_t index) { attention_task(a, index, true); }
static void attention_task_fp32(const void *a, int64_t index) { attention_task(a, index, false); }

/* Attention of in-flight rows over a KV cache; see cpu_kernels.py for the shapes. `out` is dense,
 * window 0 means none. False, and nothing done, if the rows do not fit into the cache. */
EXPORT bool idlm_attention(int half, const void *q, int64_t q_batch, int64_t q_row, int64_t q_head,
                           const void *k, const void *v, int64_t kv_batch, int64_t kv_head,
                           int64_t kv_row, void *out, const int64_t *start,
                           const uint8_t *visible, const int64_t *positions, int64_t batch,
                           int64_t rows, int64_t kv_heads, int64_t group, int64_t head_dim,
                           int64_t cache_length, float scale, int64_t window, int64_t threads) {
    Attention a = {.q = q, .k = k, .v = v, .out = out, .q_batch = q_batch, .q_row = q_row,
                   .q_head = q_head, .kv_batch = kv_batch, .kv_head = kv_head, .kv_row = kv_row,
                   .start = start, .positions = positions, .visible = visible, .rows = rows,
                   .kv_heads = kv_heads, .group = group, .head_dim = head_dim,
                   .cache_length = cache_length, .window = window, .scale = scale};
    if (rows == 0) return true;
    int64_t keys = 0;
    for (int64_t b = 0; b < batch; b++) {
        if (start[b] < 0 || start[b] + rows > cache_length) return false;
        keys += start[b] + rows;
    }
    threads = useful_threads(threads, keys * rows * kv_heads * group * head_dim * 2 / VL);
    /* Few rows: smaller tiles, so that there is work for every thread. */
    const int64_t all_rows = batch * kv_heads * rows * group;
    a.tile = max64(1, min64(RB, ceil_div(all_rows, 4 * threads)));
    a.tiles = ceil_div(rows * group, a.tile);
    parallel_for(half ? attention_task_bf16 : attention_task_fp32, &a,
                 batch * kv_heads * a.tiles, threads);
    return true;
}

/* Copy the in-flight rows [batch, rows, heads, width] to the cache, row r of request b to index
 * start[b] + r. Strides in elements; false, and nothing done, if the rows do not fit. */
EXPORT bool idlm_append(int half, const void *x, int64_t x_batch, int64_t x_row, int64_t x_head,
                        void *cache, int64_t batch_stride, int64_t head_stride,
                        int64_t row_stride, const int64_t *start, int64_t batch, int64_t rows,
                        int64_t heads, int64_t width, int64_t cache_length) {
    const int64_t size = half ? 2 : 4;
    for (int64_t b = 0; b < batch; b++)
        if (start[b] < 0 || start[b] + rows > cache_length) return false;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t h = 0; h < heads; h++)
                memcpy((char *)cache + (b * batch_stride + h * head_stride +
                                        (start[b] + r) * row_stride) * size,
                       (const char *)x + (b * x_batch + r * x_row + h * x_head) * size,
                       (size_t)(width * size));
    return true;
}

/* ---- small operators ------------------------------------------------------------------------ */

/* The operand x[n0, n1, n2, width] by its strides; results are dense. Row i is row (i / n2 / n1,
 * i / n2 % n1, i % n2). */
typedef struct {
    const char *x, *a, *b;
    char *y;
    int64_t n1, n2, stride0, stride1, stride2, rows, width, block;
    float eps;
} RowWise;

INLINE const char *row_address(const RowWise *op, int64_t i, int64_t size) {
    const int64_t outer = i / op->n2;
    return op->x + (outer / op->n1 * op->stride0 + outer % op->n1 * op->stride1 +
                    i % op->n2 * op->stride2) * size;
}

/* a: weight[width] */
INLINE void rms_norm_row(const RowWise *op, int64_t i, bool half) {
    const int64_t size = half ? 2 : 4, n = op->width;
    const char *x = row_address(op, i, size);
    char *y = op->y + i * n * size;
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

/* a, b: cosines and signed sines [n0 * n1, width] */
INLINE void rotate_row(const RowWise *op, int64_t i, bool half) {
    const int64_t size = half ? 2 : 4, n = op->width / 2, far = n * size;
    const char *x = row_address(op, i, size);
    char *y = op->y + i * 2 * far;
    const char *cosine = op->a + i / op->n2 * 2 * far, *sine = op->b + i / op->n2 * 2 * far;
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

/* x: gate and up side by side [rows, 2 * width] */
INLINE void silu_mul_row(const RowWise *op, int64_t i, bool half) {
    const int64_t size = half ? 2 : 4, n = op->width;
    const char *gate = row_address(op, i, size), *up = gate + n * size;
    char *y = op->y + i * n * size;
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
    static void NAME##_task_bf16(const void *args, int64_t index) {                               \
        const RowWise *op = args;                                                                 \
        const int64_t end = min64(op->rows, (index + 1) * op->block);                             \
        for (int64_t i = index * op->block; i < end; i++) NAME##_row(op, i, true);                \
    }                                                                                             \
    static void NAME##_task_fp32(const void *args, int64_t index) {                               \
        const RowWise *op = args;                                                                 \
        const int64_t end = min64(op->rows, (index + 1) * op->block);                             \
        for (int64_t i = index * op->block; i < end; i++) NAME##_row(op, i, false);               \
    }                                                                                             \
    EXPORT void idlm_##NAME(int half, const void *x, int64_t stride0, int64_t stride1,            \
                            int64_t stride2, const void *a, const void *b, void *y, int64_t n0,   \
                            int64_t n1, int64_t n2, int64_t width, float eps, int64_t threads) {  \
        const int64_t rows = n0 * n1 * n2;                                                        \
        if (rows == 0) return;                                                                    \
        threads = useful_threads(threads, rows * width * 16 / VL);                                \
        RowWise op = {x, a, b, y, n1, n2, stride0, stride1, stride2, rows, width, 0, eps};        \
        op.block = max64(1, ceil_div(rows, 2 * threads));                                         \
        parallel_for(half ? NAME##_task_bf16 : NAME##_task_fp32, &op, ceil_div(rows, op.block),   \
                     threads);                                                                    \
    }
DEFINE_ROW_WISE(rms_norm)
DEFINE_ROW_WISE(rotate)
DEFINE_ROW_WISE(silu_mul)
