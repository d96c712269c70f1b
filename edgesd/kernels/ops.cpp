// The operators of the domain edgesd, for ONNX Runtime: reads shapes and attributes, and calls the
// code for the instruction set that this processor has.
//
// A graph may come from anybody, and compute.cpp trusts what it is given: every attribute is held to
// its range when an operator is made, and every input to the attributes before each run. What doesn't
// fit becomes ONNX Runtime's status; no exception leaves this file.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "compute.h"
#include "onnxruntime_abi.h"

namespace edgesd {
namespace {

using namespace ort;

constexpr int FAILED = 1;

// The best that this processor has, or of those the one that EDGESD_INSTRUCTION_SET names.
const Compute* compute() noexcept {
  const Compute* found[3] = {};
  size_t count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    found[count++] = avx512_vnni_compute();
  if (__builtin_cpu_supports("avxvnni")) found[count++] = avx_vnni_compute();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found[count++] = avx2_compute();
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found[count++] = neon_dotprod_compute();
#endif
  const char* wanted = std::getenv("EDGESD_INSTRUCTION_SET");
  for (size_t i = 0; i < count; i++)
    if (!wanted || std::strcmp(wanted, found[i]->name) == 0) return found[i];
  return nullptr;
}

// Raised within an operator, and handed to ONNX Runtime as its status.
struct Failure : std::exception {
  explicit Failure(std::string text) : text(std::move(text)) {}
  const char* what() const noexcept override { return text.c_str(); }
  std::string text;
};

// A status of ONNX Runtime's own, which goes back to it.
struct Refused {
  Status* status;
};

void check(Status* status) {
  if (status) throw Refused{status};
}

// No network is near these. Below them no product of sizes in compute.cpp is beyond 64 bits.
constexpr int64_t MAX_DIMENSION = int64_t(1) << 20, MAX_ELEMENTS = int64_t(1) << 40;
constexpr int64_t MAX_K = 1 << 16;  // products of 8 bits whose sum 32 bits hold
constexpr int64_t MAX_UPSAMPLE = 16, MAX_GROUP = 256;

using Shape = std::vector<int64_t>;

std::string text_of(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); i++)
    out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

// The product of the first `dimensions` sizes.
int64_t count_of(const Shape& shape, size_t dimensions) {
  int64_t count = 1;
  for (size_t i = 0; i < dimensions; i++) {
    if (shape[i] < 0 || shape[i] > MAX_DIMENSION ||
        __builtin_mul_overflow(count, shape[i], &count) || count > MAX_ELEMENTS)
      throw Failure("a tensor of " + text_of(shape) + " is too large");
  }
  return count;
}
int64_t count_of(const Shape& shape) { return count_of(shape, shape.size()); }

class Kernel {
 public:
  Kernel(const Api* api, const KernelInfo* info) : api_(api), info_(info) {}

  int64_t integer(const char* name, int64_t least, int64_t most) const {
    int64_t value = 0;
    found(api_->call<Status*>(ATTRIBUTE_INT, info_, name, &value), name);
    return within(name, value, least, most);
  }
  // fallback: where there is none, as in graphs of before it was thought of.
  int64_t integer(const char* name, int64_t least, int64_t most, int64_t fallback) const {
    return there(name) ? integer(name, least, most) : fallback;
  }
  float real(const char* name, float fallback) const {
    return there(name) ? real(name) : fallback;
  }
  float real(const char* name) const {
    float value = 0;
    found(api_->call<Status*>(ATTRIBUTE_FLOAT, info_, name, &value), name);
    if (!std::isfinite(value)) throw Failure(std::string(name) + " isn't a finite number");
    return value;
  }
  Shape integers(const char* name, size_t count, int64_t least, int64_t most) const {
    Shape values(count);
    size_t held = count;
    found(api_->call<Status*>(ATTRIBUTE_INTS, info_, name, values.data(), &held), name);
    if (held != count)
      throw Failure(std::string(name) + " has " + std::to_string(held) + " values, not " +
                    std::to_string(count));
    for (const int64_t value : values) within(name, value, least, most);
    return values;
  }

