// Quantized linears, convolutions and attention for one instruction set (isa.h).
//
// A product of K inputs and N outputs is taken in panels of P outputs: a panel's codes are laid
// out once as [K / 4][P][4] bytes, 4-bit ones brought to 8 bits on the way, and then meet all rows,
// MR at a time. Rows of a convolution are its input's patches, which are never written out: the
// input lies once as bytes [height, width, channels], and a row is one pointer for each tap.

#include "compute.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <new>
#include <type_traits>
#include <vector>

#include "isa.h"

namespace edgesd {
namespace EDGESD_ISA {
namespace {

constexpr int P = NR * W;
constexpr int KEYS = 64;  // of attention, taken at a time
constexpr int AHEAD = 64;  // rows of a weight that are asked for before they are needed

// Memory that grows and stays with its thread.
template <typename T>
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  T* get(size_t count) {
    if (count > count_) {
      std::free(data_);
      count_ = 0;  // also when there is no more
      data_ = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64));
      if (!data_) throw std::bad_alloc();
      count_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// Runs body(i) for each i below `count`. What one of them throws would end the process where a
// thread of ONNX Runtime ran it: the first is thrown here, when all are done.
template <typename F>
void parallel(Threads threads, size_t count, F& body) {
  struct Job {
    F& body;
    std::atomic<bool> failed{false};
    std::exception_ptr first{};
  } job{body};
  threads.run(
      threads.context,
      [](void* data, size_t i) {
        Job& job = *static_cast<Job*>(data);
        if (job.failed.load(std::memory_order_relaxed)) return;
        try {
          job.body(i);
        } catch (...) {
          if (!job.failed.exchange(true)) job.first = std::current_exception();
        }
      },
      count, &job);
  if (job.first) std::rethrow_exception(job.first);
}

inline float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, part = h & 0x3ff;
  float value;
  if (exponent == 0) {
    value = std::ldexp(float(part), -24);
    return sign ? -value : value;
  }
  const uint32_t bits = sign | ((exponent + 112) << 23) | (part << 13);
  std::memcpy(&value, &bits, 4);
  return value;
}

// Codes of x: round(x / scale) + zero, 0 to 255, so that 0 has a code of its own.
struct Format {
  float scale, inverse;
  int zero;
};

Format format(float low, float high) {
  if (!std::isfinite(high - low)) return {NAN, 0, 0};  // and so is all that comes of it
  low = std::min(low, 0.0f);
  high = std::max(high, 0.0f);
  const float scale = high > low ? (high - low) / 255.0f : 1.0f;
  const int zero = int(std::min(255.0f, std::max(0.0f, std::nearbyint(-low / scale))));
  return {scale, 1 / scale, zero};
}

inline vi codes_of(vf x, Format f) {
  const vf y = x * f.inverse + float(f.zero);
  return nearest(minimum(maximum(y, vf_set(0)), vf_set(255)));
}
inline int code_of(float x, Format f) {
  return int(std::nearbyint(std::min(255.0f, std::max(0.0f, x * f.inverse + float(f.zero)))));
}

// Widens [low, high] to what x holds, each value as `of` makes it; `high` is NaN where that is NaN or
// infinite.
template <typename F>
void range(const float* x, int64_t count, float& low, float& high, F of) {
  int64_t i = 0;
  float none = high * 0;
  if (count >= W) {
    vf least = of(load<vf>(x)), most = least, zeros = vf{};
    for (; i + W <= count; i += W) {
      const vf v = of(load<vf>(x + i));
      least = minimum(least, v);
      most = maximum(most, v);
      zeros += v * 0.0f;
    }
    for (int j = 0; j < W; j++) none += zeros[j];
    high = std::max(high, lanes_max(most));
    low = std::min(low, -lanes_max(-least));
  }
  for (; i < count; i++) {
    const float v = of(vf_set(x[i]))[0];
    low = std::min(low, v);
    high = std::max(high, v);
    none += v * 0.0f;
  }
  high += none;
}

void range(const float* x, int64_t count, float& low, float& high) {
  range(x, count, low, high, [](vf v) { return v; });
}

// A panel: bytes for dot4, and for each output its scale and the sum of its codes.
struct Panel {
  int8_t* codes;
  float scale[P];
  int32_t sum[P];
};

// A row of a panel's codes, and as they are multiplied.
typedef uint8_t Row __attribute__((vector_size(P)));
typedef uint8_t HalfRow __attribute__((vector_size(P / 2)));
typedef uint16_t Shorts __attribute__((vector_size(2 * P)));
typedef int16_t SignedShorts __attribute__((vector_size(2 * P)));

// The nibbles of bytes, low ones first. Called for P outputs.
template <int N>
inline Row nibbles(HalfRow packed) {
  const HalfRow low = packed & 15, high = packed >> 4;
  if constexpr (N == 32)
    return __builtin_shufflevector(low, high, 0, N / 2, 1, N / 2 + 1, 2, N / 2 + 2, 3, N / 2 + 3, 4,
                                   N / 2 + 4, 5, N / 2 + 5, 6, N / 2 + 6, 7, N / 2 + 7, 8, N / 2 + 8,
                                   9, N / 2 + 9, 10, N / 2 + 10, 11, N / 2 + 11, 12, N / 2 + 12, 13,
                                   N / 2 + 13, 14, N / 2 + 14, 15, N / 2 + 15);
  else
    return __builtin_shufflevector(low, high, 0, N / 2, 1, N / 2 + 1, 2, N / 2 + 2, 3, N / 2 + 3, 4,
                                   N / 2 + 4, 5, N / 2 + 5, 6, N / 2 + 6, 7, N / 2 + 7);
}

// Four rows -> four bytes of each output, as dot4 takes them.
inline void interleave(const Row (&row)[4], int8_t* to) {
  typedef uint8_t Sixteen __attribute__((vector_size(16)));
  typedef uint16_t Eight __attribute__((vector_size(16)));
  for (int n = 0; n < P; n += 16) {
    Sixteen part[4];
    for (int i = 0; i < 4; i++) std::memcpy(&part[i], reinterpret_cast<const char*>(&row[i]) + n, 16);
    const auto low = [](Sixteen x, Sixteen y) {
      return (Eight)__builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                            23);
    };
    const auto high = [](Sixteen x, Sixteen y) {
      return (Eight)__builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                            30, 15, 31);
    };
    const auto both = [](Eight x, Eight y, int8_t* out) {
      store(out, __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11));
      store(out + 16, __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15));
    };
    both(low(part[0], part[1]), low(part[2], part[3]), to + 4 * n);
    both(high(part[0], part[1]), high(part[2], part[3]), to + 4 * n + 32);
  }
}

