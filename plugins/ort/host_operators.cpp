// The operators on the CPU.
#include <algorithm>
#include <memory>
#include <mutex>

#include "attention.h"
#include "codec/numeric.h"
#include "custom_op.h"

namespace hqmq::ort {
namespace {

constexpr const char* kCpu = "CPUExecutionProvider";

// Decode tables of a role's codebook: made when the kernel is if the codebook is constant, else
// again whenever it changes.
class Tables {
 public:
  Tables(const Role& role, const NodeInfo& node, size_t first_input) {
    Tensor secondaries, levels;
    if (!role.ConstantCodebook(node, first_input, &secondaries, &levels)) return;
    RoleParams params = {};
    params.storage = Storage::kHqmq;
    params.radius_bits = role.radius_bits();
    params.secondaries = static_cast<int32_t>(secondaries.dims[1]);
    Make(params, static_cast<int>(secondaries.dims[0]), secondaries, levels);
    constant_ = true;
  }

  std::shared_ptr<const Words> Get(const Role::View& view) const {
    if (view.secondaries.data == nullptr) {
      static const auto none = std::make_shared<const Words>();
      return none;
    }
    if (constant_ && words_->Matches(view.params, view.heads)) return words_;
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool same =
        words_ && words_->Matches(view.params, view.heads) &&
        memcmp(secondaries_.data(), view.secondaries.data, view.secondaries.bytes()) == 0 &&
        memcmp(levels_.data(), view.levels.data, view.levels.bytes()) == 0;
    if (!same) Make(view.params, view.heads, view.secondaries, view.levels);
    return words_;
  }

 private:
  void Make(const RoleParams& params, int heads, const Tensor& secondaries,
            const Tensor& levels) const {
    const float* s = static_cast<const float*>(secondaries.data);
    const float* l = static_cast<const float*>(levels.data);
    secondaries_.assign(s, s + secondaries.bytes() / sizeof(float));
    levels_.assign(l, l + levels.bytes() / sizeof(float));
    words_ = std::make_shared<Words>(params, heads, s, l);
  }

  bool constant_ = false;
  mutable std::mutex mutex_;
  mutable std::vector<float> secondaries_, levels_;
  mutable std::shared_ptr<const Words> words_;
};

// Loops on ONNX Runtime's threads.
Threads ThreadsOf(KernelContext* context) {
  const auto run = [](void* pool, int64_t n, void (*body)(void*, int64_t), void* ctx) {
    struct Call {
      void (*body)(void*, int64_t);
      void* ctx;
    } call = {body, ctx};
    const auto one = [](void* user, size_t i) {
      const Call* call = static_cast<const Call*>(user);
      call->body(call->ctx, static_cast<int64_t>(i));
    };
    Check(api.KernelContext_ParallelFor(static_cast<const KernelContext*>(pool), one,
                                        static_cast<size_t>(n), 0, &call));
  };
  return {run, context};
}

Rows WritableRows(const Tensor& tensor) {
  const hqmq_rows rows = RowsOf(tensor, "output");
  return {tensor.data, rows.dtype, rows.batch_stride, rows.head_stride, rows.token_stride};
}

void CopyPast(const Present& present, const Threads& threads) {
  constexpr size_t kPiece = size_t{1} << 20;
  present.ForEachCopy([&](void* to, const void* from, size_t size) {
    threads.For(static_cast<int64_t>((size + kPiece - 1) / kPiece), [&](int64_t piece) {
      const size_t start = static_cast<size_t>(piece) * kPiece;
      memcpy(static_cast<char*>(to) + start, static_cast<const char*>(from) + start,
             std::min(kPiece, size - start));
    });
  });
}

// Elements of any float type as float32.
std::vector<float> Floats(const Tensor& tensor) {
  const int32_t dtype = DtypeOf(tensor, "sinks");
  std::vector<float> out(tensor.bytes() / (dtype == HQMQ_FLOAT32 ? 4 : 2));
  const uint16_t* bits = static_cast<const uint16_t*>(tensor.data);
  for (size_t i = 0; i < out.size(); ++i) {
    if (dtype == HQMQ_FLOAT32) out[i] = static_cast<const float*>(tensor.data)[i];
    if (dtype == HQMQ_FLOAT16) out[i] = FloatFromHalf(bits[i]);
    if (dtype == HQMQ_BFLOAT16) out[i] = FloatFromBf16(bits[i]);
  }
  return out;
}

class Quantize {
 public:
  static constexpr const char* kName = "HqmqQuantize";
  static constexpr const char* kProvider = kCpu;
  static constexpr int kLeastOutputs = 2;