 private:
  // One of another type is there, too: reading it as what it should be says so.
  bool there(const char* name) const {
    float value = 0;
    Status* status = api_->call<Status*>(ATTRIBUTE_FLOAT, info_, name, &value);
    if (!status) return true;
    const std::string text = api_->call<const char*>(ERROR_MESSAGE, const_cast<const Status*>(status));
    api_->call<void>(RELEASE_STATUS, status);
    return text.find("No attribute with name") == std::string::npos;
  }
  void found(Status* status, const char* name) const {
    if (!status) return;
    const std::string text = api_->call<const char*>(ERROR_MESSAGE, const_cast<const Status*>(status));
    api_->call<void>(RELEASE_STATUS, status);
    throw Failure(std::string("attribute ") + name + " can't be read: " + text);
  }
  static int64_t within(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most)
      throw Failure(std::string(name) + " is " + std::to_string(value) + ", not " +
                    std::to_string(least) + " to " + std::to_string(most));
    return value;
  }
  const Api* api_;
  const KernelInfo* info_;
};

// The inputs and outputs of one run.
class Run {
 public:
  Run(const Api* api, KernelContext* context) : api_(api), context_(context) {
    check(api_->call<Status*>(INPUT_COUNT, context_, &count_));
  }

  bool has(size_t index) const { return value(index) != nullptr; }

  Shape shape(size_t index) const {
    Shape out;
    describe(index, out);
    count_of(out);
    return out;
  }
  // Those of an input whose shape is checked.
  const float* data(size_t index) const { return static_cast<const float*>(memory(index)); }

  // An input of `count` values of a type; null where it isn't there.
  const void* data(size_t index, const char* name, int type, int64_t count) const {
    if (!has(index)) return nullptr;
    Shape shape;
    if (describe(index, shape) != type)
      throw Failure(std::string(name) + " isn't of the type that the attributes ask for");
    if (count_of(shape) != count)
      throw Failure(std::string(name) + " is " + text_of(shape) + ", not of " +
                    std::to_string(count) + " values");
    return memory(index);
  }
  const float* floats(size_t index, const char* name, int64_t count) const {
    return static_cast<const float*>(data(index, name, FLOAT, count));
  }
  const float* residual(size_t index, const Shape& like) const {
    if (!has(index)) return nullptr;
    const Shape found = shape(index);
    if (found != like)
      throw Failure("residual is " + text_of(found) + ", not " + text_of(like) + " as y");
    return data(index);
  }
  const uint16_t* halves(size_t index, const char* name, int64_t count) const {
    return static_cast<const uint16_t*>(data(index, name, FLOAT16, count));
  }
  float* output(const Shape& shape) const {
    Value* value = nullptr;
    void* data = nullptr;
    check(api_->call<Status*>(OUTPUT, context_, size_t(0), shape.data(), shape.size(), &value));
    check(api_->call<Status*>(MUTABLE_DATA, value, &data));
    return static_cast<float*>(data);
  }
  Threads threads() { return {run_parallel, this}; }

 private:
  static void run_parallel(void* self, void (*fn)(void*, size_t), size_t count, void* data) {
    const Run* run = static_cast<Run*>(self);
    if (count == 0) return;
    check(run->api_->call<Status*>(PARALLEL_FOR, const_cast<const KernelContext*>(run->context_),
                                   fn, count, size_t(0), data));
  }
  const Value* value(size_t index) const {
    const Value* found = nullptr;
    if (index < count_) check(api_->call<Status*>(INPUT, context_, index, &found));
    return found;
  }
  void* memory(size_t index) const {
    void* data = nullptr;
    check(api_->call<Status*>(MUTABLE_DATA, const_cast<Value*>(value(index)), &data));
    return data;
  }
  // Its type, and its shape; ANY, and no dimension, where it isn't there.
  int describe(size_t index, Shape& out) const {
    const Value* found = value(index);
    if (!found) return ANY;
    ShapeInfo* made = nullptr;
    check(api_->call<Status*>(SHAPE_INFO, found, &made));
    const ShapeInfo* info = made;
    int type = ANY;
    size_t count = 0;
    Status* status = api_->call<Status*>(ELEMENT_TYPE, info, &type);
    if (!status) status = api_->call<Status*>(DIMENSIONS_COUNT, info, &count);
    try {
      out.resize(count);
    } catch (...) {
      api_->call<void>(RELEASE_SHAPE_INFO, made);
      throw;
    }
    if (!status) status = api_->call<Status*>(DIMENSIONS, info, out.data(), count);
    api_->call<void>(RELEASE_SHAPE_INFO, made);
    check(status);
    return type;
  }
  const Api* api_;
  KernelContext* context_;
  size_t count_ = 0;
};

