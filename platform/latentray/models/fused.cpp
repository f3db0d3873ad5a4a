// Sums of squares; and SiLU of GroupNorm, and GEGLU, over bfloat16 with channels last, each with its gradients: few passes over memory.
// x, y, and their gradients: (pixels, channels) of each of `batch` samples. weight, bias: per channel, bfloat16 or float32
// (`half` or not). add: per sample and channel, added to x first, or null; likewise. stats: mean and 1/deviation per sample and
// group.

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BF16__) && !defined(LATENTRAY_PORTABLE)
#include <immintrin.h>
#define LATENTRAY_WIDE  // sixteen numbers at a time by hand: of what follows the compiler makes twice as many instructions
#endif

namespace {

constexpr int64_t kBlock = 128;  // pixels summed in float32 before they join the double sums

inline float widened(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t rounded(float value) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits = std::bit_cast<uint32_t>(value);
  uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : up);
}

// Kernels are written once, for F = float and for F = Wide: they read, compute, and then `put` or `join`.
template <typename F>
F at(const uint16_t* x);
template <typename F>
F at(const float* x);
template <>
inline float at<float>(const uint16_t* x) { return widened(*x); }
template <>
inline float at<float>(const float* x) { return *x; }
inline void put(uint16_t* y, float value) { *y = rounded(value); }
inline void join(float* sum, float value) { *sum += value; }
inline float size_of(float x) { return std::fabs(x); }
inline float either(float x, float below, float above) { return x < 0.0f ? below : above; }  // as x is below 0 or not
inline float limited(float t) { return t > 126.0f ? 126.0f : (t < -126.0f ? -126.0f : t); }
inline float inverse(float d) { return 1.0f / d; }
inline float fraction(float t) { return t - std::floor(t); }
inline float scaled(float power, float t) {
  return power * std::bit_cast<float>(uint32_t(int32_t(std::floor(t)) + 127) << 23);
}