  explicit Quantize(const NodeInfo& node) : node_(node) {
    Tensor secondaries, levels;
    node_.role.ConstantCodebook(node, QuantizeNode::kCodebook, &secondaries, &levels);
  }

  void Compute(KernelContext* context) const {
    const QuantizeCall call = node_.Read(context);
    AppendJob job = {};
    job.role = call.past.params;
    job.batch = call.past.batch;
    job.heads = call.past.heads;
    job.num_pages = call.past.num_pages;
    job.x = RowsOf(call.x, "x");
    job.tokens = static_cast<int32_t>(call.x.dims[2]);
    job.past_length = call.past_length;
    job.new_length = call.new_length;
    job.secondaries = call.past.secondary_data();
    job.levels = call.past.level_data();
    const Present present(context, 0, call.past);
    job.cache = present.cache();
    const Threads threads = ThreadsOf(context);
    Check(CheckAppend(job, threads));
    CopyPast(present, threads);
    int64_t dropped = 0;
    Append(job, threads, &dropped);
  }

 private:
  QuantizeNode node_;
};

class Dequantize {
 public:
  static constexpr const char* kName = "HqmqDequantize";
  static constexpr const char* kProvider = kCpu;
  static constexpr int kLeastOutputs = 1;

  explicit Dequantize(const NodeInfo& node)
      : node_(node), tables_(node_.role, node, DequantizeNode::kCodebook) {}

  void Compute(KernelContext* context) const {
    const DequantizeCall call = node_.Read(context);
    const Role::View& cache = call.cache;
    const std::shared_ptr<const Words> words = tables_.Get(cache);
    DequantizeJob job = {};
    job.role = cache.params;
    job.table = words->table();
    job.cache = cache.cache;
    job.length = call.length;
    job.batch = cache.batch;
    job.heads = cache.heads;
    job.num_pages = cache.num_pages;
    job.x = WritableRows(Output(context, 0, kFloat, call.dims));
    Check(DequantizeCache(job, ThreadsOf(context)));
  }

 private:
  DequantizeNode node_;
  Tables tables_;
};

class Attention {
 public:
  static constexpr const char* kName = "HqmqAttention";
  static constexpr const char* kProvider = kCpu;
  static constexpr int kLeastOutputs = 5;

  explicit Attention(const NodeInfo& node)
      : node_(node),
        key_tables_(node_.key, node, node_.key_codebook),
        value_tables_(node_.value, node, node_.value_codebook) {}

  void Compute(KernelContext* context) const {
    const AttentionCall call = node_.Read(context);
    const std::shared_ptr<const Words> key_words = key_tables_.Get(call.key),
                                       value_words = value_tables_.Get(call.value);
    AttentionRequest request = {};
    request.q = RowsOf(call.q, "q");
    request.key = RoleOf(call.key, RowsOf(call.k, "k"), key_words.get());
    request.value = RoleOf(call.value, RowsOf(call.v, "v"), value_words.get());
    request.batch = call.key.batch;
    request.heads = call.key.heads;
    request.group = call.group;
    request.tokens = call.tokens;
    request.num_pages = call.key.num_pages;
    request.past_length = call.past_length;
    request.new_length = call.new_length;
    request.scale = node_.scale;
    request.softcap = node_.softcap;
    request.window = node_.window;
    std::vector<float> sinks;
    if (node_.has_sinks) {
      sinks = Floats(call.sinks);
      request.sinks = sinks.data();
    }

    request.y = WritableRows(Output(context, 0, call.q.type, call.q.dims));
    const Present key(context, 1, call.key),
        value(context, 1 + call.key.tensors.size(), call.value);
    request.key.cache = key.cache();
    request.value.cache = value.cache();
    const Threads threads = ThreadsOf(context);
    Check(CheckAttention(request, threads));
    CopyPast(key, threads);
    CopyPast(value, threads);
    int64_t dropped = 0;
    RunAttention(request, threads, &dropped);
  }

 private:
  static AttentionRole RoleOf(const Role::View& view, const hqmq_rows& x, const Words* words) {
    return {view.params, x, view.secondary_data(), view.level_data(), {}, words};
  }

  AttentionNode node_;
  Tables key_tables_, value_tables_;
};

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