struct Range {
  const void* memory;
  int64_t bytes;
};

// Whether all of the memory is mapped from one file, by the list of what is mapped: long, and slow.
bool is_in_mapped_file(Range range) {
  std::FILE* maps = std::fopen("/proc/self/maps", "re");
  if (!maps) return false;
  const uintptr_t begin = uintptr_t(range.memory), end = begin + uintptr_t(range.bytes);
  bool found = false;
  char line[512];  // a path that is longer is read as lines of its own, which begin with no range
  while (!found && std::fgets(line, sizeof line, maps)) {
    uintptr_t from = 0, to = 0;
    uint64_t inode = 0;
    if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %*s %*s %*s %" SCNu64, &from, &to, &inode) == 3)
      found = inode != 0 && from <= begin && end <= to;
  }
  std::fclose(maps);
  return found;
}

// Whether all of the memory that is there is mapped from files: let go, it comes back as it was. Of
// each page the kernel says so (Documentation/admin-guide/mm/pagemap.rst).
bool is_mapped_file(Range range) {
  constexpr uint64_t PRESENT = uint64_t(1) << 63, SWAPPED = uint64_t(1) << 62,
                     OF_FILE = uint64_t(1) << 61;
  if (range.bytes == 0) return true;
  const int pages = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pages < 0) return is_in_mapped_file(range);  // a kernel without it
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = uintptr_t(range.memory) / page;
  const uintptr_t end = (uintptr_t(range.memory) + uintptr_t(range.bytes) + page - 1) / page;
  uint64_t found[512];
  bool mapped = true;
  for (uintptr_t at = begin; mapped && at < end;) {
    const size_t bytes = std::min<size_t>(end - at, 512) * sizeof(uint64_t);
    const ssize_t got = pread(pages, found, bytes, off_t(at * sizeof(uint64_t)));
    mapped = got >= ssize_t(sizeof(uint64_t));
    for (ssize_t i = 0; mapped && i < got / ssize_t(sizeof(uint64_t)); i++)
      mapped = !(found[i] & SWAPPED) && (!(found[i] & PRESENT) || (found[i] & OF_FILE));
    at += uintptr_t(std::max<ssize_t>(got, 0)) / sizeof(uint64_t);
  }
  close(pages);
  return mapped;
}

// Weights are mapped from their file and read where they lie. Those of layers beyond a budget are
// let go after each use, and those of what comes next are asked for meanwhile: memory holds the
// budget and one or two layers, the rest is the page cache's to keep or drop. What comes next is
// what came next in the run before: ONNX Runtime makes layers in another order than it runs them.
class WeightPager {
 public:
  static void keep(int64_t bytes) { budget() = bytes; }

  // steps: bytes of a weight's steps, which lie apart from its codes.
  explicit WeightPager(int64_t bytes, int64_t steps = 0) : bytes_(bytes), steps_(steps) {
    const std::lock_guard<std::mutex> guard(mutex());
    int64_t& left = budget();
    stays_ = left < 0 || bytes + steps <= left;
    if (stays_) {
      if (left >= 0) left -= bytes + steps;
      return;
    }
    place_ = places().size();
    places().push_back({{}, {}, NONE, true});
  }
  ~WeightPager() {
    if (stays_) return;
    const std::lock_guard<std::mutex> guard(mutex());
    places()[place_] = {{}, {}, NONE, false};
    while (!places().empty() && !places().back().taken) places().pop_back();
  }
  WeightPager(const WeightPager&) = delete;
  WeightPager& operator=(const WeightPager&) = delete;

  void before(const void* codes, const void* steps = nullptr) const {
    if (stays_) return;
    const std::lock_guard<std::mutex> guard(mutex());
    Place& here = places()[place_];
    here.codes = {codes, bytes_};
    here.steps = {steps, steps ? steps_ : 0};
    if (last() < places().size()) places()[last()].next = place_;
    last() = place_;
    int64_t asked = 0;
    size_t at = here.next;
    for (size_t i = 1; i < places().size() && at < places().size() && asked < LEAST_ASKED; i++) {
      const Place& next = places()[at];
      if (!next.codes.memory) break;
      at = next.next;
      advise(next.codes, MADV_WILLNEED);
      advise(next.steps, MADV_WILLNEED);
      asked += next.codes.bytes;
    }
  }
  void after() const {
    if (stays_) return;
    const std::lock_guard<std::mutex> guard(mutex());
    const Place& place = places()[place_];
    if (place.codes.memory != seen_)
      mapped_ = is_mapped_file(place.codes) && is_mapped_file(place.steps);
    seen_ = place.codes.memory;
    if (!mapped_) return;
    advise(place.codes, MADV_DONTNEED);
    advise(place.steps, MADV_DONTNEED);
  }

