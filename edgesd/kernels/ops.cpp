// The operators of the domain edgesd, for ONNX Runtime: reads shapes and attributes, and calls the
// code for the instruction set that this processor has.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <mutex>
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
const Compute* compute() {
  std::vector<const Compute*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(avx512_vnni_compute());
  if (__builtin_cpu_supports("avxvnni")) found.push_back(avx_vnni_compute());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(avx2_compute());
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(neon_dotprod_compute());
#endif
  const char* wanted = std::getenv("EDGESD_INSTRUCTION_SET");
  for (const Compute* each : found)
    if (!wanted || std::string(wanted) == each->name) return each;
  return nullptr;
}

// Raised within an operator, and handed to ONNX Runtime as its status.
struct Failure : std::exception {
  explicit Failure(std::string text) : text(std::move(text)) {}
  const char* what() const noexcept override { return text.c_str(); }
  std::string text;
};

class Kernel {
 public:
  Kernel(const Api* api, const KernelInfo* info) : api_(api), info_(info) {}

  int64_t integer(const char* name) const {
    int64_t value = 0;
    check(api_->call<Status*>(ATTRIBUTE_INT, info_, name, &value), name);
    return value;
  }
  float real(const char* name) const {
    float value = 0;
    check(api_->call<Status*>(ATTRIBUTE_FLOAT, info_, name, &value), name);
    return value;
  }
  std::vector<int64_t> integers(const char* name, size_t count) const {
    std::vector<int64_t> values(count);
    check(api_->call<Status*>(ATTRIBUTE_INTS, info_, name, values.data(), &count), name);
    if (count != values.size()) throw Failure(std::string("attribute ") + name + " is too short");
    return values;
  }

 private:
  void check(Status* status, const char* name) const {
    if (status) throw Failure(std::string("attribute ") + name + " is missing");
  }
  const Api* api_;
  const KernelInfo* info_;
};

// The product of the first `dimensions` sizes.
int64_t count_of(const std::vector<int64_t>& shape, size_t dimensions) {
  int64_t count = 1;
  for (size_t i = 0; i < dimensions; i++) count *= shape[i];
  return count;
}

// The inputs and outputs of one run.
class Run {
 public:
  Run(const Api* api, KernelContext* context) : api_(api), context_(context) {}

  const Value* value(size_t index) const {
    size_t count = 0;
    check(api_->call<Status*>(INPUT_COUNT, context_, &count));
    const Value* found = nullptr;
    if (index < count) check(api_->call<Status*>(INPUT, context_, index, &found));
    return found;
  }
  template <typename T>
  const T* data(size_t index) const {
    const Value* found = value(index);
    void* data = nullptr;
    if (found) check(api_->call<Status*>(MUTABLE_DATA, const_cast<Value*>(found), &data));
    return static_cast<const T*>(data);
  }
  std::vector<int64_t> shape(size_t index) const {
    const Value* found = value(index);
    if (!found) return {};
    ShapeInfo* info = nullptr;
    check(api_->call<Status*>(SHAPE_INFO, found, &info));
    size_t count = 0;
    Status* status = api_->call<Status*>(DIMENSIONS_COUNT, const_cast<const ShapeInfo*>(info), &count);
    std::vector<int64_t> out(count);
    if (!status)
      status = api_->call<Status*>(DIMENSIONS, const_cast<const ShapeInfo*>(info), out.data(), count);
    api_->call<void>(RELEASE_SHAPE_INFO, info);
    check(status);
    return out;
  }
  int64_t elements(size_t index) const {
    const auto found = shape(index);
    return count_of(found, found.size());
  }
  float* output(const std::vector<int64_t>& shape) const {
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
    run->check(run->api_->call<Status*>(PARALLEL_FOR, const_cast<const KernelContext*>(run->context_),
                                        fn, count, size_t(0), data));
  }
  void check(Status* status) const {
    if (status) throw Failure("ONNX Runtime refused a call of its own interface");
  }
  const Api* api_;
  KernelContext* context_;
};

// Weights are mapped from their file and read where they lie. Those of layers beyond a budget are
// let go after each use, and the next such layer's are asked for meanwhile: memory holds the budget
// and one or two layers, the rest is the page cache's to keep or drop.
class Residence {
 public:
  static void keep(int64_t bytes) { budget() = bytes; }

  explicit Residence(int64_t bytes) : bytes_(bytes) {
    const std::lock_guard<std::mutex> guard(mutex());
    int64_t& left = budget();
    stays_ = left < 0 || bytes <= left;
    if (stays_) {
      if (left >= 0) left -= bytes;
      return;
    }
    place_ = places().size();
    places().push_back({nullptr, 0, true});
  }
  ~Residence() {
    if (stays_) return;
    const std::lock_guard<std::mutex> guard(mutex());
    places()[place_] = {nullptr, 0, false};
    while (!places().empty() && !places().back().taken) places().pop_back();
  }
  Residence(const Residence&) = delete;
  Residence& operator=(const Residence&) = delete;

