#include "operators.h"

#include "node.h"

namespace hqmq::ort {
namespace {

class Quantize {
 public:
  static constexpr const char* kName = "HqmqQuantize";
  static constexpr int kLeastOutputs = 2;

  explicit Quantize(const NodeInfo& node) : role_(node, "", "", node.Int("page_size", 8, 1024)) {
    node.CheckInterface(kCodebook + role_.codebook_inputs() + role_.cache_tensors(),
                        role_.cache_tensors());
    role_.BindCodebook(node, kCodebook);
  }

  void Compute(KernelContext* context) const {
    const Role::View past = role_.Read(context, kCodebook, kCodebook + role_.codebook_inputs());
    const Tensor x = Input(context, 0), past_length = Input(context, 1),
                 new_length = Input(context, 2);
    AppendJob job = {};
    job.role = past.params;
    job.batch = past.batch;
    job.heads = past.heads;
    job.num_pages = past.num_pages;
    job.x = RowsOf(x, "x");
    CheckRows(x, past, "x");
    job.tokens = static_cast<int32_t>(x.dims[2]);
    job.past_length = Lengths(past_length, past.batch, "past_length");
    job.new_length = Lengths(new_length, past.batch, "new_length");
    job.secondaries = past.secondaries;
    job.levels = past.levels;
    const Present present(context, 0, past);
    job.cache = present.cache();
    const Threads threads = ThreadsOf(context);
    Check(CheckAppend(job, threads));
    present.CopyPast(threads);
    int64_t dropped = 0;
    Append(job, threads, &dropped);
  }

 private:
  static constexpr size_t kCodebook = 3;
  Role role_;
};

class Dequantize {
 public:
  static constexpr const char* kName = "HqmqDequantize";
  static constexpr int kLeastOutputs = 1;

  explicit Dequantize(const NodeInfo& node) : role_(node, "", "", node.Int("page_size", 8, 1024)) {
    node.CheckInterface(kCodebook + role_.codebook_inputs() + role_.cache_tensors(), 1);
    role_.BindCodebook(node, kCodebook);
  }

  void Compute(KernelContext* context) const {
    const Role::View cache = role_.Read(context, kCodebook, kCodebook + role_.codebook_inputs());
    const Tensor length = Input(context, 0);
    const Dims dims = {cache.batch, cache.heads, cache.tensors[0].dims[2], cache.params.head_dim};
    DequantizeJob job = {};
    job.role = cache.params;
    job.table = cache.words->table();
    job.cache = cache.cache;
    job.length = Lengths(length, cache.batch, "length");
    job.batch = cache.batch;
    job.heads = cache.heads;
    job.num_pages = cache.num_pages;
    job.x = WritableRows(Output(context, 0, kFloat, dims));
    Check(DequantizeCache(job, ThreadsOf(context)));
  }

 private:
  static constexpr size_t kCodebook = 1;
  Role role_;
};

class Attention {
 public:
  static constexpr const char* kName = "HqmqAttention";
  static constexpr int kLeastOutputs = 5;

  explicit Attention(const NodeInfo& node)
      : key_(node, "k_", "key ", node.Int("page_size", 8, 1024)),
        value_(node, "v_", "value ", node.Int("page_size", 8, 1024)),
        scale_(node.Float("scale")),
        softcap_(node.Float("softcap")),
        window_(node.Int("window", 0, INT32_MAX)),
        sinks_(node.Int("has_sinks", 0, 1)) {
    if (!(softcap_ >= 0)) throw Error("attribute 'softcap' is negative; use 0 for none");
    key_codebook_ = kSinks + sinks_;
    value_codebook_ = key_codebook_ + key_.codebook_inputs();
    key_cache_ = value_codebook_ + value_.codebook_inputs();
    value_cache_ = key_cache_ + key_.cache_tensors();
    node.CheckInterface(value_cache_ + value_.cache_tensors(),
                        1 + key_.cache_tensors() + value_.cache_tensors());
    key_.BindCodebook(node, key_codebook_);
    value_.BindCodebook(node, value_codebook_);
  }

  void Compute(KernelContext* context) const {
    const Role::View key = key_.Read(context, key_codebook_, key_cache_);
    const Role::View value = value_.Read(context, value_codebook_, value_cache_);
    const Tensor q = Input(context, 0), k = Input(context, 1), v = Input(context, 2);
    const Tensor past_length = Input(context, 3), new_length = Input(context, 4);
    AttentionRequest request = {};
    request.q = RowsOf(q, "q");
    request.key = RoleOf(key, RowsOf(k, "k"));
    request.value = RoleOf(value, RowsOf(v, "v"));
    CheckRows(k, key, "k");
    CheckRows(v, value, "v");
    CheckTogether(q, k, v, key, value);
    request.batch = key.batch;
    request.heads = key.heads;
    request.group = static_cast<int32_t>(q.dims[1] / key.heads);
    request.tokens = static_cast<int32_t>(k.dims[2]);
    request.num_pages = key.num_pages;
    request.past_length = Lengths(past_length, key.batch, "past_length");
    request.new_length = Lengths(new_length, key.batch, "new_length");
    request.scale = scale_;
    request.softcap = softcap_;
    request.window = window_;
    const std::vector<float> sinks = Sinks(context, q);
    if (sinks_) request.sinks = sinks.data();

    request.y = WritableRows(Output(context, 0, q.type, q.dims));
    const Present key_present(context, 1, key),
        value_present(context, 1 + key.tensors.size(), value);
    request.key.cache = key_present.cache();
    request.value.cache = value_present.cache();
    const Threads threads = ThreadsOf(context);
    Check(CheckAttention(request, threads));
    key_present.CopyPast(threads);
    value_present.CopyPast(threads);
    int64_t dropped = 0;
    RunAttention(request, threads, &dropped);
  }