 private:
  struct Place {
    Range codes;  // null before the layer's first run
    Range steps;
    size_t next;  // the place of the layer that ran after this one
    bool taken;   // by a layer that is still there
  };
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  // Of each thread, as sessions are made on the thread that asks for them: two that are made at the
  // same time, one to stream its weights and one not, mustn't take each other's.
  static int64_t& budget() {
    static thread_local int64_t bytes = -1;
    return bytes;
  }
  // The place of the layer that ran last, on each thread: pipelines of two run side by side.
  static size_t& last() {
    static thread_local size_t place = NONE;
    return place;
  }
  static std::vector<Place>& places() {
    static std::vector<Place> all;
    return all;
  }
  // Whole pages within: what lies beside them is somebody else's.
  static void advise(Range range, int advice) {
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = (uintptr_t(range.memory) + page - 1) / page * page;
    const uintptr_t end = (uintptr_t(range.memory) + uintptr_t(range.bytes)) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
  }
  static constexpr size_t NONE = SIZE_MAX;
  static constexpr int64_t LEAST_ASKED = 1 << 20;  // a branch's factors are too small to wait for
  int64_t bytes_, steps_;
  bool stays_;
  size_t place_ = 0;
  mutable const void* seen_ = nullptr;  // the codes that `mapped_` is said of
  mutable bool mapped_ = false;
};

struct WeightFormat {
  int bits, group, layout;
  int64_t n, k;
  explicit WeightFormat(const Kernel& kernel)
      : bits(int(kernel.integer("bits", 4, 8))),
        group(int(kernel.integer("group", 1, MAX_DIMENSION))),
        layout(int(kernel.integer("layout", Weight::ROWS_K_BY_N, Weight::BLOCKS_OF_N))),
        n(kernel.integer("N", 1, MAX_DIMENSION)),
        k(kernel.integer("K", 1, MAX_K)) {
    if (bits != 4 && bits != 8) throw Failure("bits is neither 4 nor 8");
    if (layout == Weight::BLOCKS_OF_N && (bits != 4 || group % 16))
      throw Failure("blocks of outputs are of 4 bits, in groups of a multiple of 16");
  }
  int64_t groups() const { return (k + group - 1) / group; }
  // Of a linear's x [..., K].
  Shape input(const Run& run) const {
    const Shape shape = run.shape(0);
    if (shape.empty() || shape.back() != k)
      throw Failure("x is " + text_of(shape) + ", not [..., K] of K = " + std::to_string(k));
    return shape;
  }
  // Values in the file, of which the last bytes of a row may be none of the weight's.
  int64_t values() const { return n * (layout == Weight::BLOCKS_OF_N ? groups() * group : k); }
  int64_t bytes() const { return (values() * bits + 7) / 8; }
  int64_t step_bytes() const { return bits == 4 ? 2 * n * groups() : 0; }
  Weight at(const Run& run) const {
    const int type = bits == 8 ? INT8 : layout == Weight::BLOCKS_OF_N ? UINT8 : INT4;
    const void* codes = run.data(1, "codes", type, type == UINT8 ? bytes() : values());
    const float* scale = run.floats(2, "scale", n);
    const uint16_t* steps = bits == 4 ? run.halves(3, "steps", n * groups()) : nullptr;
    if (!codes || !scale || (bits == 4 && !steps))
      throw Failure("a weight's codes, scale or steps aren't there");
    return {static_cast<const uint8_t*>(codes), scale, steps, bits, group, layout, n, k};
  }
};

// 8-bit codes need products that can't saturate; 4-bit ones are made as small as they must be.
void check_bits(const Compute* compute, const WeightFormat& weight) {
  if (weight.bits == 8 && compute->weight_max < 127)
    throw Failure(std::string("8-bit weights aren't exact with ") + compute->name);
}

