// SiLU of GroupNorm over bfloat16 maps with channels last: one pass for the statistics, one for the result.
// x, y: (pixels, channels) of each of `batch` samples, y maybe x itself; weight, bias: float32 per channel.

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

inline float widened(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t rounded(float value) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits = std::bit_cast<uint32_t>(value);
  uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : up);
}

inline float sigmoid(float x) {  // 1 / (1 + 2^t), t = -x log2 e, to about 1e-6
  float t = x * -1.44269504f;
  t = t > 126.0f ? 126.0f : (t < -126.0f ? -126.0f : t);
  float whole = std::floor(t), f = t - whole;
  float power = 1.0f + f * (0.69315308f + f * (0.24015361f + f * (0.05586803f + f * (0.00894283f + f * 0.00188244f))));
  float scale = std::bit_cast<float>(uint32_t(int32_t(whole) + 127) << 23);
  return 1.0f / (1.0f + power * scale);
}

void sample(const uint16_t* x, uint16_t* y, const float* weight, const float* bias, int64_t pixels, int64_t channels,
            int64_t groups, double eps, bool silu) {
  constexpr int64_t kBlock = 128;  // pixels summed in float32 before they join the double sums
  std::vector<float> first(channels), part(2 * channels), scale(channels), offset(channels);
  std::vector<double> sums(2 * channels, 0.0);
  for (int64_t c = 0; c < channels; ++c) first[c] = widened(x[c]);  // taken off, so that no digits cancel
  for (int64_t begin = 0; begin < pixels; begin += kBlock) {
    int64_t end = begin + kBlock < pixels ? begin + kBlock : pixels;
    float *sum = part.data(), *squares = sum + channels;
    for (int64_t c = 0; c < 2 * channels; ++c) part[c] = 0.0f;
    for (int64_t p = begin; p < end; ++p) {
      const uint16_t* row = x + p * channels;
      for (int64_t c = 0; c < channels; ++c) {
        float d = widened(row[c]) - first[c];
        sum[c] += d;
        squares[c] += d * d;
      }
    }
    for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += part[c];
  }
  int64_t each = channels / groups;
  for (int64_t g = 0; g < groups; ++g) {
    double mean = 0.0, spread = 0.0;
    for (int64_t c = g * each; c < (g + 1) * each; ++c) mean += (first[c] + sums[c] / pixels) / each;
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      double own = sums[c] / pixels, apart = first[c] + own - mean;
      double variance = sums[channels + c] / pixels - own * own;
      spread += ((variance < 0.0 ? 0.0 : variance) + apart * apart) / each;  // a NaN stays one
    }
    double factor = 1.0 / std::sqrt(spread + eps);
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      scale[c] = float(weight[c] * factor);
      offset[c] = float(bias[c] - mean * weight[c] * factor);
    }
  }
  const float *a = scale.data(), *b = offset.data();
  for (int64_t p = 0; p < pixels; ++p) {
    const uint16_t* in = x + p * channels;
    uint16_t* out = y + p * channels;
    if (silu) {
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

}  // namespace

extern "C" void latentray_group_norm(const uint16_t* x, uint16_t* y, const float* weight, const float* bias, int64_t batch,
                                    int64_t pixels, int64_t channels, int64_t groups, double eps, int silu, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < batch; ++b)
    sample(x + b * pixels * channels, y + b * pixels * channels, weight, bias, pixels, channels, groups, eps, silu != 0);
}