// Codes of row k of an 8-bit weight [K, N], from output n on; zeros where outputs end.
inline Row eight_bits(const Weight& w, int64_t k, int64_t n) {
  const uint8_t* from = w.codes + k * w.n + n;
  if (n + P <= w.n) return load<Row>(from);
  Row out{};
  std::memcpy(&out, from, size_t(w.n - n));
  return out;
}

// Codes 0 to 15 that stand for -8 to 7, as 8 bits. steps: in 128ths.
inline Row grown(Row codes, const int16_t* steps) {
  const Shorts step = load<Shorts>(steps);
  const Shorts wide = __builtin_convertvector(codes, Shorts) * step + (64 - 8 * step);
  return __builtin_convertvector((SignedShorts)wide >> 7, Row);
}

// The same of a 4-bit weight [K, N].
inline Row four_bits(const Weight& w, int64_t k, int64_t n, const int16_t* steps) {
  const int64_t at = k * w.n + n;
  if (n + P <= w.n && at % 2 == 0)
    return grown(nibbles<P>(load<HalfRow>(w.codes + at / 2) ^ 0x88), steps);
  Row codes = Row{} + 8;
  for (int i = 0; i < P && n + i < w.n; i++) {
    const uint8_t byte = w.codes[(at + i) / 2];
    codes[i] = uint8_t(((at + i) % 2 ? byte >> 4 : byte & 15) ^ 8);
  }
  return grown(codes, steps);
}

// Lay out outputs first .. first + P of `w`; taps of `channels` inputs, each filled up to `padded`.
void lay_out(const Weight& w, int64_t first, int64_t channels, int64_t padded, Panel& panel) {
  const int count = int(std::min<int64_t>(P, w.n - first));
  const int64_t taps = w.k / channels, groups = w.bits == 4 ? (w.k + w.group - 1) / w.group : 0;
  // What each code is multiplied with to become one of 8 bits, in 128ths.
  constexpr float MOST = 32767.0f / 8;
  static thread_local std::vector<int16_t> steps;
  steps.assign(size_t(groups * P), 0);
  const float grow = w.bits == 4 ? WEIGHT_MAX / 127.0f : 1.0f;
  for (int n = 0; n < P; n++) panel.scale[n] = n < count ? w.scale[first + n] / grow : 0;
  for (int64_t g = 0; g < groups; g++)
    for (int n = 0; n < count; n++) {
      const float step = w.layout == Weight::ROWS_K_BY_N
                             ? grow / from_half(w.steps[g * w.n + first + n])
                             : from_half(w.steps[(first + n) * groups + g]) / panel.scale[n];
      // A step may be anything: the bounds are the first arguments, which stay beside NaN.
      steps[size_t(g * P + n)] = int16_t(std::max(-MOST, std::min(MOST, step * 128 + 0.5f)));
    }
  if (w.layout == Weight::ROWS_K_BY_N) {
    for (int64_t tap = 0; tap < taps; tap++)
      for (int64_t c = 0; c < padded; c += 4) {
        int8_t* to = panel.codes + (tap * padded + c) * P;
        // Rows lie far apart: the processor doesn't see by itself what comes next.
        for (int64_t i = AHEAD; i < AHEAD + 4; i++)
          __builtin_prefetch(w.codes + ((tap * channels + c + i) * w.n + first) * w.bits / 8);
        Row row[4] = {};
        for (int i = 0; i < 4 && c + i < channels; i++) {
          const int64_t k = tap * channels + c + i;
          row[i] = w.bits == 8 ? eight_bits(w, k, first)
                               : four_bits(w, k, first, &steps[size_t(k / w.group * P)]);
        }
        interleave(row, to);
      }
  } else {  // only linears: one tap
    const int64_t bytes = groups * w.group / 2;
    if (count < P || padded != channels) std::memset(panel.codes, 0, size_t(padded * P));
    for (int n = 0; n < count; n++) {
      const uint8_t* from = w.codes + (first + n) * bytes;
      for (int64_t g = 0; g < groups; g++) {
        int16_t step[P];
        for (int i = 0; i < P; i++) step[i] = steps[size_t(g * P + n)];
        const int64_t end = std::min<int64_t>(channels, (g + 1) * w.group);
        int8_t* to = panel.codes + 4 * n;
        int64_t k = g * w.group;
        for (; k + P <= end; k += P) {
          uint8_t eight[P];
          store(eight, grown(nibbles<P>(load<HalfRow>(from + k / 2)), step));
#pragma GCC unroll 8
          for (int i = 0; i < P; i += 4) std::memcpy(to + (k + i) * P, eight + i, 4);
        }
        for (; k < end; k += 2) {
          const int pair[2] = {from[k / 2] & 15, from[k / 2] >> 4};
          for (int i = 0; i < 2 && k + i < end; i++)
            to[(k + i) / 4 * 4 * P + (k + i) % 4] =
                int8_t(((pair[i] - 8) * int(step[0]) + 64) >> 7);
        }
      }
    }
  }
  vi sum[NR] = {};
  for (int64_t k = 0; k < taps * padded; k += 4)
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++)
      sum[n] = dot4(sum[n], vi_set(0x01010101), load<vi>(panel.codes + k * P + n * W * 4));
  for (int n = 0; n < NR; n++) store(panel.sum + n * W, sum[n]);
}