// QuantLinear(x [..., K], codes, scale, steps?, bias?, residual?, low [..., R]?, up [R, N]?,
// gate [B, 1, N]?) -> [..., N], or [..., N / 2] if gated. R is 0 or more; B is 1 or x's batch.
struct QuantLinear {
  static constexpr const char* NAME = "QuantLinear";
  static constexpr size_t INPUTS = 9, REQUIRED_INPUTS = 3;
  static constexpr int TYPES[] = {FLOAT, ANY, FLOAT, ANY};
  const Compute* compute;
  WeightFormat weight;
  bool gated, gelu;
  WeightPager pager;
  QuantLinear(const Compute* compute, const Kernel& kernel)
      : compute(compute),
        weight(kernel),
        gated(kernel.integer("gated", 0, 1) != 0),
        gelu(kernel.integer("gelu", 0, 1, 0) != 0),
        pager(weight.bytes(), weight.step_bytes()) {
    check_bits(compute, weight);
    if (gated && weight.n % 2) throw Failure("gated, with an odd N");
  }
  void operator()(Run& run) const {
    Shape shape = weight.input(run);
    Linear job{run.data(0), weight.at(run), run.floats(4, "bias", weight.n), nullptr, nullptr,
               count_of(shape, shape.size() - 1), gated};
    if (run.has(6) != run.has(7)) throw Failure("of low and up only one is there");
    if (run.has(6)) {
      Shape like = run.shape(6);
      if (like.empty()) throw Failure("low is a single value");
      job.rank = like.back();
      like.back() = weight.k;
      if (like != shape) throw Failure("low is " + text_of(run.shape(6)) + ", not as x but its last");
      job.low = run.floats(6, "low", job.m * job.rank);
      job.up = run.floats(7, "up", job.rank * weight.n);
    }
    shape.back() = gated ? weight.n / 2 : weight.n;
    const int64_t outputs = count_of(shape);
    job.residual = run.residual(5, shape);
    job.gelu = gelu;
    if (run.has(8)) {
      const bool one = shape.size() < 2 || count_of(run.shape(8)) == shape.back();
      job.gates = one ? 1 : shape[0];
      job.gate = run.floats(8, "gate", job.gates * shape.back());
    }
    job.y = run.output(shape);
    if (outputs == 0) return;
    pager.before(job.weight.codes, job.weight.steps);
    compute->linear(job, run.threads());
    pager.after();
  }
};

// QuantRows(x [..., K], codes, scales in fp16) -> [..., N]: for a few rows, which stay as they are.
// Codes are int8 [K, N], and scales [N]; or blocks of 4 bits, and scales [N, K / group].
struct QuantRows {
  static constexpr const char* NAME = "QuantRows";
  static constexpr size_t INPUTS = 3, REQUIRED_INPUTS = 3;
  static constexpr int TYPES[] = {FLOAT, ANY, FLOAT16};
  const Compute* compute;
  WeightFormat weight;
  int64_t scales;
  WeightPager pager;
  QuantRows(const Compute* compute, const Kernel& kernel)
      : compute(compute),
        weight(kernel),
        scales(weight.bits == 4 ? weight.n * weight.groups() : weight.n),
        pager(weight.bytes(), 2 * scales) {
    if ((weight.bits == 4) != (weight.layout == Weight::BLOCKS_OF_N))
      throw Failure("4 bits lie in blocks of outputs, and 8 don't");
    if (weight.bits == 4 && weight.group > MAX_GROUP) throw Failure("groups are too large");
  }
  void operator()(Run& run) const {
    Shape shape = weight.input(run);
    const void* codes = run.data(1, "codes", weight.bits == 4 ? UINT8 : INT8, weight.bytes());
    Rows job{run.data(0), static_cast<const uint8_t*>(codes), run.halves(2, "scales", scales),
             nullptr, count_of(shape, shape.size() - 1), weight.n, weight.k, weight.bits,
             weight.group};
    if (!codes || !job.scales) throw Failure("a weight's codes or scales aren't there");
    shape.back() = weight.n;
    const int64_t outputs = count_of(shape);
    job.y = run.output(shape);
    if (outputs == 0) return;
    pager.before(codes, job.scales);
    compute->rows(job, run.threads());
    pager.after();
  }
};

