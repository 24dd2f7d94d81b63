#include "node.h"

#include "append.h"
#include "codec/layout.h"

namespace hqmq::ort {

NodeInfo::NodeInfo(const char* op, const KernelInfo* info) : info_(info) {
  char name[512] = "";
  size_t size = sizeof(name);
  const bool named = Works(api.KernelInfo_GetNodeName(info, name, &size)) && name[0];
  title_ = std::string(op) + (named ? " node '" + std::string(name) + "': " : " node: ");
}

int NodeInfo::Int(const std::string& name, int low, int high) const {
  int64_t value = 0;
  if (!Works(api.KernelInfoGetAttribute_int64(info_, name.c_str(), &value))) {
    throw Error("attribute '" + name + "' is missing; export the model again");
  }
  if (value < low || value > high) {
    throw Error("attribute '" + name + "' is " + std::to_string(value) + ", outside " +
                std::to_string(low) + "…" + std::to_string(high) + "; export the model again");
  }
  return static_cast<int>(value);
}

float NodeInfo::Float(const std::string& name) const {
  float value = 0;
  if (!Works(api.KernelInfoGetAttribute_float(info_, name.c_str(), &value))) {
    throw Error("attribute '" + name + "' is missing; export the model again");
  }
  return value;
}

void NodeInfo::CheckInterface(size_t inputs, size_t outputs) const {
  const int version = Int("format_version", 0, 1 << 30);
  if (version != HQMQ_FORMAT_VERSION) {
    throw Error("made for cache format version " + std::to_string(version) +
                ", but this library has version " + std::to_string(HQMQ_FORMAT_VERSION) +
                "; export the model again or install the matching hqmq-trt");
  }
  size_t has_inputs = 0, has_outputs = 0;
  Check(api.KernelInfo_GetInputCount(info_, &has_inputs));
  Check(api.KernelInfo_GetOutputCount(info_, &has_outputs));
  if (has_inputs != inputs || has_outputs != outputs) {
    throw Error("has " + std::to_string(has_inputs) + " inputs and " + std::to_string(has_outputs) +
                " outputs; its attributes ask for " + std::to_string(inputs) + " and " +
                std::to_string(outputs) + "; export the model again");
  }
}

bool NodeInfo::Constant(size_t index, Tensor* out) const {
  int constant = 0;
  const Value* value = nullptr;
  if (!Works(api.KernelInfoGetConstantInput_tensor(info_, index, &constant, &value)) || !constant)
    return false;
  *out = ReadTensor(value);
  return true;
}

Role::Role(const NodeInfo& node, std::string prefix, std::string name, int page_size)
    : name_(std::move(name)) {
  params_.storage = static_cast<Storage>(node.Int(prefix + "storage", 0, 1));
  params_.radius_bits = node.Int(prefix + "radius_bits", 1, 8);
  params_.gain = static_cast<Gain>(node.Int(prefix + "gain", 0, 1));
  params_.page_size = page_size;
  const int hadamard = node.Int(prefix + "hadamard", 0, 1),
            mean = node.Int(prefix + "page_mean", 0, 1);
  const int capacity = node.Int(prefix + "outlier_capacity", 0, 1 << 20);
  params_.sink_tokens = node.Int(prefix + "sink_tokens", 0, kMaxSinkTokens);
  if (!packed() && params_.sink_tokens != 0) {
    throw Error("attribute '" + prefix + "sink_tokens' is " + std::to_string(params_.sink_tokens) +
                ", but storage fp16 takes none; export the model again");
  }
  if (packed())
    params_.hadamard = hadamard, params_.page_mean = mean, params_.outlier_capacity = capacity;
}

size_t Role::cache_tensors() const {
  return 2 + (packed() ? 1 : 0) + (params_.page_mean ? 1 : 0) +
         (params_.outlier_capacity > 0 ? 2 : 0);
}

void Role::CheckCodebook(const Tensor& secondaries, const Tensor& levels) const {
  if (secondaries.type != kFloat || secondaries.dims.size() != 3 || secondaries.dims[2] != 4) {
    throw Error(name_ + "codebook 'secondaries' is " + TypeName(secondaries.type) + " " +
                Text(secondaries.dims) + ", expected float32 [H, S, 4]");
  }
  if (levels.type != kFloat || levels.dims != Dims{int64_t{1} << params_.radius_bits}) {
    throw Error(name_ + "codebook 'levels' is " + TypeName(levels.type) + " " + Text(levels.dims) +
                ", expected float32 [" + std::to_string(1 << params_.radius_bits) + "]");
  }
}

bool Role::ConstantCodebook(const NodeInfo& node, size_t first_input, Tensor* secondaries,
                            Tensor* levels) const {
  if (!packed() || !node.Constant(first_input, secondaries) ||
      !node.Constant(first_input + 1, levels))
    return false;
  CheckCodebook(*secondaries, *levels);
  if (secondaries->dims[1] < 1 || secondaries->dims[1] > 1024) {
    throw Error(name_ + "codebook 'secondaries' is " + Text(secondaries->dims) +
                ", expected 1…1024 secondaries");
  }
  return true;
}

RoleCache CacheOf(const RoleParams& params, const std::vector<Tensor>& tensors) {
  size_t i = 0;
  RoleCache cache = {};
  cache.codes = static_cast<int32_t*>(tensors[i++].data);
  if (params.storage == Storage::kHqmq) cache.scales = static_cast<int32_t*>(tensors[i++].data);
  if (params.page_mean) cache.mean = static_cast<uint16_t*>(tensors[i++].data);
  if (params.outlier_capacity > 0) {
    cache.outlier_mask = static_cast<int32_t*>(tensors[i++].data);
    cache.outlier_value = static_cast<uint16_t*>(tensors[i++].data);
  }
  cache.tail = static_cast<uint16_t*>(tensors[i].data);
  return cache;
}

Role::View Role::Read(const KernelContext* context, size_t first_codebook,
                      size_t first_cache) const {
  View out = {};
  out.params = params_;
  for (size_t i = 0; i < cache_tensors(); ++i)
    out.tensors.push_back(Input(context, first_cache + i));
  const Tensor &codes = out.tensors.front(), &tail = out.tensors.back();
  const int64_t page = params_.page_size;
  if (tail.dims.size() != 4 || tail.dims[2] != TailRows(params_) || codes.dims.size() != 4 ||
      codes.dims[2] % page) {
    throw Error(name_ + "cache tensors 'codes' " + Text(codes.dims) + " and 'tail' " +
                Text(tail.dims) + " are not [B, H, M*P, W] and [B, H, P+N, D] with pages of " +
                std::to_string(page) + " tokens and " + std::to_string(params_.sink_tokens) +
                " sink tokens");
  }
  out.params.head_dim = static_cast<int32_t>(tail.dims[3]);
  out.batch = static_cast<int>(tail.dims[0]);
  out.heads = static_cast<int>(tail.dims[1]);
  out.num_pages = static_cast<int>(codes.dims[2] / page);

  Tensor& secondaries = out.secondaries;
  if (packed()) {
    secondaries = Input(context, first_codebook);
    out.levels = Input(context, first_codebook + 1);
    CheckCodebook(secondaries, out.levels);
    if (secondaries.dims[0] != out.heads) {
      throw Error(name_ + "codebook 'secondaries' " + Text(secondaries.dims) + " and a cache of " +
                  std::to_string(out.heads) + " heads do not belong together");
    }
    out.params.secondaries = static_cast<int32_t>(secondaries.dims[1]);
  }
  Check(CheckRole(out.params));

  const Layout layout = MakeLayout(out.params);
  const int64_t b = out.batch, h = out.heads, m = out.num_pages, d = out.params.head_dim;
  struct Expected {
    const char* name;
    int type;
    Dims dims;
  };
  std::vector<Expected> expected = {{"codes", kInt32, {b, h, m * page, layout.words}}};
  if (packed()) expected.push_back({"scales", kInt32, {b, h, m, ScaleWords(out.params)}});
  if (params_.page_mean) expected.push_back({"mean", kFloat16, {b, h, m, d}});
  if (params_.outlier_capacity > 0) {
    expected.push_back({"outlier_mask", kInt32, {b, h, m, MaskWords(out.params)}});
    expected.push_back({"outlier_value", kFloat16, {b, h, m, params_.outlier_capacity, 4}});
  }
  expected.push_back({"tail", kFloat16, {b, h, TailRows(params_), d}});
  for (size_t i = 0; i < expected.size(); ++i) {
    const Tensor& tensor = out.tensors[i];
    if (tensor.type == expected[i].type && tensor.dims == expected[i].dims) continue;
    throw Error(name_ + "cache tensor '" + expected[i].name + "' is " + TypeName(tensor.type) +
                " " + Text(tensor.dims) + ", expected " + TypeName(expected[i].type) + " " +
                Text(expected[i].dims));
  }
  out.cache = CacheOf(out.params, out.tensors);
  return out;
}

Present::Present(KernelContext* context, size_t first_output, const Role::View& past)
    : past_(past) {
  for (size_t i = 0; i < past.tensors.size(); ++i) {
    tensors_.push_back(
        Output(context, first_output + i, past.tensors[i].type, past.tensors[i].dims));
  }
}

RoleCache Present::cache() const { return CacheOf(past_.params, tensors_); }

int32_t DtypeOf(const Tensor& tensor, const char* name) {
  if (tensor.type == kFloat) return HQMQ_FLOAT32;
  if (tensor.type == kFloat16) return HQMQ_FLOAT16;
  if (tensor.type == kBfloat16) return HQMQ_BFLOAT16;
  throw Error("'" + std::string(name) + "' is " + TypeName(tensor.type) +
              ", expected float32, float16 or bfloat16");
}

hqmq_rows RowsOf(const Tensor& tensor, const char* name) {
  const int32_t dtype = DtypeOf(tensor, name);
  if (tensor.dims.size() != 4) {
    throw Error("'" + std::string(name) + "' is " + Text(tensor.dims) + ", expected [B, H, T, D]");
  }
  const int64_t token = tensor.dims[3], head = token * tensor.dims[2],
                batch = head * tensor.dims[1];
  return {tensor.data, dtype, batch, head, token, name};
}

void CheckRows(const Tensor& x, const Role::View& cache, const char* name) {
  const int64_t heads = cache.heads, dim = cache.params.head_dim;
  if (x.dims[0] == cache.batch && x.dims[1] == heads && x.dims[3] == dim) return;
  throw Error("'" + std::string(name) + "' is " + Text(x.dims) + ", its cache asks for " +
              Text({cache.batch, heads, x.dims[2], dim}));
}

const int32_t* Lengths(const Tensor& tensor, int batch, const char* name) {
  if (tensor.type != kInt32 || tensor.dims != Dims{batch}) {
    throw Error("'" + std::string(name) + "' is " + TypeName(tensor.type) + " " +
                Text(tensor.dims) + ", expected int32 [" + std::to_string(batch) + "]");
  }
  return static_cast<const int32_t*>(tensor.data);
}

void Check(const hqmq::Status& status) {
  if (!status.ok())
    throw Error(status.text, status.code == HQMQ_INTERNAL ? kRuntimeException : kInvalidArgument);
}

}  // namespace hqmq::ort
