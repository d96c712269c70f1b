// Runs one instruction set's kernels beside the same sums in double precision, and prints by how
// much each is off (relative RMS). Compiled together with compute.cpp: also for processors that
// only an emulator has. ISA: name of the function that gives the kernels.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "../edgesd/kernels/compute.h"

namespace {
std::atomic<bool> refuse{false};
const std::thread::id caller = std::this_thread::get_id();
}  // namespace

// In the place of the C library's: no memory for other threads while `refuse` is set.
extern "C" void* aligned_alloc(size_t alignment, size_t size) noexcept {
  void* found = nullptr;
  if (refuse && std::this_thread::get_id() != caller) return nullptr;
  return posix_memalign(&found, alignment, size) ? nullptr : found;
}

namespace {

using namespace edgesd;

std::mt19937 random_engine(1);

std::vector<float> normal(size_t count, float mean = 0) {
  std::normal_distribution<float> of(mean, 1);
  std::vector<float> out(count);
  for (float& x : out) x = of(random_engine);
  return out;
}

uint16_t half(float x) {  // of a positive number that is normal in fp16
  int exponent;
  const float part = std::frexp(x, &exponent);
  return uint16_t(((exponent + 14) << 10) + int(std::lround((part * 2 - 1) * 1024)));
}
float single(uint16_t h) { return std::ldexp(1 + (h & 1023) / 1024.0f, (h >> 10) - 15); }

const Threads two{[](void*, void (*fn)(void*, size_t), size_t count, void* data) {
                    std::thread other([&] {
                      for (size_t i = 1; i < count; i += 2) fn(data, i);
                    });
                    for (size_t i = 0; i < count; i += 2) fn(data, i);
                    other.join();
                  },
                  nullptr};

void report(const char* what, int bits, const std::vector<float>& found,
            const std::vector<double>& wanted) {
  double error = 0, size = 0;
  for (size_t i = 0; i < found.size(); i++) {
    error += (found[i] - wanted[i]) * (found[i] - wanted[i]);
    size += wanted[i] * wanted[i];
  }
  std::printf("%s %d %.6f\n", what, bits, std::sqrt(error / size));
}

// A weight, and what it stands for as [N][K].
struct Made {
  std::vector<uint8_t> codes;
  std::vector<float> scale;
  std::vector<uint16_t> steps;
  std::vector<double> values;
  Weight weight{};
};

Made make(int bits, int layout, int64_t n, int64_t k, int group) {
  Made out;
  const int64_t groups = (k + group - 1) / group;
  std::uniform_int_distribution<int> eight(-127, 127), four(-8, 7);
  std::uniform_real_distribution<float> size(0.5f, 2);
  std::vector<int> codes(size_t(n * k));
  for (int& code : codes) code = bits == 8 ? eight(random_engine) : four(random_engine);
  out.scale.resize(size_t(n));
  out.values.resize(size_t(n * k));
  out.steps.resize(size_t(n * groups));
  for (int64_t i = 0; i < n; i++) {
    out.scale[i] = 0.01f * size(random_engine);
    for (int64_t g = 0; g < groups; g++) {
      // 4-bit codes become at most 127: codes / steps, or codes * steps / scale.
      const float grow = 8 + 7 * size(random_engine) / 2;
      const bool rows = layout == Weight::ROWS_K_BY_N;
      uint16_t& step = out.steps[rows ? g * n + i : i * groups + g];
      step = half(rows ? 1 / grow : grow * out.scale[i]);
      for (int64_t j = g * group; j < std::min(k, (g + 1) * group); j++) {
        const double value = rows ? codes[i * k + j] / double(single(step)) * out.scale[i]
                                  : codes[i * k + j] * double(single(step));
        out.values[i * k + j] = bits == 8 ? codes[i * k + j] * double(out.scale[i]) : value;
      }
    }
  }
  if (bits == 8) {
    out.codes.resize(size_t(n * k));
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < k; j++) out.codes[j * n + i] = uint8_t(codes[i * k + j]);
  } else if (layout == Weight::ROWS_K_BY_N) {
    out.codes.resize(size_t(n * k + 1) / 2);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < k; j++)
        out.codes[(j * n + i) / 2] |= uint8_t((codes[i * k + j] & 15) << ((j * n + i) % 2 * 4));
  } else {
    out.codes.assign(size_t(n * groups * group / 2), 0x88);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < k; j++) {
        uint8_t& byte = out.codes[(i * groups * group + j) / 2];
        const int shift = j % 2 * 4;
        byte = uint8_t((byte & ~(15 << shift)) | ((codes[i * k + j] + 8) << shift));
      }
  }
  out.weight = {out.codes.data(), out.scale.data(), out.steps.data(), bits, group, layout, n, k};
  return out;
}

