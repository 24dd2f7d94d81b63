#include "operation.h"

#include <cstring>

#include "log.h"

namespace hqmq::trt {

void Operation::AddRole(const std::string& prefix) {
  RoleParams role = {};
  role.storage = static_cast<Storage>(attributes_.Int(prefix + "storage"));
  role.gain = static_cast<Gain>(attributes_.Int(prefix + "gain"));
  role.page_size = attributes_.Int("page_size");
  role.radius_bits = attributes_.Int(prefix + "radius_bits");
  if (role.storage == Storage::kHqmq) {
    role.hadamard = attributes_.Int(prefix + "hadamard");
    role.page_mean = attributes_.Int(prefix + "page_mean");
    role.outlier_capacity = attributes_.Int(prefix + "outlier_capacity");
  }
  if (role.page_size & (role.page_size - 1)) {
    throw Error("attribute 'page_size' is " + std::to_string(role.page_size) +
                ", no power of two; export the model again with this version of hqmq-trt");
  }
  roles_.push_back(role);
  tensors_.emplace_back();
}

void Operation::AddCodebook(size_t role, const std::string& name) {
  tensors_[role].codebook = inputs_.size();
  if (roles_[role].storage != Storage::kHqmq) return;
  AddInput(name + "secondaries", Type::kFloat32,
           {{kHeads}, {role ? kValueSecondaries : kSecondaries}, {kFixed, 4}});
  AddInput(name + "levels", Type::kFloat32, {{kFixed, int64_t{1} << roles_[role].radius_bits}});
}

void Operation::AddCache(size_t role, const std::string& name) {
  const RoleParams& params = roles_[role];
  tensors_[role].cache = inputs_.size();
  AddInput(name + "codes", Type::kInt32,
           {{kBatch}, {kHeads}, {kCapacity}, {role ? kValueWords : kWords}});
  if (params.storage == Storage::kHqmq)
    AddInput(name + "scales", Type::kFloat16, {{kBatch}, {kHeads}, {kCapacity}, {kFixed, 1}});
  if (params.page_mean)
    AddInput(name + "mean", Type::kFloat16, {{kBatch}, {kHeads}, {kPages}, {kHeadDim}});
  if (params.outlier_capacity > 0) {
    AddInput(name + "outlier_mask", Type::kInt32, {{kBatch}, {kHeads}, {kPages}, {kMaskWords}});
    AddInput(name + "outlier_value", Type::kFloat16,
             {{kBatch}, {kHeads}, {kPages}, {kFixed, params.outlier_capacity}, {kFixed, 4}});
  }
  AddInput(name + "tail", Type::kFloat16,
           {{kBatch}, {kHeads}, {kFixed, params.page_size}, {kHeadDim}});
}

void Operation::AddPresent(size_t role) {
  const RoleParams& params = roles_[role];
  tensors_[role].present = outputs_.size();
  const int count = 2 + (params.storage == Storage::kHqmq ? 1 : 0) + (params.page_mean ? 1 : 0) +
                    (params.outlier_capacity > 0 ? 2 : 0);
  for (int i = 0; i < count; ++i)
    outputs_.push_back({static_cast<int>(tensors_[role].cache) + i, true, {}});
}

hqmq_role_params Operation::Params(size_t role, const Sizes& from) const {
  RoleParams params = roles_[role];
  const int64_t dim = from[kHeadDim], count = from[role ? kValueSecondaries : kSecondaries];
  if (dim > 0) params.head_dim = static_cast<int32_t>(dim);
  if (count > 0) params.secondaries = static_cast<int32_t>(count);
  hqmq_role_params out;
  static_assert(sizeof(out) == sizeof(params));
  memcpy(&out, &params, sizeof(out));
  return out;
}

const float* Operation::Secondaries(size_t role, const Call& call) const {
  if (roles_[role].storage != Storage::kHqmq) return nullptr;
  return static_cast<const float*>(call.inputs[tensors_[role].codebook]);
}

const float* Operation::Levels(size_t role, const Call& call) const {
  if (roles_[role].storage != Storage::kHqmq) return nullptr;
  return static_cast<const float*>(call.inputs[tensors_[role].codebook + 1]);
}

hqmq_role_cache Operation::Cache(size_t role, void* const* tensors) const {
  const RoleParams& params = roles_[role];
  hqmq_role_cache cache = {};
  cache.codes = static_cast<int32_t*>(*tensors++);
  if (params.storage == Storage::kHqmq) cache.scales = static_cast<uint16_t*>(*tensors++);
  if (params.page_mean) cache.mean = static_cast<uint16_t*>(*tensors++);
  if (params.outlier_capacity > 0) {
    cache.outlier_mask = static_cast<int32_t*>(*tensors++);
    cache.outlier_value = static_cast<uint16_t*>(*tensors++);
  }
  cache.tail = static_cast<uint16_t*>(*tensors);
  return cache;
}

hqmq_rows Operation::Rows(const void* data, nvinfer1::DataType type, const Sizes& sizes, Size heads,
                          Size tokens, const char* name) {
  const int32_t dtype = type == nvinfer1::DataType::kFLOAT  ? HQMQ_FLOAT32
                        : type == nvinfer1::DataType::kHALF ? HQMQ_FLOAT16
                                                            : HQMQ_BFLOAT16;
  const int64_t token = sizes[kHeadDim], head = token * sizes[tokens];
  return {data, dtype, head * sizes[heads], head, token, name};
}

void Operation::Check(int status) {
  if (status != HQMQ_OK) throw Error(hqmq_cuda_last_error());
}

}  // namespace hqmq::trt