#ifdef LATENTRAY_WIDE
using Wide = __m512;
constexpr int64_t kWide = 16;
template <>
inline Wide at<Wide>(const uint16_t* x) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
template <>
inline Wide at<Wide>(const float* x) { return _mm512_loadu_ps(x); }
inline void put(uint16_t* y, Wide value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), __m256i(_mm512_cvtneps_pbh(value)));
}
inline void join(float* sum, Wide value) { _mm512_storeu_ps(sum, _mm512_loadu_ps(sum) + value); }
inline Wide size_of(Wide x) { return _mm512_abs_ps(x); }
inline Wide either(Wide x, Wide below, Wide above) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), above, below);
}
inline Wide limited(Wide t) {  // of min and max the second is given where one is a NaN
  return _mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_min_ps(_mm512_set1_ps(126.0f), t));
}
inline Wide inverse(Wide d) {  // a 14-bit guess and a step of Newton's
  Wide guess = _mm512_rcp14_ps(d);
  return guess * (2.0f - d * guess);
}
inline Wide fraction(Wide t) { return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline Wide scaled(Wide power, Wide t) { return _mm512_scalef_ps(power, t); }
#endif

// Calls `each(c, F())` for all places of a row: sixteen at a time, where that is compiled, and the rest one by one.
template <typename Each>
inline void along(int64_t count, Each each) {
  int64_t c = 0;
#ifdef LATENTRAY_WIDE
  for (; c + kWide <= count; c += kWide) each(c, Wide());
#endif
#pragma GCC ivdep
  for (; c < count; ++c) each(c, 0.0f);
}

template <typename F>
inline F power_of_two(F t) {  // to about 1e-6, for t in -126 ... 126
  F f = fraction(t);
  F power = 1.0f + f * (0.69315308f + f * (0.24015361f + f * (0.05586803f + f * (0.00894283f + f * 0.00188244f))));
  return scaled(power, t);
}

template <typename F>
inline F sigmoid(F x) { return inverse(1.0f + power_of_two(limited(x * -1.44269504f))); }

template <typename F>
struct Normal {
  F below, density;
};

template <typename F>
inline Normal<F> normal(F x) {  // distribution function and density; Abramowitz and Stegun 7.1.26, to about 1e-6
  F far = size_of(x), bell = power_of_two(limited(x * x * -0.72134752f));
  F t = 1.0f / (1.0f + 0.23164190f * far);  // 0.3275911 / sqrt(2)
  F tail = t * (0.25482959f + t * (-0.28449674f + t * (1.42141374f + t * (-1.45315203f + t * 1.06140543f))));
  F above = 0.5f * tail * bell;
  return {either(x, above, 1.0f - above), 0.39894228f * bell};
}

std::vector<float> floats(const void* values, int64_t count, bool half) {
  std::vector<float> out(values ? count : 0);
  for (int64_t i = 0; i < int64_t(out.size()); ++i)
    out[i] = half ? widened(static_cast<const uint16_t*>(values)[i]) : static_cast<const float*>(values)[i];
  return out;
}

struct Shape {
  int64_t pixels, channels, groups;
  bool silu;
  int64_t each() const { return channels / groups; }
};

// Adds over all pixels, to double sums, what `term(row, c, F(), sum of c, other sum of c)` joins to the two, kBlock at a time.
template <typename Term>
void summed(const Shape& s, double* sums, Term term) {
  int64_t channels = s.channels;
  std::vector<float> part(2 * channels);
  for (int64_t begin = 0; begin < s.pixels; begin += kBlock) {
    int64_t end = begin + kBlock < s.pixels ? begin + kBlock : s.pixels;
    float *one = part.data(), *two = one + channels;
    for (int64_t c = 0; c < 2 * channels; ++c) part[c] = 0.0f;
    for (int64_t p = begin; p < end; ++p) {
      int64_t row = p * channels;
      along(channels, [=](int64_t c, auto lanes) { term(row, c, lanes, one + c, two + c); });
    }
    for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += part[c];
  }
}

// scale, offset: y = silu(scale x + offset) per channel, what is added being in the offset.
void affine(const Shape& s, const float* add, const float* weight, const float* bias, const float* stats, float* scale,
            float* offset) {
  for (int64_t c = 0; c < s.channels; ++c) {
    const float* of = stats + 2 * (c / s.each());
    scale[c] = weight[c] * of[1];
    offset[c] = bias[c] + ((add ? add[c] : 0.0f) - of[0]) * scale[c];
  }
}

void statistics(const Shape& s, const uint16_t* x, const float* add, double eps, float* stats) {
  int64_t channels = s.channels, each = s.each();
  std::vector<float> first(channels);
  std::vector<double> sums(2 * channels, 0.0);
  for (int64_t c = 0; c < channels; ++c) first[c] = widened(x[c]);  // taken off, so that no digits cancel
  const float* off = first.data();
  summed(s, sums.data(), [=](int64_t row, int64_t c, auto lanes, float* sum, float* squares) {
    using F = decltype(lanes);
    F d = at<F>(x + row + c) - at<F>(off + c);
    join(sum, d);
    join(squares, d * d);
  });
  for (int64_t g = 0; g < s.groups; ++g) {
    double mean = 0.0, spread = 0.0;
    auto base = [&](int64_t c) { return double(first[c]) + (add ? add[c] : 0.0f); };
    for (int64_t c = g * each; c < (g + 1) * each; ++c) mean += (base(c) + sums[c] / s.pixels) / each;
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      double own = sums[c] / s.pixels, apart = base(c) + own - mean;
      double variance = sums[channels + c] / s.pixels - own * own;
      spread += ((variance < 0.0 ? 0.0 : variance) + apart * apart) / each;  // a NaN stays one
    }
    stats[2 * g] = float(mean);
    stats[2 * g + 1] = float(1.0 / std::sqrt(spread + eps));
  }
}