// QuantConv(x [B, C, H, W], codes, scale, steps?, bias?, residual?, offset [B, N, 1, 1]?, gamma [C]?,
// beta [C]?) -> [B, N, H', W'].
struct QuantConv {
  static constexpr const char* NAME = "QuantConv";
  static constexpr size_t INPUTS = 9, REQUIRED_INPUTS = 3;
  static constexpr int TYPES[] = {FLOAT, ANY, FLOAT, ANY};
  const Compute* compute;
  WeightFormat weight;
  Shape kernel_shape, strides, pads;
  int64_t groups, upsample;
  float epsilon;
  bool silu, relu;
  WeightPager pager;
  QuantConv(const Compute* compute, const Kernel& kernel)
      : compute(compute),
        weight(kernel),
        kernel_shape(kernel.integers("kernel_shape", 2, 1, MAX_K)),
        strides(kernel.integers("strides", 2, 1, MAX_DIMENSION)),
        pads(kernel.integers("pads", 4, 0, MAX_K)),
        groups(kernel.integer("groups", 1, MAX_DIMENSION)),
        upsample(kernel.integer("upsample", 1, MAX_UPSAMPLE)),
        epsilon(kernel.real("epsilon")),
        silu(kernel.integer("silu", 0, 1) != 0),
        relu(kernel.integer("relu", 0, 1) != 0),
        pager(weight.bytes(), weight.step_bytes()) {
    check_bits(compute, weight);
    if (weight.layout != Weight::ROWS_K_BY_N) throw Failure("a convolution's weight is [K, N]");
    if (weight.k % (kernel_shape[0] * kernel_shape[1]))
      throw Failure("K isn't a multiple of kernel_shape " + text_of(kernel_shape));
    for (size_t i = 0; i < 4; i++)
      if (pads[i] > kernel_shape[i % 2]) throw Failure("pads are larger than the kernel");
    if (epsilon < 0) throw Failure("epsilon is negative");
  }
  void operator()(Run& run) const {
    const Shape shape = run.shape(0);
    const int64_t channels = weight.k / (kernel_shape[0] * kernel_shape[1]);
    if (shape.size() != 4 || shape[1] != channels || shape[2] < 1 || shape[3] < 1)
      throw Failure("x is " + text_of(shape) + ", not [B, " + std::to_string(channels) + ", H, W]");
    const int64_t high = shape[2] * upsample + pads[0] + pads[2];
    const int64_t wide = shape[3] * upsample + pads[1] + pads[3];
    if (high < kernel_shape[0] || wide < kernel_shape[1])
      throw Failure("x of " + text_of(shape) + " is smaller than the kernel");
    count_of({high, wide, channels});  // of the image in bytes
    const Shape out{shape[0], weight.n, (high - kernel_shape[0]) / strides[0] + 1,
                    (wide - kernel_shape[1]) / strides[1] + 1};
    const int64_t outputs = count_of(out);
    Conv job{};
    job.x = run.data(0);
    job.weight = weight.at(run);
    job.bias = run.floats(4, "bias", weight.n);
    job.residual = run.residual(5, out);
    job.offset = run.floats(6, "offset", shape[0] * weight.n);
    job.gamma = run.floats(7, "gamma", channels);
    job.beta = run.floats(8, "beta", channels);
    if (job.gamma && (!job.beta || channels % groups))
      throw Failure("there is no beta, or C isn't a multiple of the groups");
    job.groups = int(groups);
    job.epsilon = epsilon;
    job.silu = silu;
    job.relu = relu;
    job.upsample = int(upsample);
    job.batch = shape[0], job.channels = channels, job.height = shape[2], job.width = shape[3];
    job.out_height = out[2], job.out_width = out[3];
    job.kernel_h = int(kernel_shape[0]), job.kernel_w = int(kernel_shape[1]);
    job.stride_h = int(strides[0]), job.stride_w = int(strides[1]);
    job.top = int(pads[0]), job.left = int(pads[1]);
    job.bottom = int(pads[2]), job.right = int(pads[3]);
    job.y = run.output(out);
    if (outputs == 0) return;
    pager.before(job.weight.codes, job.weight.steps);
    compute->conv(job, run.threads());
    pager.after();
  }
};

