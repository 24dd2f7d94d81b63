// Made by `python -m hqmq_trt.contract --header` from hqmq_trt/contract.py; do not edit.
#pragma once

namespace hqmq::contract {

enum class Kind { kInt, kFloat };

// kActivation: float32, float16 or bfloat16, one for all such tensors of a node.
enum class Type { kActivation, kInt32, kFloat16, kFloat32 };

// A value within low…high; a float is finite. Every node has every attribute.
struct Attribute {
  const char* name;
  Kind kind;
  double low, high;
  bool power_of_two;
};

struct Tensor {
  const char* name;
  Type type;
  const char* shape;  // symbols of docs/contract.md: "B H M*P W"
  const char* when;   // attributes, all non-zero where it is there: "k_storage k_page_mean"
  const char* alias;  // of an output: the input it may share its memory with; "" if none
};

// Attributes without plugin_version and plugin_namespace, which TensorRT's parser reads.
struct Operator {
  const char* name;
  const Attribute* attributes;
  int num_attributes;
  const Tensor* inputs;
  int num_inputs;
  const Tensor* outputs;
  int num_outputs;
};

inline constexpr const char* kDomain = "com.hqmq";
inline constexpr const char* kPluginVersion = "1";

// clang-format off
inline constexpr Attribute kQuantizeAttributes[] = {
    {"storage", Kind::kInt, 0, 1, false},
    {"radius_bits", Kind::kInt, 1, 8, false},
    {"gain", Kind::kInt, 0, 1, false},
    {"hadamard", Kind::kInt, 0, 1, false},
    {"page_mean", Kind::kInt, 0, 1, false},
    {"outlier_capacity", Kind::kInt, 0, 1048576, false},
    {"sink_tokens", Kind::kInt, 0, 8, false},
    {"page_size", Kind::kInt, 8, 1024, true},
    {"format_version", Kind::kInt, 0, 2147483647, false},
};
inline constexpr Tensor kQuantizeInputs[] = {
    {"x", Type::kActivation, "B H T D", "", ""},
    {"past_length", Type::kInt32, "B", "", ""},
    {"new_length", Type::kInt32, "B", "", ""},
    {"secondaries", Type::kFloat32, "H S 4", "storage", ""},
    {"levels", Type::kFloat32, "2^r", "storage", ""},
    {"codes", Type::kInt32, "B H M*P W", "", ""},
    {"scales", Type::kInt32, "B H M Z", "storage", ""},
    {"mean", Type::kFloat16, "B H M D", "storage page_mean", ""},
    {"outlier_mask", Type::kInt32, "B H M U", "storage outlier_capacity", ""},
    {"outlier_value", Type::kFloat16, "B H M C 4", "storage outlier_capacity", ""},
    {"tail", Type::kFloat16, "B H P+N D", "", ""},
};
inline constexpr Tensor kQuantizeOutputs[] = {
    {"present_codes", Type::kInt32, "B H M*P W", "", "codes"},
    {"present_scales", Type::kInt32, "B H M Z", "storage", "scales"},
    {"present_mean", Type::kFloat16, "B H M D", "storage page_mean", "mean"},
    {"present_outlier_mask", Type::kInt32, "B H M U", "storage outlier_capacity", "outlier_mask"},
    {"present_outlier_value", Type::kFloat16, "B H M C 4", "storage outlier_capacity", "outlier_value"},
    {"present_tail", Type::kFloat16, "B H P+N D", "", "tail"},
};
inline constexpr Operator kQuantize = {"HqmqQuantize", kQuantizeAttributes, 9, kQuantizeInputs, 11, kQuantizeOutputs, 6};

inline constexpr Attribute kDequantizeAttributes[] = {
    {"storage", Kind::kInt, 0, 1, false},
    {"radius_bits", Kind::kInt, 1, 8, false},
    {"gain", Kind::kInt, 0, 1, false},
    {"hadamard", Kind::kInt, 0, 1, false},
    {"page_mean", Kind::kInt, 0, 1, false},
    {"outlier_capacity", Kind::kInt, 0, 1048576, false},
    {"sink_tokens", Kind::kInt, 0, 8, false},
    {"page_size", Kind::kInt, 8, 1024, true},
    {"format_version", Kind::kInt, 0, 2147483647, false},
};
inline constexpr Tensor kDequantizeInputs[] = {
    {"length", Type::kInt32, "B", "", ""},
    {"secondaries", Type::kFloat32, "H S 4", "storage", ""},
    {"levels", Type::kFloat32, "2^r", "storage", ""},
    {"codes", Type::kInt32, "B H M*P W", "", ""},
    {"scales", Type::kInt32, "B H M Z", "storage", ""},
    {"mean", Type::kFloat16, "B H M D", "storage page_mean", ""},
    {"outlier_mask", Type::kInt32, "B H M U", "storage outlier_capacity", ""},
    {"outlier_value", Type::kFloat16, "B H M C 4", "storage outlier_capacity", ""},
    {"tail", Type::kFloat16, "B H P+N D", "", ""},
};
inline constexpr Tensor kDequantizeOutputs[] = {
    {"x", Type::kFloat32, "B H M*P D", "", ""},
};
inline constexpr Operator kDequantize = {"HqmqDequantize", kDequantizeAttributes, 9, kDequantizeInputs, 9, kDequantizeOutputs, 1};

inline constexpr Attribute kAttentionAttributes[] = {
    {"scale", Kind::kFloat, -3.4028234663852886e+38, 3.4028234663852886e+38, false},
    {"window", Kind::kInt, 0, 2147483647, false},
    {"softcap", Kind::kFloat, 0.0, 3.4028234663852886e+38, false},
    {"has_sinks", Kind::kInt, 0, 1, false},
    {"k_storage", Kind::kInt, 0, 1, false},
    {"k_radius_bits", Kind::kInt, 1, 8, false},
    {"k_gain", Kind::kInt, 0, 1, false},
    {"k_hadamard", Kind::kInt, 0, 1, false},
    {"k_page_mean", Kind::kInt, 0, 1, false},
    {"k_outlier_capacity", Kind::kInt, 0, 1048576, false},
    {"k_sink_tokens", Kind::kInt, 0, 8, false},
    {"v_storage", Kind::kInt, 0, 1, false},
    {"v_radius_bits", Kind::kInt, 1, 8, false},
    {"v_gain", Kind::kInt, 0, 1, false},
    {"v_hadamard", Kind::kInt, 0, 1, false},
    {"v_page_mean", Kind::kInt, 0, 1, false},
    {"v_outlier_capacity", Kind::kInt, 0, 1048576, false},
    {"v_sink_tokens", Kind::kInt, 0, 8, false},
    {"page_size", Kind::kInt, 8, 1024, true},
    {"format_version", Kind::kInt, 0, 2147483647, false},
};
inline constexpr Tensor kAttentionInputs[] = {
    {"q", Type::kActivation, "B Hq T D", "", ""},
    {"k", Type::kActivation, "B H T D", "", ""},
    {"v", Type::kActivation, "B H T D", "", ""},
    {"past_length", Type::kInt32, "B", "", ""},
    {"new_length", Type::kInt32, "B", "", ""},
    {"sinks", Type::kActivation, "Hq", "has_sinks", ""},
    {"key_secondaries", Type::kFloat32, "H S 4", "k_storage", ""},
    {"key_levels", Type::kFloat32, "2^r", "k_storage", ""},
    {"value_secondaries", Type::kFloat32, "H S 4", "v_storage", ""},
    {"value_levels", Type::kFloat32, "2^r", "v_storage", ""},
    {"key_codes", Type::kInt32, "B H M*P W", "", ""},
    {"key_scales", Type::kInt32, "B H M Z", "k_storage", ""},
    {"key_mean", Type::kFloat16, "B H M D", "k_storage k_page_mean", ""},
    {"key_outlier_mask", Type::kInt32, "B H M U", "k_storage k_outlier_capacity", ""},
    {"key_outlier_value", Type::kFloat16, "B H M C 4", "k_storage k_outlier_capacity", ""},
    {"key_tail", Type::kFloat16, "B H P+N D", "", ""},
    {"value_codes", Type::kInt32, "B H M*P W", "", ""},
    {"value_scales", Type::kInt32, "B H M Z", "v_storage", ""},
    {"value_mean", Type::kFloat16, "B H M D", "v_storage v_page_mean", ""},
    {"value_outlier_mask", Type::kInt32, "B H M U", "v_storage v_outlier_capacity", ""},
    {"value_outlier_value", Type::kFloat16, "B H M C 4", "v_storage v_outlier_capacity", ""},
    {"value_tail", Type::kFloat16, "B H P+N D", "", ""},
};
inline constexpr Tensor kAttentionOutputs[] = {
    {"y", Type::kActivation, "B Hq T D", "", ""},
    {"present_key_codes", Type::kInt32, "B H M*P W", "", "key_codes"},
    {"present_key_scales", Type::kInt32, "B H M Z", "k_storage", "key_scales"},
    {"present_key_mean", Type::kFloat16, "B H M D", "k_storage k_page_mean", "key_mean"},
    {"present_key_outlier_mask", Type::kInt32, "B H M U", "k_storage k_outlier_capacity", "key_outlier_mask"},
    {"present_key_outlier_value", Type::kFloat16, "B H M C 4", "k_storage k_outlier_capacity", "key_outlier_value"},
    {"present_key_tail", Type::kFloat16, "B H P+N D", "", "key_tail"},
    {"present_value_codes", Type::kInt32, "B H M*P W", "", "value_codes"},
    {"present_value_scales", Type::kInt32, "B H M Z", "v_storage", "value_scales"},
    {"present_value_mean", Type::kFloat16, "B H M D", "v_storage v_page_mean", "value_mean"},
    {"present_value_outlier_mask", Type::kInt32, "B H M U", "v_storage v_outlier_capacity", "value_outlier_mask"},
    {"present_value_outlier_value", Type::kFloat16, "B H M C 4", "v_storage v_outlier_capacity", "value_outlier_value"},
    {"present_value_tail", Type::kFloat16, "B H P+N D", "", "value_tail"},
};
inline constexpr Operator kAttention = {"HqmqAttention", kAttentionAttributes, 20, kAttentionInputs, 22, kAttentionOutputs, 13};
// clang-format on

}  // namespace hqmq::contract
