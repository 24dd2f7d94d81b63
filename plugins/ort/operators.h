// The custom operators of domain com.hqmq (hqmq_trt/contract.py).
#pragma once

#include "ort_abi.h"

namespace hqmq::ort {

const CustomOp* QuantizeOp();
const CustomOp* DequantizeOp();
const CustomOp* AttentionOp();

// Output types and shapes of each operator (infer.cpp).
Status* InferQuantize(const CustomOp*, ShapeInferContext* context);
Status* InferDequantize(const CustomOp*, ShapeInferContext* context);
Status* InferAttention(const CustomOp*, ShapeInferContext* context);

}  // namespace hqmq::ort