// QuantAttention(q [B, M, heads * d], k [B, N, heads * d], v the same, q_norm [d]?, k_norm [d]?,
// cos [S, d / 2]?, sin?, first_q [B, F, heads * d]?, first_k?, first_v?, first_q_norm?,
// first_k_norm?) -> [B, S, heads * d], S = F + M. With cos or first_q there are as many keys.
struct QuantAttention {
  static constexpr const char* NAME = "QuantAttention";
  static constexpr size_t INPUTS = 12, REQUIRED_INPUTS = 3;
  static constexpr int TYPES[] = {FLOAT};
  const Compute* compute;
  int64_t heads;
  float scale, epsilon;
  QuantAttention(const Compute* compute, const Kernel& kernel)
      : compute(compute),
        heads(kernel.integer("num_heads", 1, MAX_DIMENSION)),
        scale(kernel.real("scale")),
        epsilon(kernel.real("epsilon", 0)) {
    if (scale <= 0) throw Failure("scale isn't above 0");
    if (epsilon < 0) throw Failure("epsilon is negative");
  }
  void operator()(Run& run) const {
    const Shape q = run.shape(0), k = run.shape(1), v = run.shape(2);
    if (q.size() != 3 || k.size() != 3 || v != k || q[2] != k[2] || q[0] != k[0] || k[1] < 1)
      throw Failure("q, k and v are " + text_of(q) + ", " + text_of(k) + " and " + text_of(v) +
                    ", not [B, M, W], [B, N, W] and the same");
    if (q[2] < 1 || q[2] % heads || q[2] / heads > MAX_HEAD)
      throw Failure(std::to_string(q[2]) + " values aren't " + std::to_string(heads) +
                    " heads of at most " + std::to_string(MAX_HEAD));
    const int64_t d = q[2] / heads;
    Attention job{run.data(0), run.data(1), run.data(2), nullptr, q[0], q[1], k[1],
                  int(heads), int(d), scale};
    job.epsilon = epsilon;
    job.q_norm = run.floats(3, "q_norm", d);
    job.k_norm = run.floats(4, "k_norm", d);
    job.first_q_norm = run.floats(10, "first_q_norm", d);
    job.first_k_norm = run.floats(11, "first_k_norm", d);
    if (run.has(7) != run.has(8) || run.has(7) != run.has(9))
      throw Failure("of first_q, first_k and first_v not all are there");
    if (run.has(7)) {
      Shape first = run.shape(7);
      job.first = first.size() == 3 ? first[1] : -1;
      if (first.size() == 3) first[1] = q[1];
      if (first != q || k != q || run.shape(8) != run.shape(7) || run.shape(9) != run.shape(7))
        throw Failure("first_q, first_k and first_v are " + text_of(run.shape(7)) + ", " +
                      text_of(run.shape(8)) + " and " + text_of(run.shape(9)) +
                      ", not as q, k and v but their tokens, which are as many in each");
      job.first_q = run.data(7);
      job.first_k = run.data(8);
      job.first_v = run.data(9);
      job.m = job.n = q[1] + job.first;
    }
    if (run.has(5) != run.has(6)) throw Failure("of cos and sin only one is there");
    if (run.has(5)) {
      if (job.m != job.n || d % 2) throw Failure("rotated, with other keys, or an odd width");
      const Shape table{job.m, d / 2};
      if (run.shape(5) != table || run.shape(6) != table)
        throw Failure("cos and sin are " + text_of(run.shape(5)) + " and " + text_of(run.shape(6)) +
                      ", not " + text_of(table));
      job.cos = run.data(5);
      job.sin = run.data(6);
    }
    const Shape shape{q[0], job.m, q[2]};
    count_of(shape);
    job.y = run.output(shape);
    if (job.batch > 0 && job.m > 0) compute->attention(job, run.threads());
  }
};

// Widen(x, in fp16, after) -> the same in fp32: factors that stay in their file, and are fp32 while a
// layer reads them. ONNX Runtime would compute its own Cast of a constant once, and keep the result;
// and what waits for nothing it may compute long before: nothing is read of `after`.
struct Widen {
  static constexpr const char* NAME = "Widen";
  static constexpr size_t INPUTS = 2, REQUIRED_INPUTS = 2;
  static constexpr int TYPES[] = {FLOAT16};
  const Compute* compute;
  int64_t values;
  WeightPager pager;
  Widen(const Compute* compute, const Kernel& kernel)
      : compute(compute), values(kernel.integer("values", 0, MAX_ELEMENTS)), pager(2 * values) {}
  void operator()(Run& run) const {
    const Shape shape = run.shape(0);
    const uint16_t* x = run.halves(0, "x", values);
    float* y = run.output(shape);
    if (values == 0) return;
    pager.before(x);
    compute->widen({x, y, values}, run.threads());
    pager.after();
  }
};

template <typename Op>
struct Registered {
  Registered(const Api* api, const KernelInfo* info) : api(api), op(compute(), Kernel(api, info)) {}
  const Api* api;
  Op op;
};

Status* status_of(const Api* api, const char* text) {
  return api->call<Status*>(CREATE_STATUS, FAILED, text);
}