template <bool kSilu>
void forward(const Shape& s, const uint16_t* x, const float* add, uint16_t* y, const float* weight, const float* bias,
             double eps, float* stats) {
  int64_t channels = s.channels;
  std::vector<float> scale(channels), offset(channels);
  statistics(s, x, add, eps, stats);
  affine(s, add, weight, bias, stats, scale.data(), offset.data());
  const float *a = scale.data(), *b = offset.data();
  for (int64_t p = 0; p < s.pixels; ++p) {
    const uint16_t* in = x + p * channels;
    uint16_t* out = y + p * channels;
    along(channels, [=](int64_t c, auto lanes) {
      using F = decltype(lanes);
      F value = at<F>(in + c) * at<F>(a + c) + at<F>(b + c);
      put(out + c, kSilu ? value * sigmoid(value) : value);
    });
  }
}

// The gradient of what the SiLU takes, from that of what it gives.
template <bool kSilu, typename F>
inline F through(F value, F dy) {
  if (!kSilu) return dy;
  F gate = sigmoid(value);
  return dy * gate * (1.0f + value * (1.0f - gate));
}

// d_weight, d_bias, d_add: this sample's share, per channel.
template <bool kSilu>
void backward(const Shape& s, const uint16_t* x, const float* add, const uint16_t* dy, uint16_t* dx, const float* weight,
              const float* bias, const float* stats, float* d_weight, float* d_bias, float* d_add) {
  int64_t channels = s.channels, each = s.each();
  std::vector<float> scale(channels), offset(channels), shift(channels), of_dz(channels), of_x(channels), rest(channels);
  std::vector<double> sums(2 * channels, 0.0);
  affine(s, add, weight, bias, stats, scale.data(), offset.data());
  for (int64_t c = 0; c < channels; ++c) shift[c] = stats[2 * (c / each)] - (add ? add[c] : 0.0f);
  const float *a = scale.data(), *b = offset.data(), *mean = shift.data();
  summed(s, sums.data(), [=](int64_t row, int64_t c, auto lanes, float* sum, float* with_x) {
    using F = decltype(lanes);
    F value = at<F>(x + row + c), dz = through<kSilu>(value * at<F>(a + c) + at<F>(b + c), at<F>(dy + row + c));
    join(sum, dz);
    join(with_x, dz * (value - at<F>(mean + c)));
  });
  // dx = (w dz - mean of w dz - x^ mean of (w dz x^)) / deviation, both means over the group (Wu & He 2018).
  for (int64_t g = 0; g < s.groups; ++g) {
    double inverse = stats[2 * g + 1], of_group = 0.0, with_group = 0.0, count = double(each) * s.pixels;
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      of_group += weight[c] * sums[c] / count;
      with_group += weight[c] * sums[channels + c] * inverse / count;
    }
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      d_bias[c] = float(sums[c]);
      d_weight[c] = float(sums[channels + c] * inverse);
      of_dz[c] = float(weight[c] * inverse);
      of_x[c] = float(-inverse * inverse * with_group);
      rest[c] = float(-inverse * of_group) - of_x[c] * shift[c];
    }
  }
  const float *k = of_dz.data(), *l = of_x.data(), *m = rest.data();
  std::vector<double> totals(2 * channels, 0.0);
  summed(s, totals.data(), [=, adds = d_add != nullptr](int64_t row, int64_t c, auto lanes, float* sum, float*) {
    using F = decltype(lanes);
    F value = at<F>(x + row + c), dz = through<kSilu>(value * at<F>(a + c) + at<F>(b + c), at<F>(dy + row + c));
    F found = at<F>(k + c) * dz + at<F>(l + c) * value + at<F>(m + c);
    put(dx + row + c, found);
    if (adds) join(sum, found);
  });
  if (d_add)
    for (int64_t c = 0; c < channels; ++c) d_add[c] = float(totals[c]);
}

constexpr int64_t kSquared = 4096, kLanes = 64;  // squares summed in float32, over so many sums, before they join a double

