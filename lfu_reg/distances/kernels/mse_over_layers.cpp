// The squared difference over layers on a CPU, for one pair of dtypes; `mse_compile.py` compiles it when asked to.
//
// In front of this file come
//   enum COLUMN { ..., WIDTH };                the columns of the table of layers, `mse_layout.FIELDS`
//   #define CLEAN_TYPE, PERTURBED_TYPE, WIDE   element types of h and h', and the type to compute in
//
// It reads the same table as the Triton kernels: one row of int64 numbers per layer. Elements are widened, subtracted,
// squared and added in registers. Blocks are added in double precision, in an order that does not depend on the number
// of threads.

#include <stdlib.h>

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;
struct bfloat { u16 bits; };
#ifdef USES_HALF  // not every compiler has it
typedef _Float16 half;
#endif

typedef CLEAN_TYPE A;      // of h
typedef PERTURBED_TYPE B;  // of h'
typedef WIDE W;

enum { LANES = 16 };
#define VECTOR(T) T __attribute__((vector_size(LANES * sizeof(T))))
typedef VECTOR(float) vfloat;
typedef VECTOR(W) vwide;

template <class T> static inline T get(const void *at) { T x; __builtin_memcpy(&x, at, sizeof x); return x; }
template <class T> static inline void put(void *at, T x) { __builtin_memcpy(at, &x, sizeof x); }

// ---------------------------------------------------------------------- loads and stores: one element, or LANES of them

static inline float widen(bfloat x) { u32 bits = (u32)x.bits << 16; return get<float>(&bits); }
template <class T> static inline T widen(T x) { return x; }

static inline bfloat to_bfloat(float x) {  // to the nearest, ties to even; NaN stays NaN
  u32 bits = get<u32>(&x);
  u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bfloat{(u16)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
static inline void store(bfloat *at, W x) { *at = to_bfloat((float)x); }
template <class T> static inline void store(T *at, W x) { *at = (T)x; }

template <class T> static inline vwide load_lanes(const T *at) {
  typedef VECTOR(T) vector;
  return __builtin_convertvector(get<vector>(at), vwide);
}
static inline vwide load_lanes(const bfloat *at) {
  typedef VECTOR(u16) vu16;
  typedef VECTOR(u32) vu32;
  return __builtin_convertvector((vfloat)(__builtin_convertvector(get<vu16>(at), vu32) << 16), vwide);
}
template <class T> static inline void store_lanes(T *at, vwide x) {
  typedef VECTOR(T) vector;
  put(at, __builtin_convertvector(x, vector));
}
static inline void store_lanes(bfloat *at, vwide x) {
  typedef VECTOR(u16) vu16;
  typedef VECTOR(u32) vu32;
  vu32 bits = (vu32)__builtin_convertvector(x, vfloat);
  vu32 nan = (vu32)((bits & 0x7fffffffu) > 0x7f800000u);
  vu32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  put(at, __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), vu16));
}

// ---------------------------------------------------------------------- a run of n elements with given strides

static inline vwide difference(const A *h, const B *p) { return load_lanes(p) - load_lanes(h); }

static double squares(const A *h, i64 h_step, const B *p, i64 p_step, i64 n) {
  double total = 0;
  i64 i = 0;
  if (h_step == 1 && p_step == 1)
    while (n - i >= LANES) {
      i64 end = n - i < 4096 ? n - (n - i) % LANES : i + 4096;  // few enough for the digits of a float
      vwide sums[4] = {};
      for (; end - i >= 4 * LANES; i += 4 * LANES)
        for (int k = 0; k < 4; k++) {
          vwide d = difference(h + i + k * LANES, p + i + k * LANES);
          sums[k] += d * d;
        }
      for (; i < end; i += LANES) {
        vwide d = difference(h + i, p + i);
        sums[0] += d * d;
      }
      vwide sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    }
  for (; i < n; i++) {
    double d = (W)widen(p[i * p_step]) - (W)widen(h[i * h_step]);
    total += d * d;
  }
  return total;
}

// factor * (h' - h) into `positive`, its negative into `negative`, where these are given.
static void scale(const A *h, i64 h_step, const B *p, i64 p_step, i64 n, W factor, B *positive, A *negative) {
  i64 i = 0;
  if (h_step == 1 && p_step == 1)
    for (; n - i >= LANES; i += LANES) {
      vwide d = difference(h + i, p + i) * factor;
      if (positive) store_lanes(positive + i, d);
      if (negative) store_lanes(negative + i, -d);
    }
  for (; i < n; i++) {
    W d = ((W)widen(p[i * p_step]) - (W)widen(h[i * h_step])) * factor;
    if (positive) store(positive + i, d);
    if (negative) store(negative + i, -d);
  }
}

static void zero(B *positive, A *negative, i64 from, i64 to) {
  if (positive) __builtin_memset((void *)(positive + from), 0, (to - from) * sizeof(B));
  if (negative) __builtin_memset((void *)(negative + from), 0, (to - from) * sizeof(A));
}

// ---------------------------------------------------------------------- a unit of work: some positions of a layer

// Strides are inner size, then outer, inner and hidden stride; see `mse_layout.collapse`.
static inline i64 element(const i64 *strides, i64 position) {
  return position / strides[0] * strides[1] + position % strides[0] * strides[2];
}