  void before(const void* codes) const {
    if (stays_) return;
    const std::lock_guard<std::mutex> guard(mutex());
    places()[place_] = {codes, bytes_, true};
    for (size_t i = 1; i < places().size(); i++) {
      const Place& next = places()[(place_ + i) % places().size()];
      if (!next.codes) continue;
      advise(next.codes, next.bytes, MADV_WILLNEED);
      return;
    }
  }
  void after(const void* codes) const {
    if (!stays_) advise(codes, bytes_, MADV_DONTNEED);
  }

 private:
  struct Place {
    const void* codes;  // null before the layer's first run
    int64_t bytes;
    bool taken;  // by a layer that is still there
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
  static std::vector<Place>& places() {
    static std::vector<Place> all;
    return all;
  }
  // Whole pages within: what lies beside them is somebody else's. Where weights aren't a mapped
  // file, letting go would lose them: those calls come only with mapped ones (runtime/kernels.py).
  static void advise(const void* codes, int64_t bytes, int advice) {
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = (uintptr_t(codes) + page - 1) / page * page;
    const uintptr_t end = (uintptr_t(codes) + uintptr_t(bytes)) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
  }
  int64_t bytes_;
  bool stays_;
  size_t place_ = 0;
};

struct WeightFormat {
  int bits, group, layout;
  int64_t n, k;
  explicit WeightFormat(const Kernel& kernel)
      : bits(int(kernel.integer("bits"))),
        group(int(kernel.integer("group"))),
        layout(int(kernel.integer("layout"))),
        n(kernel.integer("N")),
        k(kernel.integer("K")) {
    const bool fine = (bits == 8 || bits == 4) && group > 0 && n > 0 && k > 0 &&
                      (layout == Weight::ROWS_K_BY_N || (layout == Weight::BLOCKS_OF_N && bits == 4));
    if (!fine) throw Failure("a weight's bits, group, layout, N or K isn't valid");
  }
  int64_t bytes() const { return n * ((k + group - 1) / group * group) * bits / 8; }
  Weight at(const Run& run) const {
    Weight out{run.data<uint8_t>(1), run.data<float>(2), run.data<uint16_t>(3), bits, group, layout, n, k};
    if (bits == 4 && !out.steps) throw Failure("a 4-bit weight has no steps");
    return out;
  }
};

// 8-bit codes need products that can't saturate; 4-bit ones are made as small as they must be.
void check_bits(const Compute* compute, const WeightFormat& weight) {
  if (weight.bits == 8 && compute->weight_max < 127)
    throw Failure(std::string("8-bit weights aren't exact with ") + compute->name);
}

// QuantLinear(x [..., K], codes, scale, steps?, bias?, residual?) -> [..., N], or [..., N / 2] if
// gated.
struct QuantLinear {
  static constexpr const char* NAME = "QuantLinear";
  static constexpr size_t INPUTS = 6, REQUIRED_INPUTS = 3;
  const Compute* compute;
  WeightFormat weight;
  bool gated;
  Residence residence;
  QuantLinear(const Compute* compute, const Kernel& kernel)
      : compute(compute),
        weight(kernel),
        gated(kernel.integer("gated") != 0),
        residence(weight.bytes()) {
    check_bits(compute, weight);
  }
  void operator()(Run& run) const {
    auto shape = run.shape(0);
    if (shape.empty() || shape.back() != weight.k) throw Failure("QuantLinear: x isn't [..., K]");
    Linear job{run.data<float>(0), weight.at(run), run.data<float>(4), run.data<float>(5), nullptr,
               count_of(shape, shape.size() - 1), gated};
    shape.back() = gated ? weight.n / 2 : weight.n;
    if (job.residual && run.shape(5) != shape) throw Failure("QuantLinear: residual isn't like y");
    job.y = run.output(shape);
    residence.before(job.weight.codes);
    if (job.m > 0) compute->linear(job, run.threads());
    residence.after(job.weight.codes);
  }
};

// QuantConv(x [B, C, H, W], codes, scale, steps?, bias?, residual?, offset [B, N, 1, 1]?, gamma [C]?,
// beta [C]?) -> [B, N, H', W'].
struct QuantConv {
  static constexpr const char* NAME = "QuantConv";
  static constexpr size_t INPUTS = 9, REQUIRED_INPUTS = 3;
  const Compute* compute;
  WeightFormat weight;
  std::vector<int64_t> kernel_shape, strides, pads;
  int64_t groups, upsample;
  float epsilon;
  bool silu, relu;
  Residence residence;
  QuantConv(const Compute* compute, const Kernel& kernel)
      : compute(compute),
        weight(kernel),
        kernel_shape(kernel.integers("kernel_shape", 2)),
        strides(kernel.integers("strides", 2)),
        pads(kernel.integers("pads", 4)),
        groups(kernel.integer("groups")),
        upsample(kernel.integer("upsample")),
        epsilon(kernel.real("epsilon")),
        silu(kernel.integer("silu") != 0),
        relu(kernel.integer("relu") != 0),
        residence(weight.bytes()) {
    check_bits(compute, weight);
  }
  void operator()(Run& run) const {
    const auto shape = run.shape(0);
    if (shape.size() != 4 || shape[1] * kernel_shape[0] * kernel_shape[1] != weight.k)
      throw Failure("QuantConv: x isn't [B, C, H, W] of the weight's C");
    const int64_t tall = shape[2] * upsample + pads[0] + pads[2] - kernel_shape[0];
    const int64_t wide = shape[3] * upsample + pads[1] + pads[3] - kernel_shape[1];
    if (tall < 0 || wide < 0) throw Failure("QuantConv: the image is smaller than the kernel");
    const std::vector<int64_t> out{shape[0], weight.n, tall / strides[0] + 1, wide / strides[1] + 1};
    Conv job{};
    job.x = run.data<float>(0);
    job.weight = weight.at(run);
    job.bias = run.data<float>(4);
    job.residual = run.data<float>(5);
    job.offset = run.data<float>(6);
    job.gamma = run.data<float>(7);
    job.beta = run.data<float>(8);
    job.groups = int(groups);
    job.epsilon = epsilon;
    job.silu = silu;
    job.relu = relu;
    job.upsample = int(upsample);
    job.batch = shape[0], job.channels = shape[1], job.height = shape[2], job.width = shape[3];
    job.out_height = out[2], job.out_width = out[3];
    job.kernel_h = int(kernel_shape[0]), job.kernel_w = int(kernel_shape[1]);
    job.stride_h = int(strides[0]), job.stride_w = int(strides[1]);
    job.top = int(pads[0]), job.left = int(pads[1]);
    job.bottom = int(pads[2]), job.right = int(pads[3]);
    if (job.gamma && (groups < 1 || shape[1] % groups || run.elements(7) != shape[1] ||
                      !job.beta || run.elements(8) != shape[1]))
      throw Failure("QuantConv: gamma and beta aren't [C], or C isn't a multiple of the groups");
    if (job.residual && run.shape(5) != out) throw Failure("QuantConv: residual isn't like y");
    if (job.offset && run.elements(6) != shape[0] * weight.n)
      throw Failure("QuantConv: offset isn't [B, N, 1, 1]");
    job.y = run.output(out);
    residence.before(job.weight.codes);
    compute->conv(job, run.threads());
    residence.after(job.weight.codes);
  }
};

// QuantAttention(q [B, M, heads * d], k [B, N, heads * d], v the same) -> [B, M, heads * d].
struct QuantAttention {
  static constexpr const char* NAME = "QuantAttention";
  static constexpr size_t INPUTS = 3, REQUIRED_INPUTS = 3;
  const Compute* compute;
  int64_t heads;
  float scale;
  QuantAttention(const Compute* compute, const Kernel& kernel)
      : compute(compute), heads(kernel.integer("num_heads")), scale(kernel.real("scale")) {}
  void operator()(Run& run) const {
    const auto q = run.shape(0), k = run.shape(1);
    if (q.size() != 3 || k.size() != 3 || run.shape(2) != k || q[2] != k[2] || q[0] != k[0] ||
        heads <= 0 || q[2] % heads || q[2] / heads > MAX_HEAD)
      throw Failure("QuantAttention: q, k and v don't fit each other, or a head is too wide");
    Attention job{run.data<float>(0), run.data<float>(1), run.data<float>(2), run.output(q),
                  q[0], q[1], k[1], int(heads), int(q[2] / heads), scale};
    if (job.m > 0 && job.n > 0) compute->attention(job, run.threads());
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

template <typename Op>
const Operator& operator_of() {
  static const Operator op = [] {
    Operator out{};
    out.version = VERSION;
    out.name = [](const Operator*) { return Op::NAME; };
    out.provider = [](const Operator*) -> const char* { return nullptr; };
    out.input_count = [](const Operator*) { return Op::INPUTS; };
    // Codes come as int8, int4 or packed bytes, steps as fp16: attributes say what they are.
    out.input_type = [](const Operator*, size_t index) -> int {
      return Op::INPUTS > 3 && (index == 1 || index == 3) ? ANY : FLOAT;
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
      try {
        *kernel = new Registered<Op>(api, info);
        return nullptr;
      } catch (const std::exception& error) {
        return status_of(api, error.what());
      }
    };
    out.compute_v2 = [](void* kernel, KernelContext* context) -> Status* {
      const auto* self = static_cast<Registered<Op>*>(kernel);
      try {
        Run run(self->api, context);
        self->op(run);
        return nullptr;
      } catch (const std::bad_alloc&) {
        return status_of(self->api, "out of memory (bad_alloc)");
      } catch (const std::exception& error) {
        return status_of(self->api, error.what());
      }
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
  edgesd::Residence::keep(bytes);
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
                             &edgesd::operator_of<edgesd::QuantConv>(),
                             &edgesd::operator_of<edgesd::QuantAttention>()})
    if (!status) status = api->call<Status*>(ADD_OPERATOR, domain, op);
  if (!status) status = api->call<Status*>(ADD_DOMAIN, options, domain);
  return status;
}
}
