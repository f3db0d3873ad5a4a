// Sums of squares; and SiLU of GroupNorm, and GEGLU, over bfloat16 with channels last, each with its gradients: few passes over memory.
// x, y, and their gradients: (pixels, channels) of each of `batch` samples. weight, bias: per channel, bfloat16 or float32
// (`half` or not). add: per sample and channel, added to x first, or null; likewise. stats: mean and 1/deviation per sample and
// group.

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kBlock = 128;  // pixels summed in float32 before they join the double sums

inline float widened(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t rounded(float value) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits = std::bit_cast<uint32_t>(value);
  uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : up);
}

inline float power_of_two(float t) {  // to about 1e-6, for t in -126 ... 126
  float whole = std::floor(t), f = t - whole;
  float power = 1.0f + f * (0.69315308f + f * (0.24015361f + f * (0.05586803f + f * (0.00894283f + f * 0.00188244f))));
  return power * std::bit_cast<float>(uint32_t(int32_t(whole) + 127) << 23);
}

inline float limited(float t) { return t > 126.0f ? 126.0f : (t < -126.0f ? -126.0f : t); }

inline float sigmoid(float x) { return 1.0f / (1.0f + power_of_two(limited(x * -1.44269504f))); }

struct Normal {
  float below, density;
};

inline Normal normal(float x) {  // distribution function and density; Abramowitz and Stegun 7.1.26, to about 1e-6
  float far = std::fabs(x), bell = power_of_two(limited(x * x * -0.72134752f));
  float t = 1.0f / (1.0f + 0.23164190f * far);  // 0.3275911 / sqrt(2)
  float tail = t * (0.25482959f + t * (-0.28449674f + t * (1.42141374f + t * (-1.45315203f + t * 1.06140543f))));
  float above = 0.5f * tail * bell;
  return {x < 0.0f ? above : 1.0f - above, 0.39894228f * bell};
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

// Adds `term(p, c)`'s pairs over all pixels to double sums, kBlock pixels at a time.
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
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) term(row, c, one[c], two[c]);
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
  summed(s, sums.data(), [=](int64_t row, int64_t c, float& sum, float& squares) {
    float d = widened(x[row + c]) - off[c];
    sum += d;
    squares += d * d;
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
    if (s.silu) {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) {
        float value = widened(in[c]) * a[c] + b[c];
        out[c] = rounded(value * sigmoid(value));
      }
    } else {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) out[c] = rounded(widened(in[c]) * a[c] + b[c]);
    }
  }
}

// The gradient of what the SiLU takes, from that of what it gives.
inline float through(bool silu, float value, float dy) {
  if (!silu) return dy;
  float gate = sigmoid(value);
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
  summed(s, sums.data(), [=](int64_t row, int64_t c, float& sum, float& with_x) {
    float value = widened(x[row + c]), dz = through(kSilu, value * a[c] + b[c], widened(dy[row + c]));
    sum += dz;
    with_x += dz * (value - mean[c]);
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
  summed(s, totals.data(), [=](int64_t row, int64_t c, float& sum, float&) {
    float value = widened(x[row + c]), dz = through(kSilu, value * a[c] + b[c], widened(dy[row + c]));
    float found = k[c] * dz + l[c] * value + m[c];
    dx[row + c] = rounded(found);
    sum += found;
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
    forward(s, x + at, add ? a.data() + n * channels : nullptr, y + at, w.data(), b.data(), eps, found + 2 * n * groups);
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
#pragma GCC ivdep
    for (int64_t c = 0; c < width; ++c) {
      float g = widened(gate[c]);
      out[c] = rounded(widened(value[c]) * g * normal(g).below);
    }
  }
}

void latentray_geglu_backward(const uint16_t* x, const uint16_t* dy, uint16_t* dx, int64_t rows, int64_t width,
                              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t *value = x + 2 * r * width, *gate = value + width, *given = dy + r * width;
    uint16_t *d_value = dx + 2 * r * width, *d_gate = d_value + width;
#pragma GCC ivdep
    for (int64_t c = 0; c < width; ++c) {
      float g = widened(gate[c]), d = widened(given[c]);
      Normal of = normal(g);
      d_value[c] = rounded(d * g * of.below);
      d_gate[c] = rounded(d * widened(value[c]) * (of.below + g * of.density));
    }
  }
}

}