 private:
  static constexpr size_t kSinks = 5;

  static AttentionRole RoleOf(const Role::View& view, const hqmq_rows& x) {
    return {view.params, x, view.secondaries, view.levels, {}, view.words.get()};
  }

  static void CheckTogether(const Tensor& q, const Tensor& k, const Tensor& v,
                            const Role::View& key, const Role::View& value) {
    if (q.type != k.type || k.type != v.type) {
      throw Error("'q', 'k' and 'v' are " + TypeName(q.type) + ", " + TypeName(k.type) + " and " +
                  TypeName(v.type) + "; they must be of one type");
    }
    if (k.dims != v.dims || q.dims[0] != k.dims[0] || q.dims[2] != k.dims[2] ||
        q.dims[3] != k.dims[3] || q.dims[1] == 0 || k.dims[1] == 0 || q.dims[1] % k.dims[1]) {
      throw Error("'q' " + Text(q.dims) + ", 'k' " + Text(k.dims) + " and 'v' " + Text(v.dims) +
                  " do not fit together: expected [B, n*H, T, D] and twice [B, H, T, D]");
    }
    if (key.num_pages != value.num_pages) {
      throw Error("the key cache has " + std::to_string(key.num_pages) +
                  " pages and the value cache " + std::to_string(value.num_pages));
    }
  }

  std::vector<float> Sinks(KernelContext* context, const Tensor& q) const {
    if (!sinks_) return {};
    const Tensor tensor = Input(context, kSinks);
    if (tensor.type != q.type || tensor.dims != Dims{q.dims[1]}) {
      throw Error("'sinks' is " + TypeName(tensor.type) + " " + Text(tensor.dims) + ", expected " +
                  TypeName(q.type) + " [" + std::to_string(q.dims[1]) + "]");
    }
    return Floats(tensor);
  }

  Role key_, value_;
  float scale_, softcap_;
  int window_, sinks_;
  size_t key_codebook_, value_codebook_, key_cache_, value_cache_;
};

template <class Kernel>
struct Made {
  std::string title;
  Kernel kernel;
};

// ONNX Runtime allows one variadic parameter, and it must be the last: all inputs are one, all
// outputs another.
template <class Kernel>
CustomOp MakeOp(Status* (*infer)(const CustomOp*, ShapeInferContext*)) {
  CustomOp op = {};
  op.version = kApiVersion;
  op.GetName = [](const CustomOp*) -> const char* { return Kernel::kName; };
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* {
    return "CPUExecutionProvider";
  };
  op.GetInputType = [](const CustomOp*, size_t) -> int { return kUndefined; };
  op.GetOutputType = op.GetInputType;
  op.GetInputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  op.GetOutputTypeCount = op.GetInputTypeCount;
  op.GetInputCharacteristic = [](const CustomOp*, size_t) -> int { return kVariadic; };
  op.GetOutputCharacteristic = op.GetInputCharacteristic;
  op.GetInputMemoryType = [](const CustomOp*, size_t) -> int { return 0; };
  op.GetVariadicInputMinArity = [](const CustomOp*) -> int { return 1; };
  op.GetVariadicOutputMinArity = [](const CustomOp*) -> int { return Kernel::kLeastOutputs; };
  op.GetVariadicInputHomogeneity = [](const CustomOp*) -> int { return 0; };
  op.GetVariadicOutputHomogeneity = op.GetVariadicInputHomogeneity;
  op.CreateKernelV2 = [](const CustomOp*, const Api*, const KernelInfo* info,
                         void** kernel) -> Status* {
    return Guard([&] {
      const NodeInfo node(Kernel::kName, info);
      Titled(node.Message(""), [&] { *kernel = new Made<Kernel>{node.Message(""), Kernel(node)}; });
    });
  };
  op.KernelComputeV2 = [](void* kernel, KernelContext* context) -> Status* {
    return Guard([&] {
      const auto* made = static_cast<const Made<Kernel>*>(kernel);
      Titled(made->title, [&] { made->kernel.Compute(context); });
    });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Made<Kernel>*>(kernel); };
  op.InferOutputShapeFn = infer;
  op.GetStartVersion = [](const CustomOp*) -> int { return 1; };
  op.GetEndVersion = [](const CustomOp*) -> int { return INT32_MAX; };
  return op;
}

}  // namespace

const CustomOp* QuantizeOp() {
  static const CustomOp op = MakeOp<Quantize>(InferQuantize);
  return &op;
}

const CustomOp* DequantizeOp() {
  static const CustomOp op = MakeOp<Dequantize>(InferDequantize);
  return &op;
}

const CustomOp* AttentionOp() {
  static const CustomOp op = MakeOp<Attention>(InferAttention);
  return &op;
}

}  // namespace hqmq::ort