// Runs `work`, and gives what it throws as a status that names the operator.
template <typename Op, typename F>
Status* status_after(const Api* api, F work) noexcept {
  try {
    try {
      work();
      return nullptr;
    } catch (const Refused& refused) {
      return refused.status;
    } catch (const Failure& failure) {
      return status_of(api, (std::string(Op::NAME) + ": " + failure.what()).c_str());
    }
  } catch (const std::bad_alloc&) {
    return status_of(api, "out of memory (bad_alloc)");
  } catch (const std::exception& error) {
    return status_of(api, error.what());
  } catch (...) {
    return status_of(api, "an exception of no known kind");
  }
}

template <typename Op>
const Operator& operator_of() {
  static const Operator op = [] {
    Operator out{};
    out.version = VERSION;
    out.name = [](const Operator*) { return Op::NAME; };
    out.provider = [](const Operator*) -> const char* { return nullptr; };
    out.input_count = [](const Operator*) { return Op::INPUTS; };
    // ANY: codes of int8, int4 or packed bytes, and their steps in fp16, as attributes say.
    out.input_type = [](const Operator*, size_t index) -> int {
      return index < std::size(Op::TYPES) ? Op::TYPES[index] : int(FLOAT);
    };
    out.output_count = [](const Operator*) -> size_t { return 1; };
    out.output_type = [](const Operator*, size_t) -> int { return FLOAT; };
    out.input_characteristic = [](const Operator*, size_t index) -> int {
      return index < Op::REQUIRED_INPUTS ? REQUIRED : OPTIONAL;
    };
    out.output_characteristic = [](const Operator*, size_t) -> int { return REQUIRED; };
    out.input_memory = [](const Operator*, size_t) { return 0; };
    out.variadic_input_least = [](const Operator*) { return 0; };
    out.variadic_input_same = [](const Operator*) { return 0; };
    out.variadic_output_least = [](const Operator*) { return 0; };
    out.variadic_output_same = [](const Operator*) { return 0; };
    out.create_v2 = [](const Operator*, const Api* api, const KernelInfo* info,
                       void** kernel) -> Status* {
      return status_after<Op>(api, [&] { *kernel = new Registered<Op>(api, info); });
    };
    out.compute_v2 = [](void* kernel, KernelContext* context) -> Status* {
      const auto* self = static_cast<Registered<Op>*>(kernel);
      return status_after<Op>(self->api, [&] {
        Run run(self->api, context);
        self->op(run);
      });
    };
    out.destroy = [](void* kernel) { delete static_cast<Registered<Op>*>(kernel); };
    return out;
  }();
  return op;
}

}  // namespace
}  // namespace edgesd

extern "C" {

// The instruction set that is used here; an empty name where none of them is there.
__attribute__((visibility("default"))) const char* edgesd_instruction_set() {
  const edgesd::Compute* found = edgesd::compute();
  return found ? found->name : "";
}

// Bytes of weights that sessions created from now on by this thread keep mapped; less than 0: all.
__attribute__((visibility("default"))) void edgesd_keep_weights(int64_t bytes) {
  edgesd::WeightPager::keep(bytes);
}

// What ONNX Runtime calls when it loads the library.
__attribute__((visibility("default"))) edgesd::ort::Status* RegisterCustomOps(
    edgesd::ort::SessionOptions* options, const edgesd::ort::ApiBase* base) {
  using namespace edgesd::ort;
  const Api* api = base->get_api(VERSION);
  if (!api) return nullptr;  // an ONNX Runtime older than 1.17: its sessions won't know the operators
  if (!edgesd::compute())
    return edgesd::status_of(api, "this processor has none of the instruction sets");
  Domain* domain = nullptr;  // lives as long as the process
  Status* status = api->call<Status*>(CREATE_DOMAIN, "edgesd", &domain);
  for (const Operator* op : {&edgesd::operator_of<edgesd::QuantLinear>(),
                             &edgesd::operator_of<edgesd::QuantRows>(),
                             &edgesd::operator_of<edgesd::QuantConv>(),
                             &edgesd::operator_of<edgesd::QuantAttention>(),
                             &edgesd::operator_of<edgesd::Widen>()})
    if (!status) status = api->call<Status*>(ADD_OPERATOR, domain, op);
  if (!status) status = api->call<Status*>(ADD_DOMAIN, options, domain);
  return status;
}
}