void check_linear(const Compute& compute, int bits, int layout, int64_t m, int64_t n, int64_t k,
                  int group, bool gated, int64_t rank = 0, bool gelu = false, int64_t gates = 0) {
  const Made made = make(bits, layout, n, k, group);
  const auto x = normal(size_t(m * k), 0.3f), bias = normal(size_t(n));
  const int64_t outputs = gated ? n / 2 : n;
  const auto residual = normal(size_t(m * outputs));
  std::vector<float> y(size_t(m * outputs));
  const auto low = normal(size_t(m * rank)), up = normal(size_t(rank * n), 0.3f);
  const auto gate = normal(size_t(gates * n), 1);
  compute.linear({x.data(), made.weight, bias.data(), residual.data(), y.data(), m, gated,
                  low.data(), up.data(), rank, gelu, gates ? gate.data() : nullptr, gates}, two);
  std::vector<double> wanted(y.size());
  for (int64_t row = 0; row < m; row++) {
    auto sum = [&](int64_t i) {
      double total = bias[i];
      for (int64_t j = 0; j < k; j++) total += x[row * k + j] * made.values[i * k + j];
      for (int64_t r = 0; r < rank; r++) total += low[row * rank + r] * up[r * n + i];
      return total;
    };
    for (int64_t i = 0; i < outputs; i++) {
      double value = sum(i);
      if (gated) {
        const double gate = sum(i + outputs);
        value *= gate * 0.5 * std::erfc(-gate / std::sqrt(2));
      }
      if (gelu) {
        const double u = std::sqrt(2 / M_PI) * (value + 0.044715 * value * value * value);
        value *= 0.5 * (1 + std::tanh(u));
      }
      if (gates) value *= gate[row / (m / gates) * n + i];
      wanted[row * outputs + i] = value + residual[row * outputs + i];
    }
  }
  report(gated ? "gated" : "linear", bits, y, wanted);
}