// out [MR][P] = MR rows times a panel. left: for each tap MR pointers to `width` bytes.
void product(const uint8_t* const* left, int64_t taps, int64_t width, const int8_t* panel,
             int32_t* out) {
  vi sum[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++) sum[m][n] = vi{};
  for (int64_t tap = 0; tap < taps; tap++, left += MR) {
    const uint8_t* row[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) row[m] = left[m];
    int64_t k = 0;
#ifdef EDGESD_LANES
    for (; k + 16 <= width; k += 16) {
      int8x16_t a[MR];
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) a[m] = vld1q_s8(reinterpret_cast<const int8_t*>(row[m] + k));
      const auto step = [&](auto lane) {
        asm volatile("" : "+r"(panel));  // or GCC loads all at once, and spills
#pragma GCC unroll 8
        for (int n = 0; n < NR; n++) {
          const vi right = load<vi>(panel + n * W * 4);
#pragma GCC unroll 16
          for (int m = 0; m < MR; m++)
            sum[m][n] = dot4_lane<decltype(lane)::value>(sum[m][n], a[m], right);
        }
        panel += 4 * P;
      };
      step(std::integral_constant<int, 0>());
      step(std::integral_constant<int, 1>());
      step(std::integral_constant<int, 2>());
      step(std::integral_constant<int, 3>());
    }
#endif
    for (; k < width; k += 4, panel += 4 * P) {
      vi right[NR];
#pragma GCC unroll 8
      for (int n = 0; n < NR; n++) right[n] = load<vi>(panel + n * W * 4);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) {
        int32_t four;
        std::memcpy(&four, row[m] + k, 4);
        const vi a = vi_set(four);
#pragma GCC unroll 8
        for (int n = 0; n < NR; n++) sum[m][n] = dot4(sum[m][n], a, right[n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++) store(out + m * P + n * W, sum[m][n]);
}

// gelu(x) = x Phi(x), by the error function as Abramowitz and Stegun, 7.1.26, to 1.5e-7.
inline vf gelu(vf x) {
  const vf z = x * 0.70710678f, size = maximum(z, -z);
  const vf t = 1.0f / (1.0f + 0.3275911f * size);
  vf p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  vf erf = 1.0f - p * t * exp2_below<1>(z * z * -1.44269504f);
  erf = (vf)(((vi)erf & 0x7fffffff) | ((vi)z & int32_t(0x80000000)));
  return 0.5f * x * (1.0f + erf);
}

// The same by the hyperbolic tangent (arXiv 1606.08415, section 2): x sigmoid(2 u).
inline vf gelu_by_tanh(vf x) {
  const vf u = x * (0.79788456f + 0.035677408f * x * x);
  const vf fading = exp2_below<1>(minimum(u, -u) * 2.88539008f);
  return x * (u < 0.0f ? fading : vf_set(1)) / (1.0f + fading);
}

int64_t panels_of(int64_t n) { return (n + P - 1) / P; }

// Parts that rows are cut into, so that every thread gets panels, at little laying out in vain.
int64_t parts_of(int64_t panels, int64_t rows) {
  int64_t parts = 1;
  while (panels * parts < 16 && rows / (parts * 2) >= 256) parts *= 2;
  return parts;
}

// Adds to values [valid <= MR, P] the product of rows of `low` and a panel [rank][P] of `up`.
void add_low_rank(float* values, const float* low, int valid, const float* up, int64_t rank) {
  const float* rows[MR];
  vf sums[MR][NR];
  for (int i = 0; i < MR; i++) {
    const int row = std::min(i, valid - 1);
    rows[i] = low + row * rank;
    for (int n = 0; n < NR; n++) sums[i][n] = load<vf>(values + row * P + n * W);
  }
  for (int64_t r = 0; r < rank; r++) {
    vf right[NR];
    for (int n = 0; n < NR; n++) right[n] = load<vf>(up + r * P + n * W);
    for (int i = 0; i < MR; i++)
      for (int n = 0; n < NR; n++) sums[i][n] += rows[i][r] * right[n];
  }
  for (int i = 0; i < valid; i++)
    for (int n = 0; n < NR; n++) store(values + i * P + n * W, sums[i][n]);
}

void linear(const Linear& job, Threads threads) {
  const Weight& w = job.weight;
  const int64_t padded = (w.k + 3) / 4 * 4;
  static thread_local Scratch<uint8_t> left_memory;
  static thread_local std::vector<Format> formats;
  uint8_t* left = left_memory.get(size_t(job.m * padded) + 64);
  formats.resize(size_t(job.m));
  Format* formats_of = formats.data();
  auto quantize = [&](size_t block) {
    const int64_t end = std::min<int64_t>(job.m, int64_t(block + 1) * 16);
    for (int64_t m = int64_t(block) * 16; m < end; m++) {
      const float* x = job.x + m * w.k;
      float low = 0, high = 0;
      range(x, w.k, low, high);
      const Format f = formats_of[m] = format(low, high);
      uint8_t* to = left + m * padded;
      int64_t k = 0;
      for (; k + W <= w.k; k += W)
        store(to + k, __builtin_convertvector(codes_of(load<vf>(x + k), f) - SHIFT, vb));
      for (; k < w.k; k++) to[k] = uint8_t(code_of(x[k], f) - SHIFT);
      for (; k < padded; k++) to[k] = 0;
    }
  };
  parallel(threads, size_t(job.m + 15) / 16, quantize);

  const int64_t outputs = job.gated ? w.n / 2 : w.n;
  const int64_t panels = panels_of(outputs), parts = parts_of(panels, job.m);
  const int64_t part = (job.m + parts - 1) / parts;
  auto multiply = [&](size_t task) {
    const int64_t first = int64_t(task) % panels * P;
    const int64_t begin = int64_t(task) / panels * part, end = std::min(job.m, begin + part);
    const int count = int(std::min<int64_t>(P, outputs - first));
    const int sides = job.gated ? 2 : 1;
    static thread_local Scratch<int8_t> memory;
    int8_t* codes = memory.get(size_t(padded * P) * 2);
    Panel panel[2];
    for (int side = 0; side < sides; side++) {
      panel[side].codes = codes + side * padded * P;
      lay_out(w, first + side * outputs, w.k, padded, panel[side]);
    }
    static thread_local Scratch<float> factors;
    float* up = job.rank ? factors.get(size_t(job.rank * P) * 2) : nullptr;
    for (int side = 0; side < sides && up; side++)
      for (int64_t r = 0; r < job.rank; r++) {
        float* to = up + (side * job.rank + r) * P;
        std::memcpy(to, job.up + r * w.n + first + side * outputs, size_t(count) * 4);
        std::memset(to + count, 0, size_t(P - count) * 4);
      }
    alignas(64) int32_t sums[MR * P];
    alignas(64) float found[2][MR * P];
    for (int64_t m = begin; m < end; m += MR) {
      const uint8_t* rows[MR];
      const int valid = int(std::min<int64_t>(MR, end - m));
      for (int i = 0; i < MR; i++) rows[i] = left + std::min(m + i, end - 1) * padded;
      for (int side = 0; side < sides; side++) {
        product(rows, 1, padded, panel[side].codes, sums);
        const float* bias = job.bias ? job.bias + first + side * outputs : nullptr;
        for (int i = 0; i < valid; i++) {
          const Format f = formats_of[m + i];
          for (int n = 0; n < P; n += W) {
            const vi sum = load<vi>(sums + i * P + n) -
                           (f.zero - SHIFT) * load<vi>(panel[side].sum + n);
            store(found[side] + i * P + n, to_float(sum) * f.scale * load<vf>(panel[side].scale + n));
          }
          if (bias)
            for (int n = 0; n < count; n++) found[side][i * P + n] += bias[n];
        }
        if (up)
          add_low_rank(found[side], job.low + m * job.rank, valid, up + side * job.rank * P,
                       job.rank);
      }
      for (int i = 0; i < valid; i++) {
        float* y = job.y + (m + i) * outputs + first;
        float* from = found[0] + i * P;
        if (job.gated)
          for (int n = 0; n < P; n += W)
            store(from + n, load<vf>(from + n) * gelu(load<vf>(found[1] + i * P + n)));
        if (job.gelu)
          for (int n = 0; n < P; n += W) store(from + n, gelu_by_tanh(load<vf>(from + n)));
        if (job.gate) {
          const float* factor = job.gate + (m + i) / (job.m / job.gates) * outputs + first;
          for (int n = 0; n < count; n++) from[n] *= factor[n];
        }
        if (job.residual) {
          const float* add = job.residual + (m + i) * outputs + first;
          for (int n = 0; n < count; n++) y[n] = from[n] + add[n];
        } else {
          std::memcpy(y, from, size_t(count) * 4);
        }
      }
    }
  };
  parallel(threads, size_t(panels * parts), multiply);
}

// What happens to a channel's values before they are convolved: silu(x * factor + term).
struct Before {
  float factor, term;
  bool silu;
};

inline vf prepared(vf x, Before before) {
  const vf v = x * before.factor + before.term;
  if (!before.silu) return v;
  const vf fading = exp2_below<1>(minimum(v, -v) * 1.44269504f);
  return v * (v < 0.0f ? fading : vf_set(1)) / (1.0f + fading);
}
inline float prepared(float x, Before before) { return prepared(vf_set(x), before)[0]; }

// The factors and terms of group normalization, for each channel; 1 and 0 without it.
void normalization(const Conv& job, const float* x, Before* out, Threads threads) {
  if (!job.gamma) {
    for (int64_t c = 0; c < job.channels; c++) out[c] = {1, 0, job.silu};
    return;
  }
  const int64_t each = job.channels / job.groups, pixels = job.height * job.width;
  auto group = [&](size_t which) {
    const int64_t first = int64_t(which) * each, count = each * pixels;
    const float* from = x + first * pixels;
    const auto mean_of = [&](auto value) {
      double total = 0;
      int64_t i = 0;
      while (i + W <= count) {  // parts whose sums single precision holds
        vf sum = vf{};
        for (const int64_t end = std::min(i + 4096, count); i + W <= end; i += W)
          sum += value(load<vf>(from + i));
        for (int j = 0; j < W; j++) total += sum[j];
      }
      for (; i < count; i++) total += value(vf_set(from[i]))[0];
      return float(total / double(count));
    };
    const float mean = mean_of([](vf v) { return v; });
    const float variance = mean_of([mean](vf v) { return (v - mean) * (v - mean); });
    const float inverse = 1 / std::sqrt(variance + job.epsilon);
    for (int64_t c = first; c < first + each; c++)
      out[c] = {job.gamma[c] * inverse, job.beta[c] - mean * job.gamma[c] * inverse, job.silu};
  };
  parallel(threads, size_t(job.groups), group);
}

// x [channels, height, width], prepared, as codes [height + top + bottom, width + left + right,
// padded], height and width being those after upsampling.
void image_codes(const Conv& job, const float* x, const Before* before, Format f, int64_t padded,
                 uint8_t* to, Threads threads) {
  const int64_t up = job.upsample, wide = job.width * up + job.left + job.right;
  const int64_t tall = job.height * up + job.top + job.bottom;
  const int none = uint8_t(f.zero - SHIFT);
  auto row = [&](size_t y) {
    uint8_t* line = to + int64_t(y) * wide * padded;
    const int64_t source = (int64_t(y) - job.top + up) / up - 1;  // the floor, below 0 too
    if (source < 0 || source >= job.height) {
      std::memset(line, none, size_t(wide * padded));
      return;
    }
    std::memset(line, none, size_t(job.left * padded));
    std::memset(line + (job.left + job.width * up) * padded, none, size_t(job.right * padded));
    line += job.left * padded;
    const int64_t plane = job.height * job.width;
    for (int64_t c = 0; c < padded; c += 4) {
      const float* from[4];
      Before each[4];
      for (int i = 0; i < 4; i++) {
        const int64_t channel = std::min(c + i, job.channels - 1);
        from[i] = x + channel * plane + source * job.width;
        each[i] = before[channel];
      }
      int64_t column = 0;
      for (; column + W <= job.width; column += W) {
        vi four = vi{};
        for (int i = 0; i < 4; i++) {
          const vf v = prepared(load<vf>(from[i] + column), each[i]);
          four |= ((codes_of(v, f) - SHIFT) & 255) << (8 * i);
        }
        for (int i = 0; i < W; i++) {
          const int32_t bytes = four[i];
          for (int64_t j = 0; j < up; j++)
            std::memcpy(line + ((column + i) * up + j) * padded + c, &bytes, 4);
        }
      }
      for (; column < job.width; column++)
        for (int i = 0; i < 4; i++)
          for (int64_t j = 0; j < up; j++)
            line[(column * up + j) * padded + c + i] =
                uint8_t(code_of(prepared(from[i][column], each[i]), f) - SHIFT);
    }
  };
  parallel(threads, size_t(tall), row);
}

void conv(const Conv& job, Threads threads) {
  const Weight& w = job.weight;
  const int64_t padded = (job.channels + 3) / 4 * 4, taps = job.kernel_h * job.kernel_w;
  const int64_t wide = job.width * job.upsample + job.left + job.right;
  const int64_t tall = job.height * job.upsample + job.top + job.bottom;
  const int64_t pixels = job.out_height * job.out_width;
  static thread_local Scratch<uint8_t> image_memory;
  uint8_t* image = image_memory.get(size_t(wide * tall * padded) + 64);
  for (int64_t b = 0; b < job.batch; b++) {
    const float* x = job.x + b * job.channels * job.height * job.width;
    static thread_local std::vector<float> ends;
    ends.assign(size_t(2 * job.channels), 0);
    float* ends_of = ends.data();
    static thread_local std::vector<Before> before;
    before.resize(size_t(job.channels));
    Before* before_of = before.data();
    normalization(job, x, before_of, threads);
    auto measure = [&](size_t c) {
      const Before& each = before_of[c];
      range(x + int64_t(c) * job.height * job.width, job.height * job.width, ends_of[2 * c],
            ends_of[2 * c + 1], [&each](vf v) { return prepared(v, each); });
    };
    parallel(threads, size_t(job.channels), measure);
    float low = 0, high = 0;
    range(ends_of, 2 * job.channels, low, high);
    const Format f = format(low, high);
    image_codes(job, x, before_of, f, padded, image, threads);

    const int64_t panels = panels_of(w.n), parts = parts_of(panels, pixels);
    const int64_t part = ((pixels + parts - 1) / parts + MR - 1) / MR * MR;
    auto multiply = [&](size_t task) {
      const int64_t first = int64_t(task) % panels * P;
      const int64_t begin = int64_t(task) / panels * part, end = std::min(pixels, begin + part);
      const int count = int(std::min<int64_t>(P, w.n - first));
      static thread_local Scratch<int8_t> memory;
      Panel panel;
      panel.codes = memory.get(size_t(taps * padded * P));
      lay_out(w, first, job.channels, padded, panel);
      float shift[P];
      for (int n = 0; n < count; n++) {
        const float offset = job.offset ? job.offset[b * w.n + first + n] : 0;
        shift[n] = offset + (job.bias ? job.bias[first + n] : 0) -
                   float((f.zero - SHIFT)) * float(panel.sum[n]) * f.scale * panel.scale[n];
        panel.scale[n] *= f.scale;
      }
      std::vector<const uint8_t*> rows(size_t(taps * MR));
      alignas(64) int32_t sums[MR * P];
      float* y = job.y + (b * w.n + first) * pixels;
      const float* add = job.residual ? job.residual + (b * w.n + first) * pixels : nullptr;
      for (int64_t m = begin; m < end; m += MR) {
        for (int i = 0; i < MR; i++) {
          const int64_t pixel = std::min(m + i, end - 1);
          const uint8_t* corner =
              image + (pixel / job.out_width * job.stride_h * wide +
                       pixel % job.out_width * job.stride_w) * padded;
          for (int64_t tap = 0; tap < taps; tap++)
            rows[size_t(tap * MR + i)] =
                corner + (tap / job.kernel_w * wide + tap % job.kernel_w) * padded;
        }
        product(rows.data(), taps, padded, panel.codes, sums);
        const int valid = int(std::min<int64_t>(MR, end - m));
        for (int n = 0; n < count; n++) {
          float* to = y + n * pixels + m;
          const float scale = panel.scale[n], offset = shift[n];
          if (valid == MR) {
            float line[MR];
#pragma GCC unroll 16
            for (int i = 0; i < MR; i++) line[i] = float(sums[i * P + n]) * scale + offset;
            if (add) {
              const float* from = add + n * pixels + m;
#pragma GCC unroll 16
              for (int i = 0; i < MR; i++) line[i] += from[i];
            }
            if (job.relu)
#pragma GCC unroll 16
              for (int i = 0; i < MR; i++) line[i] = line[i] < 0 ? 0 : line[i];  // NaN stays
            std::memcpy(to, line, sizeof line);
          } else {
            for (int i = 0; i < valid; i++) {
              to[i] = float(sums[i * P + n]) * scale + offset + (add ? add[n * pixels + m + i] : 0);
              if (job.relu && to[i] < 0) to[i] = 0;
            }
          }
        }
      }
    };
    parallel(threads, size_t(panels * parts), multiply);
  }
}

// Attention in 8 bits: SageAttention's smoothed keys and a scale for each query and key
// (arXiv 2410.02367, sections 4.2 and 4.3), FlashAttention's running maximum (arXiv 2205.14135,
// algorithm 1), and probabilities in 8 bits relative to the largest of their block of keys, so that
// one large one doesn't round the rest of the row away.
constexpr int QUERY_MAX = LEFT_MAX == 255 ? 127 : 63, QUERY_ZERO = LEFT_MAX == 255 ? 128 : 64;

// 2^(eighths / 8); 0 where that is less than single precision holds.
inline float power(int eighths) {
  static const float part[8] = {1,           1.09050773f, 1.18920712f, 1.29683955f,
                                1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f};
  if (eighths <= -8 * 126) return 0;
  int32_t bits;
  std::memcpy(&bits, &part[eighths & 7], 4);
  bits += (eighths >> 3) * (1 << 23);
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// A row of one head, filled up with zeros to whole vectors.
struct Line {
  alignas(64) float x[(MAX_HEAD + 15) / 16 * 16];
  int count;
  Line(const float* from, int count) : count(count) {
    std::memcpy(x, from, size_t(count) * sizeof(float));
    std::memset(x + count, 0, size_t((16 - count % 16) % 16) * sizeof(float));
  }
  // The largest magnitude; NaN where there is NaN or infinity.
  float largest() const {
    vf most = vf{}, zeros = vf{};
    for (int i = 0; i < count; i += W) {
      const vf v = load<vf>(x + i);
      most = maximum(most, maximum(v, -v));
      zeros += v * 0.0f;
    }
    return lanes_max(most) + lanes_sum(zeros);
  }
  void normalize(const float* weight, float epsilon) {
    vf squares = vf{};
    for (int i = 0; i < count; i += W) squares += load<vf>(x + i) * load<vf>(x + i);
    const float inverse = 1 / std::sqrt(lanes_sum(squares) / float(count) + epsilon);
    int i = 0;
    for (; i + W <= count; i += W) store(x + i, load<vf>(x + i) * inverse * load<vf>(weight + i));
    for (; i < count; i++) x[i] *= inverse * weight[i];
  }
  void rotate(const float* cos, const float* sin) {
    vf sign = vf_set(1);
    for (int i = 0; i < W; i += 2) sign[i] = -1;
    int i = 0;
    for (; i + W <= count; i += W) {
      const vf v = load<vf>(x + i);
      store(x + i, v * twice(load<vh>(cos + i / 2)) +
                       swapped(v) * sign * twice(load<vh>(sin + i / 2)));
    }
    for (; i < count; i += 2) {
      const float left = x[i], right = x[i + 1], c = cos[i / 2], s = sin[i / 2];
      x[i] = left * c - right * s;
      x[i + 1] = right * c + left * s;
    }
  }
};

// Tokens of one image and head: queries, keys or values.
class Tokens {
 public:
  Tokens(const Attention& job, int64_t b, int h, const float* x, int64_t count, const float* norm,
         const float* first, const float* first_norm, bool rotated = true)
      : job_(job),
        stride_(int64_t(job.heads) * job.d),
        first_(first + b * job.first * stride_ + h * job.d),
        rest_(x + (b * (count - job.first) - job.first) * stride_ + h * job.d),
        first_norm_(first_norm),
        norm_(norm),
        rotated_(rotated && job.cos) {}
  bool as_they_are() const { return !norm_ && !first_norm_ && !rotated_; }
  const float* at(int64_t i) const { return (i < job_.first ? first_ : rest_) + i * stride_; }
  Line line(int64_t i) const {
    Line out(at(i), job_.d);
    const float* norm = i < job_.first ? first_norm_ : norm_;
    const int64_t angles = i * (job_.d / 2);
    if (norm) out.normalize(norm, job_.epsilon);
    if (rotated_) out.rotate(job_.cos + angles, job_.sin + angles);
    return out;
  }

 private:
  const Attention& job_;
  int64_t stride_;
  const float *first_, *rest_, *first_norm_, *norm_;
  bool rotated_;
};

struct Head {
  const int8_t* keys;    // [blocks][d4][KEYS][4]
  const int8_t* values;  // [blocks][KEYS / 4][wide][4]
  const float* key_scale;
  const int32_t* key_zero;  // what the queries' zero adds to each key's product, negative
  const float* value_scale;  // [d]
};

constexpr int TOGETHER = 4;  // times ATTENTION_ROWS: rows that meet a block of keys in the cache
constexpr int STEP = W < 8 ? 8 / W : 1;  // vectors that a width is a multiple of: less to compile
constexpr int COLUMNS = 4;   // vectors of a product's columns whose sums stay in registers

// sum [R][C] plus R rows of `left`, `stride` bytes apart, times C vectors of `right`, whose rows are
// `wide` bytes.
template <int R, int C>
inline __attribute__((always_inline)) void add_product(vi (&sum)[R][C], const uint8_t* left,
                                                       int64_t stride, int64_t steps,
                                                       const int8_t* right, int64_t wide) {
  int64_t k = 0;
#ifdef EDGESD_LANES
  for (; k + 4 <= steps; k += 4) {
    int8x16_t a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      a[r] = vld1q_s8(reinterpret_cast<const int8_t*>(left + r * stride + 4 * k));
    const auto step = [&](auto lane) {
      asm volatile("" : "+r"(right));
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) {
        const vi column = load<vi>(right + c * W * 4);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
          sum[r][c] = dot4_lane<decltype(lane)::value>(sum[r][c], a[r], column);
      }
      right += wide;
    };
    step(std::integral_constant<int, 0>());
    step(std::integral_constant<int, 1>());
    step(std::integral_constant<int, 2>());
    step(std::integral_constant<int, 3>());
  }
#endif
  for (; k < steps; k++, right += wide) {
    vi column[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) column[c] = load<vi>(right + c * W * 4);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int32_t four;
      std::memcpy(&four, left + r * stride + 4 * k, 4);
      const vi a = vi_set(four);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sum[r][c] = dot4(sum[r][c], a, column[c]);
    }
  }
}

// What rows have gathered of the blocks of keys so far.
template <int D>
struct Gathered {
  alignas(64) uint8_t query[(MAX_HEAD + 15) / 16 * 16];
  float scale;
  int most;  // in eighths
  vf count;  // of probabilities, in each lane
  vf out[D];
};

// One block of keys and values for R rows. left: keys that there are.
template <int D>
void attend_block(Gathered<D>* rows, const int8_t* keys, const int8_t* values,
                  const float* key_scale, const int32_t* key_zero, int64_t d4, int64_t left) {
  constexpr int R = ATTENTION_ROWS, V = KEYS / W;
  alignas(64) int32_t sums[R][KEYS];
#pragma GCC unroll 4
  for (int first = 0; first < V; first += COLUMNS) {
    vi sum[R][COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; c++)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sum[r][c] = load<vi>(key_zero + (first + c) * W);
    add_product<R, COLUMNS>(sum, rows[0].query, sizeof rows[0], d4, keys + first * W * 4, KEYS * 4);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; c++) store(&sums[r][(first + c) * W], sum[r][c]);
  }
  alignas(64) uint8_t chances[R][KEYS];
  float weight[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    Gathered<D>& row = rows[r];
    vf score[V];
    vf top = vf_set(-3e38f);
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) {
      score[i] = to_float(load<vi>(&sums[r][i * W])) * load<vf>(key_scale + i * W);
      if (left < KEYS)
        for (int j = 0; j < W; j++)
          if (i * W + j >= left) score[i][j] = -3e38f;
      top = maximum(top, score[i]);
    }
    // The largest of the block, rounded up to an eighth: what blocks differ by is exact then.
    const float eighths = std::ceil(lanes_max(top) * row.scale * 8);
    const float largest = eighths * 0.125f;
    const int steps = eighths > -1e6f ? int(std::min(eighths, 1e6f)) : -1000000;
    vi codes[V];
#pragma GCC unroll 16
    for (int i = 0; i < V; i++)
      codes[i] = nearest(exp2_below<PROBABILITY_MAX>(score[i] * row.scale - largest));
#pragma GCC unroll 16
    for (int i = 0; i < V; i += 16 / W) store_bytes(&chances[r][i * W], &codes[i]);
    if (steps > row.most) {
      const float fade = power(row.most - steps);
      for (int i = 0; i < D; i++) row.out[i] *= fade;
      row.count *= fade;
      row.most = steps;
      weight[r] = 1;
    } else {
      weight[r] = power(steps - row.most);
    }
    vi count = vi{};
    for (int i = 0; i < KEYS; i += 4 * W)
      count = dot4(count, load<vi>(&chances[r][i]), vi_set(0x01010101));
    row.count += to_float(count) * weight[r];
  }
  const auto gather = [&](auto columns, int first) {
    constexpr int C = decltype(columns)::value;
    vi part[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) part[r][c] = vi{};
    add_product<R, C>(part, chances[0], KEYS, KEYS / 4, values + first * W * 4, D * W * 4);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) rows[r].out[first + c] += to_float(part[r][c]) * weight[r];
  };
  int first = 0;
  for (; first + COLUMNS <= D; first += COLUMNS)
    gather(std::integral_constant<int, COLUMNS>(), first);
  if constexpr (D % COLUMNS) gather(std::integral_constant<int, D % COLUMNS>(), first);
}

