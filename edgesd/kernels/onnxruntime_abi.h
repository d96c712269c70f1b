// The part of ONNX Runtime's C interface that a library of custom operators needs: the interface is
// a table of functions whose places never change (ONNX Runtime promises so), by its version 17.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgesd {
namespace ort {

constexpr uint32_t VERSION = 17;  // ONNX Runtime 1.17, the first with ParallelFor

struct Status;
struct SessionOptions;
struct Domain;
struct Value;
struct KernelInfo;
struct KernelContext;
struct ShapeInfo;

struct Api {
  void* functions[275];

  template <typename Result, typename... Arguments>
  Result call(int place, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(functions[place])(arguments...);
  }
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*version)();
};

// Places of functions in the table.
enum Place {
  CREATE_STATUS = 0,
  ERROR_MESSAGE = 2,
  CREATE_DOMAIN = 26,
  ADD_OPERATOR = 27,
  ADD_DOMAIN = 28,
  MUTABLE_DATA = 51,
  ELEMENT_TYPE = 60,
  DIMENSIONS_COUNT = 61,
  DIMENSIONS = 62,
  SHAPE_INFO = 65,
  ATTRIBUTE_FLOAT = 85,
  ATTRIBUTE_INT = 86,
  INPUT_COUNT = 88,
  INPUT = 90,
  OUTPUT = 91,
  RELEASE_STATUS = 93,
  RELEASE_SHAPE_INFO = 99,
  ATTRIBUTE_INTS = 163,
  PARALLEL_FOR = 274,
};

enum Type { ANY = 0, FLOAT = 1, UINT8 = 2, INT8 = 3, FLOAT16 = 10, INT4 = 22 };
enum Characteristic { REQUIRED = 0, OPTIONAL = 1 };

struct Operator {
  uint32_t version;
  void* (*create)(const Operator*, const Api*, const KernelInfo*);
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  int (*input_type)(const Operator*, size_t);
  size_t (*input_count)(const Operator*);
  int (*output_type)(const Operator*, size_t);
  size_t (*output_count)(const Operator*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  int (*input_characteristic)(const Operator*, size_t);
  int (*output_characteristic)(const Operator*, size_t);
  int (*input_memory)(const Operator*, size_t);
  int (*variadic_input_least)(const Operator*);
  int (*variadic_input_same)(const Operator*);
  int (*variadic_output_least)(const Operator*);
  int (*variadic_output_same)(const Operator*);
  Status* (*create_v2)(const Operator*, const Api*, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
  Status* (*infer_shape)(const Operator*, void*);
  int (*first_version)(const Operator*);
  int (*last_version)(const Operator*);
};

}  // namespace ort
}  // namespace edgesd