void check_conv(const Compute& compute, int bits, int64_t channels, int64_t n, int64_t height,
                int64_t width, int kernel, int stride, int groups = 0, int up = 1) {
  const int64_t k = channels * kernel * kernel, pad = kernel / 2;
  const Made made = make(bits, Weight::ROWS_K_BY_N, n, k, 32);
  const int64_t tall = (height * up + 2 * pad - kernel) / stride + 1;
  const int64_t wide = (width * up + 2 * pad - kernel) / stride + 1;
  const auto x = normal(size_t(2 * channels * height * width), 0.3f), bias = normal(size_t(n));
  const auto residual = normal(size_t(2 * n * tall * wide)), offset = normal(size_t(2 * n));
  const auto gamma = normal(size_t(channels), 1), beta = normal(size_t(channels));
  std::vector<float> y(residual.size());
  Conv job{};
  job.x = x.data(), job.weight = made.weight, job.bias = bias.data(), job.y = y.data();
  job.residual = residual.data(), job.offset = offset.data();
  if (groups) job.gamma = gamma.data(), job.beta = beta.data();
  job.groups = groups, job.epsilon = 1e-5f, job.silu = groups > 0, job.upsample = up;
  job.batch = 2, job.channels = channels, job.height = height, job.width = width;
  job.out_height = tall, job.out_width = wide, job.kernel_h = job.kernel_w = kernel;
  job.stride_h = job.stride_w = stride;
  job.relu = up > 1;
  job.top = job.left = job.bottom = job.right = int(pad);
  compute.conv(job, two);
  std::vector<double> seen(x.begin(), x.end());
  const int64_t plane = height * width, each = groups ? channels / groups * plane : 0;
  for (int64_t g = 0; groups && g < 2 * groups; g++) {
    double mean = 0, variance = 0;
    for (int64_t i = g * each; i < (g + 1) * each; i++) mean += seen[i] / each;
    for (int64_t i = g * each; i < (g + 1) * each; i++)
      variance += (seen[i] - mean) * (seen[i] - mean) / each;
    for (int64_t i = g * each; i < (g + 1) * each; i++) {
      const int64_t c = i / plane % channels;
      const double v = (seen[i] - mean) / std::sqrt(variance + 1e-5) * gamma[c] + beta[c];
      seen[i] = v / (1 + std::exp(-v));
    }
  }
  std::vector<double> wanted(y.size());
  for (int64_t b = 0; b < 2; b++)
    for (int64_t i = 0; i < n; i++)
      for (int64_t r = 0; r < tall; r++)
        for (int64_t c = 0; c < wide; c++) {
          double total = bias[i] + offset[b * n + i];
          for (int64_t j = 0; j < k; j++) {
            const int64_t tap = j / channels, channel = j % channels;
            const int64_t down = r * stride - pad + tap / kernel;
            const int64_t across = c * stride - pad + tap % kernel;
            if (down >= 0 && down < height * up && across >= 0 && across < width * up)
              total += seen[(b * channels + channel) * plane + down / up * width + across / up] *
                       made.values[i * k + j];
          }
          const int64_t at = ((b * n + i) * tall + r) * wide + c;
          wanted[at] = total + residual[at];
          if (up > 1) wanted[at] = std::max(wanted[at], 0.0);
        }
  report(groups ? "normed" : "conv", bits, y, wanted);
}

// y [batch, m, heads * d], of what queries, keys and values are in the end.
std::vector<double> attended(const std::vector<double>& q, const std::vector<double>& k,
                             const std::vector<double>& v, int64_t batch, int64_t m, int64_t n,
                             int heads, int d, float scale) {
  const int64_t width = int64_t(heads) * d;
  std::vector<double> wanted(q.size());
  for (int64_t b = 0; b < batch; b++)
    for (int h = 0; h < heads; h++)
      for (int64_t r = 0; r < m; r++) {
        std::vector<double> weights(static_cast<size_t>(n));
        double total = 0;
        for (int64_t c = 0; c < n; c++) {
          double dot = 0;
          for (int i = 0; i < d; i++)
            dot += q[(b * m + r) * width + h * d + i] * k[(b * n + c) * width + h * d + i];
          total += weights[c] = std::exp(dot * scale);
        }
        for (int i = 0; i < d; i++) {
          double value = 0;
          for (int64_t c = 0; c < n; c++) value += weights[c] * v[(b * n + c) * width + h * d + i];
          wanted[(b * m + r) * width + h * d + i] = value / total;
        }
      }
  return wanted;
}

std::vector<double> wide(const std::vector<float>& x) { return {x.begin(), x.end()}; }

void check_attention(const Compute& compute, int64_t m, int64_t n, int heads, int d) {
  const int64_t width = int64_t(heads) * d;
  const auto q = normal(size_t(2 * m * width)), v = normal(size_t(2 * n * width), 0.2f);
  auto k = normal(size_t(2 * n * width), 0.5f);
  const float scale = 1 / std::sqrt(float(d));
  std::vector<float> y(q.size());
  compute.attention({q.data(), k.data(), v.data(), y.data(), 2, m, n, heads, d, scale}, two);
  report("attention", 8, y, attended(wide(q), wide(k), wide(v), 2, m, n, heads, d, scale));
}