template <int D>  // vectors of the value's width
void attend(const Attention& job, int64_t b, int h, int64_t first, const Head& head) {
  constexpr int COUNT = TOGETHER * ATTENTION_ROWS;
  const int64_t d4 = (job.d + 3) / 4, blocks = (job.n + KEYS - 1) / KEYS;
  const int valid = int(std::min<int64_t>(COUNT, job.m - first));
  const Tokens queries(job, b, h, job.q, job.m, job.q_norm, job.first_q, job.first_q_norm);
  Gathered<D> rows[COUNT];
  for (int r = 0; r < COUNT; r++) {
    Gathered<D>& row = rows[r];
    const Line line = queries.line(std::min(first + r, job.m - 1));
    const float largest = line.largest(), inverse = largest > 0 ? QUERY_MAX / largest : 0;
    for (int i = 0; i < job.d; i += 16) {
      vi codes[16 / W];
      for (int j = 0; j < 16 / W; j++)
        codes[j] = nearest(load<vf>(line.x + i + j * W) * inverse) + (QUERY_ZERO - SHIFT);
      store_bytes(row.query + i, codes);
    }
    row.scale = largest / QUERY_MAX * job.scale * 1.44269504f;  // for 2^x
    row.most = -1000000;
    row.count = vf{};
    for (int i = 0; i < D; i++) row.out[i] = vf{};
  }
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t at = block * KEYS;
    for (int r = 0; r < valid; r += ATTENTION_ROWS)
      attend_block<D>(rows + r, head.keys + at * d4 * 4, head.values + at * D * W,
                      head.key_scale + at, head.key_zero + at, d4, job.n - at);
  }
  const int64_t stride = int64_t(job.heads) * job.d;
  for (int r = 0; r < valid; r++) {
    alignas(64) float line[D * W];
    for (int i = 0; i < D; i++) store(line + i * W, rows[r].out[i]);
    const float total = lanes_sum(rows[r].count);
    for (int i = 0; i < job.d; i++) line[i] *= head.value_scale[i] / total;
    float* y = job.y + (b * job.m + first + r) * stride + h * job.d;
    std::memcpy(y, line, size_t(job.d) * 4);
  }
}

