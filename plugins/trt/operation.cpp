#include "operation.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>

#include "codec/layout.h"
#include "log.h"

namespace hqmq::trt {

namespace {

// K's tensors and those of operators of one role come first.
bool IsValue(const contract::Tensor& tensor) {
  return std::string(tensor.name).find("value_") != std::string::npos;
}

}  // namespace

Operation::Operation(const contract::Operator& op, const nvinfer1::PluginFieldCollection* fields,
                     int roles)
    : op_(op), attributes_(op, fields) {
  if (roles == 1) {
    roles_ = {MakeRole("")};
  } else {
    roles_ = {MakeRole("k_"), MakeRole("v_")};
  }
  for (int i = 0; i < op.num_inputs; ++i) {
    if (attributes_.All(op.inputs[i].when))
      inputs_.push_back({op.inputs[i].name, op.inputs[i].type, DimsOf(op.inputs[i])});
  }
  for (int i = 0; i < op.num_outputs; ++i) {
    if (attributes_.All(op.outputs[i].when)) outputs_.push_back(MakeOutput(op.outputs[i]));
  }
  static const char* const names[2][2] = {{"", ""}, {"key_", "value_"}};
  for (int i = 0; i < roles; ++i) {
    const std::string name = names[roles - 1][i];
    const size_t cache = Input(name + "codes");
    size_t present = 0;
    while (present < outputs_.size() && outputs_[present].alike != static_cast<int>(cache))
      ++present;
    const bool packed = roles_[i].storage == Storage::kHqmq;
    tensors_.push_back({packed ? Input(name + "secondaries") : 0, cache, present});
  }
}

RoleParams Operation::MakeRole(const std::string& prefix) const {
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
  role.sink_tokens = attributes_.Int(prefix + "sink_tokens");
  if (role.storage == Storage::kFp16 && role.sink_tokens != 0) {
    throw Error("attribute '" + prefix + "sink_tokens' is " + std::to_string(role.sink_tokens) +
                ", but storage fp16 takes none; export the model again with this version of "
                "hqmq-trt");
  }
  return role;
}

std::vector<Dim> Operation::DimsOf(const contract::Tensor& tensor) const {
  const bool value = roles_.size() > 1 && IsValue(tensor);
  const RoleParams& role = roles_[value ? 1 : 0];
  const std::map<std::string, Dim> symbols = {
      {"B", {kBatch}},
      {"H", {kHeads}},
      {"Hq", {kQueryHeads}},
      {"T", {kTokens}},
      {"D", {kHeadDim}},
      {"M*P", {kCapacity}},
      {"M", {kPages}},
      {"S", {value ? kValueSecondaries : kSecondaries}},
      {"W", {value ? kValueWords : kWords}},
      {"U", {kMaskWords}},
      {"Z", {kFixed, ScaleWords(role)}},
      {"P+N", {kFixed, TailRows(role)}},
      {"C", {kFixed, role.outlier_capacity}},
      {"2^r", {kFixed, int64_t{1} << role.radius_bits}},
      {"1", {kFixed, 1}},
      {"4", {kFixed, 4}},
  };
  std::vector<Dim> out;
  std::istringstream in(tensor.shape);
  for (std::string symbol; in >> symbol;) {
    const auto at = symbols.find(symbol);
    if (at == symbols.end()) throw Error("the contract has an unknown size '" + symbol + "'");
    out.push_back(at->second);
  }
  return out;
}

Operation::Output Operation::MakeOutput(const contract::Tensor& tensor) const {
  if (*tensor.alias) return {static_cast<int>(Input(tensor.alias)), true, {}};
  if (tensor.type == Type::kActivation) return {0, false, {}};
  Output out = {-1, false, {}};
  for (const Dim& dim : DimsOf(tensor)) {
    // From the first activation or cache tensor that has it.
    for (size_t i = 0; i < inputs_.size() && out.dims.size() < 4; ++i) {
      const std::vector<Dim>& dims = inputs_[i].dims;
      const auto at = std::find_if(dims.begin(), dims.end(),
                                   [&](const Dim& other) { return other.size == dim.size; });
      if (dims.size() != 4 || at == dims.end()) continue;
      out.dims.push_back({i, static_cast<int>(at - dims.begin())});
      break;
    }
  }
  return out;
}

size_t Operation::Input(const std::string& name) const {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (name == inputs_[i].name) return i;
  }
  throw Error("the contract has no input '" + name + "' for these attributes");
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

hqmq_role_cache Operation::Past(size_t role, const Call& call) const {
  // A cache has one type, whether read or written.
  return Cache(role, const_cast<void* const*>(call.inputs) + tensors_[role].cache);
}

hqmq_role_cache Operation::Present(size_t role, const Call& call) const {
  return Cache(role, call.outputs + tensors_[role].present);
}

hqmq_role_cache Operation::Cache(size_t role, void* const* tensors) const {
  const RoleParams& params = roles_[role];
  hqmq_role_cache cache = {};
  cache.codes = static_cast<int32_t*>(*tensors++);
  if (params.storage == Storage::kHqmq) cache.scales = static_cast<int32_t*>(*tensors++);
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