// Tokens of one or of two tensors, of which heads are normalized and pairs rotated.
void check_joint(const Compute& compute, int64_t first, int64_t rest, int heads, int d,
                 bool normed, bool rotated) {
  const int64_t width = int64_t(heads) * d, all = first + rest;
  std::vector<float> part[3][2], norm[2][2];
  for (int i = 0; i < 3; i++)
    for (int p = 0; p < 2; p++) part[i][p] = normal(size_t(2 * (p ? rest : first) * width), 0.3f);
  for (auto& pair : norm)
    for (auto& weight : pair) {
      weight = normal(size_t(d), 1);
      for (float& x : weight) x *= 0.5f;
    }
  std::vector<float> cos, sin;
  for (const float angle : normal(size_t(all * d / 2))) {
    cos.push_back(std::cos(angle));
    sin.push_back(std::sin(angle));
  }
  const float scale = 1 / std::sqrt(float(d)), epsilon = 0.01f;
  std::vector<float> y(size_t(2 * all * width));
  Attention job{part[0][1].data(), part[1][1].data(), part[2][1].data(), y.data(), 2, all, all,
                heads, d, scale};
  job.first = first;
  if (first)
    job.first_q = part[0][0].data(), job.first_k = part[1][0].data(),
    job.first_v = part[2][0].data();
  job.epsilon = epsilon;
  if (normed) job.q_norm = norm[0][1].data(), job.k_norm = norm[1][1].data();
  if (normed && first)
    job.first_q_norm = norm[0][0].data(), job.first_k_norm = norm[1][0].data();
  if (rotated) job.cos = cos.data(), job.sin = sin.data();
  compute.attention(job, two);
  std::vector<double> joined[3];
  for (int i = 0; i < 3; i++)
    for (int64_t b = 0; b < 2; b++)
      for (int64_t token = 0; token < all; token++)
        for (int64_t h = 0; h < heads; h++) {
          const int p = token >= first;
          const int64_t count = p ? rest : first, at = token - (p ? first : 0);
          std::vector<double> head(static_cast<size_t>(d));
          double squares = 0;
          for (int j = 0; j < d; j++) {
            head[j] = part[i][p][((b * count + at) * heads + h) * d + j];
            squares += head[j] * head[j];
          }
          for (int j = 0; normed && i < 2 && j < d; j++)
            head[j] *= norm[i][p][j] / std::sqrt(squares / d + epsilon);
          for (int j = 0; rotated && i < 2 && j < d; j += 2) {
            const double left = head[j], right = head[j + 1];
            const double c = cos[token * (d / 2) + j / 2], s = sin[token * (d / 2) + j / 2];
            head[j] = left * c - right * s;
            head[j + 1] = right * c + left * s;
          }
          joined[i].insert(joined[i].end(), head.begin(), head.end());
        }
  report("joint", 8, y, attended(joined[0], joined[1], joined[2], 2, all, all, heads, d, scale));
}

// All numbers that are finite in fp16.
void check_widen(const Compute& compute) {
  std::vector<uint16_t> x;
  std::vector<double> wanted;
  for (int sign = 0; sign < 2; sign++)
    for (int h = 0; h < 31 << 10; h++) {
      x.push_back(uint16_t(h | sign << 15));
      const double size = h < 1024 ? std::ldexp(h, -24) : double(single(uint16_t(h)));
      wanted.push_back(sign ? -size : size);
    }
  x.resize(x.size() - 3), wanted.resize(x.size());  // not a multiple of any vector
  std::vector<float> y(x.size());
  compute.widen({x.data(), y.data(), int64_t(x.size())}, two);
  report("widen", 16, y, wanted);
}

void check_rows(const Compute& compute, int bits, int64_t m, int64_t n, int64_t k, int group) {
  Made made = make(bits, bits == 4 ? Weight::BLOCKS_OF_N : Weight::ROWS_K_BY_N, n, k, group);
  if (bits == 8) {
    for (int64_t i = 0; i < n; i++) {
      made.steps[i] = half(made.scale[i]);
      for (int64_t j = 0; j < k; j++)
        made.values[i * k + j] = int8_t(made.codes[j * n + i]) * double(single(made.steps[i]));
    }
  }
  const auto x = normal(size_t(m * k), 0.3f);
  std::vector<float> y(size_t(m * n));
  compute.rows({x.data(), made.codes.data(), made.steps.data(), y.data(), m, n, k, bits,
                group}, two);
  std::vector<double> wanted(y.size());
  for (int64_t row = 0; row < m; row++)
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < k; j++)
        wanted[row * n + i] += x[row * k + j] * made.values[i * k + j];
  report("rows", bits, y, wanted);
}