template <int D>
struct Attend {
  static void call(int d, const Attention& job, int64_t b, int h, int64_t first, const Head& head) {
    if (d == D)
      attend<D>(job, b, h, first, head);
    else
      Attend<D - STEP>::call(d, job, b, h, first, head);
  }
};
template <>
struct Attend<0> {
  static void call(int, const Attention&, int64_t, int, int64_t, const Head&) {}
};

void attention(const Attention& job, Threads threads) {
  const int64_t heads = job.batch * job.heads, blocks = (job.n + KEYS - 1) / KEYS;
  const int64_t d4 = (job.d + 3) / 4, wide = (job.d + STEP * W - 1) / (STEP * W) * (STEP * W);
  static thread_local Scratch<int8_t> key_memory, value_memory;
  static thread_local Scratch<float> scale_memory, value_scale_memory;
  static thread_local Scratch<int32_t> sum_memory;
  const int64_t key_bytes = blocks * d4 * KEYS * 4, value_bytes = blocks * KEYS * wide;
  int8_t* keys = key_memory.get(size_t(heads * key_bytes));
  int8_t* values = value_memory.get(size_t(heads * value_bytes));
  float* key_scale = scale_memory.get(size_t(heads * blocks * KEYS));
  int32_t* key_zero = sum_memory.get(size_t(heads * blocks * KEYS));
  float* value_scale = value_scale_memory.get(size_t(heads * wide));

  auto pack = [&](size_t which) {
    const int64_t head = int64_t(which), b = head / job.heads;
    const int h = int(head % job.heads);
    const Tokens key_tokens(job, b, h, job.k, job.n, job.k_norm, job.first_k, job.first_k_norm);
    const Tokens value_tokens(job, b, h, job.v, job.n, nullptr, job.first_v, nullptr, false);
    // Keys that are made are kept until all of them are, which gives their mean.
    static thread_local Scratch<float> made_memory;
    const bool made = !key_tokens.as_they_are();
    float* made_keys = made ? made_memory.get(size_t(job.n * job.d)) : nullptr;
    alignas(64) float mean[MAX_HEAD + 16] = {}, largest[MAX_HEAD + 16] = {}, none = 0;
    vf zeros = vf{};
    for (int64_t n = 0; n < job.n; n++) {
      const Line line = key_tokens.line(n), other(value_tokens.at(n), job.d);
      if (made) std::memcpy(made_keys + n * job.d, line.x, size_t(job.d) * sizeof(float));
      for (int i = 0; i < job.d; i += W) {
        const vf value = load<vf>(other.x + i);
        store(mean + i, load<vf>(mean + i) + load<vf>(line.x + i));
        store(largest + i, maximum(load<vf>(largest + i), maximum(value, -value)));
        zeros += value * 0.0f;
      }
    }
    none += lanes_sum(zeros);
    for (int i = 0; i < job.d; i++) {
      mean[i] /= float(job.n);
      none += mean[i] * 0.0f;
    }
    alignas(64) float inverse[MAX_HEAD + 16] = {};
    for (int i = 0; i < job.d; i++) {
      value_scale[head * wide + i] = largest[i] / 127 + none;
      inverse[i] = largest[i] > 0 ? 127 / largest[i] : 0;
    }
    std::memset(keys + head * key_bytes, 0, size_t(key_bytes));
    for (int64_t n = 0; n < blocks * KEYS; n++) {
      const int64_t at = head * blocks * KEYS + n;
      key_scale[at] = 0;
      key_zero[at] = 0;
      if (n >= job.n) continue;
      Line line(made ? made_keys + n * job.d : key_tokens.at(n), job.d);
      for (int i = 0; i < job.d; i += W)
        store(line.x + i, load<vf>(line.x + i) - load<vf>(mean + i));
      const float most = line.largest(), up = most > 0 ? 127 / most : 0;
      alignas(64) int8_t codes[(MAX_HEAD + 15) / 16 * 16];
      vi sums = vi{};
      for (int i = 0; i < job.d; i += 16) {
        vi part[16 / W];
        for (int j = 0; j < 16 / W; j++) part[j] = nearest(load<vf>(line.x + i + j * W) * up);
        store_bytes(codes + i, part);
        for (int j = 0; j < 16; j += W) sums += (part[j / W] << 24) >> 24;  // of NaN, any
      }
      int8_t* key = keys + head * key_bytes + n / KEYS * d4 * KEYS * 4 + n % KEYS * 4;
      for (int64_t i = 0; i < d4; i++) std::memcpy(key + i * KEYS * 4, codes + 4 * i, 4);
      int32_t sum = 0;
      for (int j = 0; j < W; j++) sum += sums[j];
      key_scale[at] = most / 127;
      key_zero[at] = (SHIFT - QUERY_ZERO) * sum;
    }
    for (int64_t n = 0; n < blocks * KEYS; n += 4) {
      int8_t* value = values + head * value_bytes + n * wide;
      vi four[MAX_HEAD / W] = {};
      for (int64_t i = 0; i < 4 && n + i < job.n; i++) {
        const Line line(value_tokens.at(n + i), job.d);
        for (int64_t j = 0; j < wide; j += W)
          four[j / W] |= (nearest(load<vf>(line.x + j) * load<vf>(inverse + j)) & 255) << (8 * i);
      }
      std::memcpy(value, four, size_t(wide * 4));
    }
  };
  parallel(threads, size_t(heads), pack);

  constexpr int64_t ROWS = TOGETHER * ATTENTION_ROWS;
  const int64_t parts = (job.m + ROWS - 1) / ROWS;
  auto rows = [&](size_t task) {
    const int64_t head = int64_t(task) / parts, part = int64_t(task) % parts;
    const Head packed{keys + head * key_bytes, values + head * value_bytes,
                      key_scale + head * blocks * KEYS, key_zero + head * blocks * KEYS,
                      value_scale + head * wide};
    Attend<MAX_HEAD / W>::call(int(wide / W), job, head / job.heads,
                                         int(head % job.heads), part * ROWS, packed);
  };
  parallel(threads, size_t(heads * parts), rows);
}

