// Vectors of W lanes and one instruction set's dot product of four bytes: everything else in
// compute.inc is written on these, and compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#include <immintrin.h>
#define EDGESD_ISA avx512_vnni
constexpr int W = 16, MR = 8, NR = 2, ATTENTION_ROWS = 4;
#elif defined(__AVXVNNI__)
#include <immintrin.h>
#define EDGESD_ISA avx_vnni
constexpr int W = 8, MR = 6, NR = 2, ATTENTION_ROWS = 3;
#elif defined(__AVX2__)
#include <immintrin.h>
#define EDGESD_ISA avx2
constexpr int W = 8, MR = 6, NR = 2, ATTENTION_ROWS = 2;
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define EDGESD_ISA neon_dotprod
constexpr int W = 4, MR = 6, NR = 4, ATTENTION_ROWS = 4;
#else
#error "compile with AVX-512 VNNI, AVX-VNNI, AVX2, or NEON with the dot product"
#endif

namespace edgesd {
namespace EDGESD_ISA {

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint8_t vb __attribute__((vector_size(W)));

// Bytes of the left operand: unsigned on x86, where codes are stored as they are; signed on ARM,
// where they are stored 128 lower. LEFT_MAX: the largest code of a left operand whose sums with
// any int8 can't saturate. WEIGHT_MAX: the same for right operands beside codes up to 255.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int SHIFT = 128, LEFT_MAX = 255, WEIGHT_MAX = 127, PROBABILITY_MAX = 127;
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int SHIFT = 0, LEFT_MAX = 255, WEIGHT_MAX = 127, PROBABILITY_MAX = 255;
#else  // vpmaddubsw adds two products in 16 bits
constexpr int SHIFT = 0, LEFT_MAX = 127, WEIGHT_MAX = 64, PROBABILITY_MAX = 127;
#endif

static inline vf vf_set(float x) { return vf{} + x; }
static inline vi vi_set(int32_t x) { return vi{} + x; }

template <typename V, typename T>
static inline V load(const T* from) {
  V out;
  std::memcpy(&out, from, sizeof out);
  return out;
}
template <typename V, typename T>
static inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

static inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// sum + the product of four left bytes (in each lane) and four right bytes.
static inline vi dot4(vi sum, vi left, vi right) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)left, (__m512i)right);
#elif defined(__AVXVNNI__)
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)left, (__m256i)right);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)left, (__m256i)right);
  return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)left, (int8x16_t)right);
#endif
}

// Sixteen left bytes, four by four, of which dot4 takes one four.
#if defined(__ARM_FEATURE_DOTPROD)
#define EDGESD_LANES
template <int LANE>
static inline vi dot4_lane(vi sum, int8x16_t left, vi right) {
  return (vi)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)right, left, LANE);
}
#endif

// Nearest integers, halves to even.
static inline vi nearest(vf x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtps_epi32((__m256)x);
#else
  return (vi)vcvtnq_s32_f32((float32x4_t)x);
#endif
}

static inline vf maximum(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#endif
}
static inline vf minimum(vf a, vf b) { return -maximum(-a, -b); }

// W numbers in fp16 as fp32.
static inline vf from_halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#endif
}

// Sixteen integers, of which the low bytes are stored.
static inline void store_bytes(void* to, const vi* from) {
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)from[0]));
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi32(255);
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256((__m256i)from[0], low),
                                            _mm256_and_si256((__m256i)from[1], low));
  const __m256i bytes = _mm256_packus_epi16(words, words);  // of each half, four of each vector
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);
  _mm_storeu_si128(static_cast<__m128i*>(to),
                   _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order)));
#else
  const auto words = [from](int i) {
    return vcombine_s16(vmovn_s32((int32x4_t)from[i]), vmovn_s32((int32x4_t)from[i + 1]));
  };
  vst1q_s8(static_cast<int8_t*>(to), vcombine_s8(vmovn_s16(words(0)), vmovn_s16(words(2))));
#endif
}

// Each of half as many numbers twice, and lanes with their neighbours.
#if defined(__AVX512F__)
typedef float vh __attribute__((vector_size(32)));
static inline vf twice(vh x) {
  return __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
}
static inline vf swapped(vf x) { return (vf)_mm512_permute_ps((__m512)x, 0xb1); }
#elif defined(__AVX2__)
typedef float vh __attribute__((vector_size(16)));
static inline vf twice(vh x) { return __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3); }
static inline vf swapped(vf x) { return (vf)_mm256_permute_ps((__m256)x, 0xb1); }
#else
typedef float vh __attribute__((vector_size(8)));
static inline vf twice(vh x) { return __builtin_shufflevector(x, x, 0, 0, 1, 1); }
static inline vf swapped(vf x) { return (vf)vrev64q_f32((float32x4_t)x); }
#endif

static inline float lanes_sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = x[0];
  for (int i = 1; i < W; i++) sum += x[i];
  return sum;
#endif
}

static inline float lanes_max(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int i = 1; i < W; i++) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

// TIMES 2^x for x <= 0, to 1e-4 of it; 0 from about 2^-126 down.
template <int TIMES>
static inline vf exp2_below(vf x) {
  // The polynomial that is nearest to 2^f on [0, 1), with its ends exact.
  const auto part = [](vf f) {
    vf p = f * (0.079023f * TIMES) + 0.224126f * TIMES;
    p = p * f + 0.696851f * TIMES;
    return p * f + 1.0f * TIMES;
  };
#if defined(__AVX512F__)
  const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (vf)_mm512_scalef_ps((__m512)part(f), (__m512)x);
#else
  x = maximum(x, vf_set(-126.0f));
  const vi whole = nearest(x - 0.5f);  // the floor, or one less at an integer: f is 1 there
  return (vf)((vi)part(x - to_float(whole)) + (whole << 23));
#endif
}

}  // namespace EDGESD_ISA
}  // namespace edgesd