// What is thrown in another thread arrives here: prints the part of the calls for which it didn't.
void check_refused(const Compute& compute) {
  const Made made = make(4, Weight::ROWS_K_BY_N, 70, 36, 32);
  const auto x = normal(size_t(40 * 36));
  std::vector<float> y(size_t(40 * 70));
  Conv conv{};
  conv.x = x.data(), conv.weight = made.weight, conv.y = y.data(), conv.upsample = 1;
  conv.batch = 1, conv.channels = 36, conv.height = conv.out_height = 8;
  conv.width = conv.out_width = 5;
  conv.kernel_h = conv.kernel_w = conv.stride_h = conv.stride_w = 1;
  int calls = 0, thrown = 0;
  const auto attempt = [&](auto call) {
    calls++;
    try {
      call();
    } catch (const std::bad_alloc&) {
      thrown++;
    }
  };
  refuse = true;
  attempt([&] { compute.linear({x.data(), made.weight, nullptr, nullptr, y.data(), 40, false}, two); });
  attempt([&] { compute.conv(conv, two); });
  refuse = false;
  std::printf("refused 4 %.6f\n", double(calls - thrown) / calls);
}

}  // namespace

int main() {
  const edgesd::Compute& compute = *edgesd::ISA();
  std::printf("%s\n", compute.name);
  for (const int bits : {8, 4}) {
    if (bits == 8 && compute.weight_max < 127) continue;
    check_linear(compute, bits, Weight::ROWS_K_BY_N, 13, 70, 50, 32, false, 5);
    check_linear(compute, bits, Weight::ROWS_K_BY_N, 600, 96, 64, 32, true, 17);
    check_linear(compute, bits, Weight::ROWS_K_BY_N, 1, 33, 31, 16, false);
    check_conv(compute, bits, 40, 50, 9, 7, 3, 1);
    check_conv(compute, bits, 5, 17, 9, 8, 3, 2);
    check_conv(compute, bits, 64, 32, 24, 24, 1, 1);
    check_conv(compute, bits, 24, 20, 9, 7, 3, 1, 4);
    check_conv(compute, bits, 24, 20, 18, 17, 3, 1, 24, 2);
    check_conv(compute, bits, 8, 20, 5, 20, 3, 1, 0, 2);
  }
  check_linear(compute, 4, Weight::BLOCKS_OF_N, 13, 70, 100, 64, false, 16);
  check_linear(compute, 4, Weight::BLOCKS_OF_N, 20, 64, 128, 16, true);
  check_linear(compute, 4, Weight::BLOCKS_OF_N, 3, 40, 31, 256, false, 1);
  check_linear(compute, 4, Weight::BLOCKS_OF_N, 12, 70, 64, 64, false, 0, true);
  check_linear(compute, 4, Weight::BLOCKS_OF_N, 12, 70, 64, 64, false, 3, false, 2);
  check_attention(compute, 70, 100, 3, 40);
  check_attention(compute, 5, 64, 2, 80);
  check_attention(compute, 9, 77, 1, 160);
  check_attention(compute, 3, 1, 2, 6);
  check_joint(compute, 7, 70, 2, 128, true, true);
  check_joint(compute, 0, 30, 3, 38, true, true);
  check_joint(compute, 5, 20, 2, 64, false, true);
  check_joint(compute, 3, 66, 2, 24, true, false);
  check_rows(compute, 4, 1, 70, 200, 64);
  check_rows(compute, 4, 6, 33, 100, 16);
  check_rows(compute, 4, 4, 40, 64, 32);
  check_rows(compute, 8, 1, 70, 96, 96);
  check_rows(compute, 8, 33, 1029, 67, 67);
  check_widen(compute);
  check_refused(compute);
}