constexpr int S = W < 8 ? W : 8;  // bytes of codes at a time: half a group is a multiple of 8
typedef float vs __attribute__((vector_size(S * 4)));
typedef int32_t is __attribute__((vector_size(S * 4)));
typedef uint8_t bs __attribute__((vector_size(S)));
typedef int8_t cs __attribute__((vector_size(S)));

// One output of R rows. x: of each row, of each group its even values, then its odd ones, as a byte of
// codes has one of each.
template <int R>
void row_sums(const Rows& job, const float* x, int64_t stride, int64_t n, float* y) {
  const int64_t groups = job.groups(), half = job.group / 2;
  const uint8_t* codes = job.codes + n * groups * half;
  vs total[R] = {};
  for (int64_t g = 0; g < groups; g++, codes += half) {
    vs sum[R] = {};
    for (int64_t i = 0; i < half; i += S) {
      const is both = __builtin_convertvector(load<bs>(codes + i), is);
      const vs even = __builtin_convertvector((both & 15) - 8, vs);
      const vs odd = __builtin_convertvector((both >> 4) - 8, vs);
      for (int r = 0; r < R; r++) {
        const float* row = x + r * stride + g * job.group + i;
        sum[r] += even * load<vs>(row) + odd * load<vs>(row + half);
      }
    }
    const float scale = from_half(job.scales[n * groups + g]);
    for (int r = 0; r < R; r++) total[r] += sum[r] * scale;
  }
  for (int r = 0; r < R; r++) {
    float sum = 0;
    for (int i = 0; i < S; i++) sum += total[r][i];
    y[r * job.n + n] = sum;
  }
}

