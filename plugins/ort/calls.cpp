#include "calls.h"

namespace hqmq::ort {
namespace {

constexpr size_t kSinks = 5;

void CheckTogether(const AttentionCall& call) {
  const Tensor &q = call.q, &k = call.k, &v = call.v;
  if (q.type != k.type || k.type != v.type) {
    throw Error("'q', 'k' and 'v' are " + TypeName(q.type) + ", " + TypeName(k.type) + " and " +
                TypeName(v.type) + "; they must be of one type");
  }
  if (k.dims != v.dims || q.dims[0] != k.dims[0] || q.dims[2] != k.dims[2] ||
      q.dims[3] != k.dims[3] || q.dims[1] == 0 || k.dims[1] == 0 || q.dims[1] % k.dims[1]) {
    throw Error("'q' " + Text(q.dims) + ", 'k' " + Text(k.dims) + " and 'v' " + Text(v.dims) +
                " do not fit together: expected [B, n*H, T, D] and twice [B, H, T, D]");
  }
  if (call.key.num_pages != call.value.num_pages) {
    throw Error("the key cache has " + std::to_string(call.key.num_pages) +
                " pages and the value cache " + std::to_string(call.value.num_pages));
  }
}

}  // namespace

QuantizeNode::QuantizeNode(const NodeInfo& node)
    : role(node, "", "", node.Int("page_size", 8, 1024)) {
  node.CheckInterface(kCodebook + role.codebook_inputs() + role.cache_tensors(),
                      role.cache_tensors());
}

QuantizeCall QuantizeNode::Read(const KernelContext* context) const {
  QuantizeCall call = {};
  call.past = role.Read(context, kCodebook, kCodebook + role.codebook_inputs());
  call.x = Input(context, 0);
  RowsOf(call.x, "x");
  CheckRows(call.x, call.past, "x");
  call.past_length = Lengths(Input(context, 1), call.past.batch, "past_length");
  call.new_length = Lengths(Input(context, 2), call.past.batch, "new_length");
  return call;
}

DequantizeNode::DequantizeNode(const NodeInfo& node)
    : role(node, "", "", node.Int("page_size", 8, 1024)) {
  node.CheckInterface(kCodebook + role.codebook_inputs() + role.cache_tensors(), 1);
}

DequantizeCall DequantizeNode::Read(const KernelContext* context) const {
  DequantizeCall call = {};
  call.cache = role.Read(context, kCodebook, kCodebook + role.codebook_inputs());
  const Role::View& cache = call.cache;
  call.length = Lengths(Input(context, 0), cache.batch, "length");
  call.dims = {cache.batch, cache.heads, cache.tensors[0].dims[2], cache.params.head_dim};
  return call;
}

AttentionNode::AttentionNode(const NodeInfo& node)
    : key(node, "k_", "key ", node.Int("page_size", 8, 1024)),
      value(node, "v_", "value ", node.Int("page_size", 8, 1024)),
      scale(node.Float("scale")),
      softcap(node.Float("softcap")),
      window(node.Int("window", 0, INT32_MAX)),
      has_sinks(node.Int("has_sinks", 0, 1)) {
  if (!(softcap >= 0)) throw Error("attribute 'softcap' is negative; use 0 for none");
  key_codebook = kSinks + has_sinks;
  value_codebook = key_codebook + key.codebook_inputs();
  key_cache = value_codebook + value.codebook_inputs();
  value_cache = key_cache + key.cache_tensors();
  node.CheckInterface(value_cache + value.cache_tensors(),
                      1 + key.cache_tensors() + value.cache_tensors());
}

AttentionCall AttentionNode::Read(const KernelContext* context) const {
  AttentionCall call = {};
  call.key = key.Read(context, key_codebook, key_cache);
  call.value = value.Read(context, value_codebook, value_cache);
  call.q = Input(context, 0);
  call.k = Input(context, 1);
  call.v = Input(context, 2);
  RowsOf(call.q, "q");
  RowsOf(call.k, "k");
  RowsOf(call.v, "v");
  CheckRows(call.k, call.key, "k");
  CheckRows(call.v, call.value, "v");
  CheckTogether(call);
  call.past_length = Lengths(Input(context, 3), call.key.batch, "past_length");
  call.new_length = Lengths(Input(context, 4), call.key.batch, "new_length");
  call.group = static_cast<int32_t>(call.q.dims[1] / call.key.heads);
  call.tokens = static_cast<int32_t>(call.k.dims[2]);
  if (has_sinks) {
    call.sinks = Input(context, kSinks);
    if (call.sinks.type != call.q.type || call.sinks.dims != Dims{call.q.dims[1]}) {
      throw Error("'sinks' is " + TypeName(call.sinks.type) + " " + Text(call.sinks.dims) +
                  ", expected " + TypeName(call.q.type) + " [" + std::to_string(call.q.dims[1]) +
                  "]");
    }
  }
  return call;
}

}  // namespace hqmq::ort