static bool gapless(const i64 *row) {
  const i64 *h = row + CLEAN_INNER, *p = row + PERTURBED_INNER;
  bool whole = row[SELECTED] == row[POSITIONS] && !h[1] && !p[1] && h[3] == 1 && p[3] == 1;
  return whole && (row[POSITIONS] == 1 || (h[2] == row[HIDDEN] && p[2] == row[HIDDEN]));
}

static i64 positions_per_unit(const i64 *row) {
  i64 positions = (1 << 15) / (row[HIDDEN] ? row[HIDDEN] : 1);
  return positions ? positions : 1;
}

static i64 units_of(const i64 *row) {  // one at least, as zeros have to be written where nothing is selected
  i64 each = positions_per_unit(row);
  return row[SELECTED] > each ? (row[SELECTED] + each - 1) / each : 1;
}

static double forward_unit(const i64 *row, i64 unit) {
  const i64 *index = (const i64 *)row[INDEX], *hs = row + CLEAN_INNER, *ps = row + PERTURBED_INNER;
  const A *h = (const A *)row[CLEAN];
  const B *p = (const B *)row[PERTURBED];
  i64 hidden = row[HIDDEN], begin = unit * positions_per_unit(row), end = begin + positions_per_unit(row);
  if (end > row[SELECTED]) end = row[SELECTED];
  if (!index && gapless(row)) return squares(h + begin * hidden, 1, p + begin * hidden, 1, (end - begin) * hidden);
  double total = 0;
  for (i64 n = begin; n < end; n++) {
    i64 at = index ? index[n] : n;
    total += squares(h + element(hs, at), hs[3], p + element(ps, at), ps[3], hidden);
  }
  return total;
}

// Gradients are contiguous. Indices ascend: a unit also zeroes the gap before each of its positions, the last one the
// positions that are left.
static void backward_unit(const i64 *row, i64 unit, W factor, B *positive, A *negative) {
  const i64 *index = (const i64 *)row[INDEX], *hs = row + CLEAN_INNER, *ps = row + PERTURBED_INNER;
  const A *h = (const A *)row[CLEAN];
  const B *p = (const B *)row[PERTURBED];
  i64 hidden = row[HIDDEN], begin = unit * positions_per_unit(row), end = begin + positions_per_unit(row);
  if (end > row[SELECTED]) end = row[SELECTED];
  if (!index && gapless(row)) {
    i64 at = begin * hidden, n = (end - begin) * hidden;
    scale(h + at, 1, p + at, 1, n, factor, positive ? positive + at : 0, negative ? negative + at : 0);
    return;
  }
  i64 next = !index ? begin : begin ? index[begin - 1] + 1 : 0;
  for (i64 n = begin; n < end; n++) {
    i64 at = index ? index[n] : n, out = at * hidden;
    if (next < at) zero(positive, negative, next * hidden, out);
    scale(h + element(hs, at), hs[3], p + element(ps, at), ps[3], hidden, factor, positive ? positive + out : 0,
          negative ? negative + out : 0);
    next = at + 1;
  }
  if (end == row[SELECTED] && next < row[POSITIONS]) zero(positive, negative, next * hidden, row[POSITIONS] * hidden);
}

// ---------------------------------------------------------------------- all layers

// The units of layer k have the numbers from first[k] on.
static i64 *number_units(const i64 *table, i64 count) {
  i64 *first = (i64 *)malloc((count + 1) * sizeof(i64));
  first[0] = 0;
  for (i64 k = 0; k < count; k++) first[k + 1] = first[k] + units_of(table + k * WIDTH);
  return first;
}

static i64 layer_of(const i64 *first, i64 count, i64 unit) {
  i64 low = 0, high = count;
  while (high - low > 1) {
    i64 middle = (low + high) / 2;
    if (first[middle] <= unit) low = middle;
    else high = middle;
  }
  return low;
}

// sums: out, the squared sum of each layer.
extern "C" void forward(const i64 *table, i64 count, double *sums, int threads) {
  i64 *first = number_units(table, count), units = first[count];
  double *partial = (double *)malloc(units * sizeof(double));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && units > 4)
  for (i64 unit = 0; unit < units; unit++) {
    i64 k = layer_of(first, count, unit);
    partial[unit] = forward_unit(table + k * WIDTH, unit - first[k]);
  }
  for (i64 k = 0; k < count; k++) {
    sums[k] = 0;
    for (i64 unit = first[k]; unit < first[k + 1]; unit++) sums[k] += partial[unit];
  }
  free(partial);
  free(first);
}

// positive, negative: addresses of the gradients of h' and h, 0 for none.
extern "C" void backward(const i64 *table, i64 count, const double *factors, const i64 *positive, const i64 *negative,
                         int threads) {
  i64 *first = number_units(table, count), units = first[count];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && units > 4)
  for (i64 unit = 0; unit < units; unit++) {
    i64 k = layer_of(first, count, unit);
    backward_unit(table + k * WIDTH, unit - first[k], (W)factors[k], (B *)positive[k], (A *)negative[k]);
  }
  free(first);
}