void rows_of_4_bits(const Rows& job, Threads threads) {
  constexpr int64_t PART = 32;
  const int64_t group = job.group, half = group / 2, stride = job.groups() * group;
  std::vector<float> halves(size_t(job.m * stride));  // zeros behind each row's end
  for (int64_t r = 0; r < job.m; r++)
    for (int64_t i = 0; i < job.k; i++) {
      const int64_t in = i % group;
      halves[size_t(r * stride + i - in + in / 2 + in % 2 * half)] = job.x[r * job.k + i];
    }
  auto part = [&](size_t task) {
    const int64_t end = std::min(job.n, int64_t(task + 1) * PART);
    for (int64_t n = int64_t(task) * PART; n < end; n++) {
      int64_t r = 0;
      for (; r + 4 <= job.m; r += 4)
        row_sums<4>(job, halves.data() + r * stride, stride, n, job.y + r * job.n);
      for (; r < job.m; r++)
        row_sums<1>(job, halves.data() + r * stride, stride, n, job.y + r * job.n);
    }
  };
  parallel(threads, size_t((job.n + PART - 1) / PART), part);
}

// Weights lie input by input: of each, some outputs are read at a time.
void rows_of_8_bits(const Rows& job, Threads threads) {
  constexpr int64_t PART = 512, SOON = 16, LINE = 64;
  auto part = [&](size_t task) {
    const int64_t begin = int64_t(task) * PART, columns = std::min(PART, job.n - begin);
    std::vector<float> sums(size_t(job.m * columns));
    for (int64_t k = 0; k < job.k; k++) {
      const uint8_t* codes = job.codes + k * job.n + begin;
      if (k + SOON < job.k)
        for (int64_t j = 0; j < columns; j += LINE) __builtin_prefetch(codes + SOON * job.n + j);
      for (int64_t r = 0; r < job.m; r++) {
        const float x = job.x[r * job.k + k];
        float* sum = sums.data() + r * columns;
        int64_t j = 0;
        for (; j + S <= columns; j += S) {
          const is eight = __builtin_convertvector((cs)load<bs>(codes + j), is);
          store(sum + j, load<vs>(sum + j) + x * __builtin_convertvector(eight, vs));
        }
        for (; j < columns; j++) sum[j] += x * float(int8_t(codes[j]));
      }
    }
    for (int64_t r = 0; r < job.m; r++)
      for (int64_t j = 0; j < columns; j++)
        job.y[r * job.n + begin + j] = sums[size_t(r * columns + j)] * from_half(job.scales[begin + j]);
  };
  parallel(threads, size_t((job.n + PART - 1) / PART), part);
}

