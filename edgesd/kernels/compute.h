// What ops.cpp asks of the code for one instruction set. All is plain memory: no ONNX Runtime here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgesd {

// Runs fn(data, i), which throws nothing, for each i below `count`, on whatever threads there are.
using Parallel = void (*)(void* context, void (*fn)(void*, size_t), size_t count, void* data);

struct Threads {
  Parallel run;
  void* context;
};

// A quantized weight as it lies in the file. With 8 bits it is codes times `scale`. With 4 bits a
// code first becomes one of 8 bits, by its group's step; that one times `scale` is the weight.
struct Weight {
  enum Layout { ROWS_K_BY_N = 0, BLOCKS_OF_N = 1 };
  const uint8_t* codes;  // int8 [K, N]; int4 [K, N]; or (BLOCKS_OF_N) [N, K / 2], 8 more than int4
  const float* scale;    // [N]
  const uint16_t* steps;  // fp16: [K / group, N], 8-bit codes are codes / steps; or (BLOCKS_OF_N)
                          // [N, K / group], codes * steps / scale
  int bits, group, layout;
  int64_t n, k;
};

struct Linear {
  const float* x;  // [m, k]
  Weight weight;
  const float* bias;      // [n] or null
  const float* residual;  // [m, n] or null: added
  float* y;               // [m, n], or [m, n / 2] if gated
  int64_t m;
  bool gated;  // y = left * gelu(right), the halves of the outputs (GEGLU, arXiv 2002.05202)
  const float* low = nullptr;  // [m, rank]: low times up is added to the product, before it is gated
  const float* up = nullptr;   // [rank, n]
  int64_t rank = 0;
  bool gelu = false;  // of the product, as the hyperbolic tangent approximates it
  const float* gate = nullptr;  // [gates, n]: factors of what a residual is added to
  int64_t gates = 1;            // equal parts of the rows that have one each
};

// A few rows, which aren't rounded, times a weight.
struct Rows {
  const float* x;          // [m, k]
  const uint8_t* codes;    // int8 [k, n]; or of 4 bits [n, groups * group / 2], 8 more than int4
  const uint16_t* scales;  // fp16: [n]; or of 4 bits [n, groups]
  float* y;                // [m, n]
  int64_t m, n, k;
  int bits, group;
  int64_t groups() const { return (k + group - 1) / group; }
};

struct Conv {
  const float* x;       // [batch, channels, height, width], of which the convolution sees, in turn:
  const float* gamma;   // [channels] or null: group normalization (arXiv 1803.08494), in `groups`
  const float* beta;    // [channels]
  int groups;
  float epsilon;
  bool silu;     // x * sigmoid(x)
  int upsample;  // each pixel that many times in both directions
  bool relu;     // of what comes out, the residual included
  Weight weight;   // k = (row * kernel_w + column) * channels + channel
  const float* bias;
  const float* residual;  // [batch, n, out_height, out_width] or null: added
  const float* offset;    // [batch, n] or null: added to all pixels
  float* y;
  int64_t batch, channels, height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, top, left, bottom, right;
};

// Numbers in fp16 that become fp32.
struct Halves {
  const uint16_t* x;  // fp16 [count]
  float* y;           // [count]
  int64_t count;
};

constexpr int MAX_HEAD = 160;  // the widest head, in values

struct Attention {
  const float *q, *k, *v;  // [batch, m, heads * d], [batch, n, heads * d], the same
  float* y;                // [batch, m, heads * d]
  int64_t batch, m, n;
  int heads, d;
  float scale;
  // What becomes of queries and keys first, each null where nothing does: root mean square
  // normalization of each head (arXiv 1910.07467), then rotation of pairs by the token's angles
  // (arXiv 2104.09864).
  const float *q_norm = nullptr, *k_norm = nullptr;  // [d]
  float epsilon = 0;
  const float *cos = nullptr, *sin = nullptr;  // [m, d / 2], of m = n tokens
  // The first of the m = n tokens come from tensors and are normalized by weights of their own.
  int64_t first = 0;
  const float *first_q = nullptr, *first_k = nullptr, *first_v = nullptr;  // [batch, first, heads * d]
  const float *first_q_norm = nullptr, *first_k_norm = nullptr;
};

// The functions of one instruction set. weight_max: the largest code that weights may have. They
// throw std::bad_alloc where memory runs out, in whichever thread, and can be called again then.
struct Compute {
  const char* name;
  int weight_max;
  void (*linear)(const Linear&, Threads);
  void (*rows)(const Rows&, Threads);
  void (*conv)(const Conv&, Threads);
  void (*attention)(const Attention&, Threads);
  void (*widen)(const Halves&, Threads);
};

const Compute* avx512_vnni_compute();
const Compute* avx_vnni_compute();
const Compute* avx2_compute();
const Compute* neon_dotprod_compute();

}  // namespace edgesd