template <typename At>
double squares(int64_t begin, int64_t end, At at) {
  float sums[kLanes] = {};
  int64_t n = begin;
  for (; n + kLanes <= end; n += kLanes)
#pragma GCC ivdep
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += at(n + lane) * at(n + lane);
  double total = 0.0;
  for (; n < end; ++n) total += double(at(n)) * at(n);
  for (float sum : sums) total += sum;
  return total;
}

}  // namespace

extern "C" {

void latentray_group_norm(const uint16_t* x, const void* add, uint16_t* y, const void* weight, const void* bias,
                          float* stats, int64_t batch, int64_t pixels, int64_t channels, int64_t groups, int silu, int half,
                          int threads, double eps) {
  Shape s{pixels, channels, groups, silu != 0};
  std::vector<float> w = floats(weight, channels, half), b = floats(bias, channels, half);
  std::vector<float> a = floats(add, batch * channels, half), unasked(stats ? 0 : 2 * batch * groups);
  float* found = stats ? stats : unasked.data();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < batch; ++n) {
    int64_t at = n * pixels * channels;
    auto run = s.silu ? forward<true> : forward<false>;
    run(s, x + at, add ? a.data() + n * channels : nullptr, y + at, w.data(), b.data(), eps, found + 2 * n * groups);
  }
}

void latentray_group_norm_backward(const uint16_t* x, const void* add, const uint16_t* dy, uint16_t* dx, const void* weight,
                                   const void* bias, const float* stats, float* d_weight, float* d_bias, float* d_add,
                                   int64_t batch, int64_t pixels, int64_t channels, int64_t groups, int silu, int half,
                                   int threads) {
  Shape s{pixels, channels, groups, silu != 0};
  std::vector<float> w = floats(weight, channels, half), b = floats(bias, channels, half);
  std::vector<float> a = floats(add, batch * channels, half);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < batch; ++n) {
    int64_t at = n * pixels * channels, row = n * channels;
    auto run = s.silu ? backward<true> : backward<false>;
    run(s, x + at, add ? a.data() + row : nullptr, dy + at, dx + at, w.data(), b.data(), stats + 2 * n * groups,
        d_weight + row, d_bias + row, d_add ? d_add + row : nullptr);
  }
}

// Of all numbers of `count` tensors, of sizes[i] numbers each, in `half` (bfloat16) or float32.
double latentray_squares(const void* const* tensors, const int64_t* sizes, int64_t count, int half, int threads) {
  std::vector<double> sums(count, 0.0);  // added up in order, so that threads change no bit
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i)
    for (int64_t begin = 0; begin < sizes[i]; begin += kSquared) {
      int64_t end = begin + kSquared < sizes[i] ? begin + kSquared : sizes[i];
      sums[i] += half ? squares(begin, end, [x = static_cast<const uint16_t*>(tensors[i])](int64_t n) { return widened(x[n]); })
                    : squares(begin, end, [x = static_cast<const float*>(tensors[i])](int64_t n) { return x[n]; });
    }
  double total = 0.0;
  for (double sum : sums) total += sum;
  return total;
}

// x: (rows, 2 width), values and then gates; y: (rows, width) = values GELU(gates).
void latentray_geglu(const uint16_t* x, uint16_t* y, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t *value = x + 2 * r * width, *gate = value + width;
    uint16_t* out = y + r * width;
    along(width, [=](int64_t c, auto lanes) {
      using F = decltype(lanes);
      F g = at<F>(gate + c);
      put(out + c, at<F>(value + c) * g * normal(g).below);
    });
  }
}

void latentray_geglu_backward(const uint16_t* x, const uint16_t* dy, uint16_t* dx, int64_t rows, int64_t width,
                              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t *value = x + 2 * r * width, *gate = value + width, *given = dy + r * width;
    uint16_t *d_value = dx + 2 * r * width, *d_gate = d_value + width;
    along(width, [=](int64_t c, auto lanes) {
      using F = decltype(lanes);
      F g = at<F>(gate + c), d = at<F>(given + c);
      Normal<F> of = normal(g);
      put(d_value + c, d * g * of.below);
      put(d_gate + c, d * at<F>(value + c) * (of.below + g * of.density));
    });
  }
}

}