void rows(const Rows& job, Threads threads) {
  job.bits == 4 ? rows_of_4_bits(job, threads) : rows_of_8_bits(job, threads);
}

void widen(const Halves& job, Threads threads) {
  constexpr int64_t PART = 1 << 15;
  auto part = [&](size_t task) {
    int64_t i = int64_t(task) * PART;
    const int64_t end = std::min(job.count, i + PART);
    for (; i + W <= end; i += W) store(job.y + i, from_halves(job.x + i));
    if (i == end) return;
    uint16_t last[W] = {};
    float wide[W];
    std::memcpy(last, job.x + i, size_t(end - i) * 2);
    store(wide, from_halves(last));
    std::memcpy(job.y + i, wide, size_t(end - i) * 4);
  };
  parallel(threads, size_t((job.count + PART - 1) / PART), part);
}

}  // namespace

#define EDGESD_TEXT(name) #name
#define EDGESD_NAME(name) EDGESD_TEXT(name)
const Compute found{EDGESD_NAME(EDGESD_ISA), WEIGHT_MAX, linear, rows, conv, attention, widen};

}  // namespace EDGESD_ISA

#define EDGESD_JOIN(a, b) a##b
#define EDGESD_FUNCTION(isa) EDGESD_JOIN(isa, _compute)
const Compute* EDGESD_FUNCTION(EDGESD_ISA)() { return &EDGESD_ISA::found; }

}  // namespace edgesd
