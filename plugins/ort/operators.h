// The custom operators of domain com.hqmq (hqmq_trt/contract.py).
#pragma once

#include "ort_abi.h"

namespace hqmq::ort {

// For the CPU execution provider (host_operators.cpp).
const CustomOp* QuantizeOp();
const CustomOp* DequantizeOp();
const CustomOp* AttentionOp();

// For the CUDA execution provider (cuda_operators.cpp).
const CustomOp* CudaQuantizeOp();
const CustomOp* CudaDequantizeOp();
const CustomOp* CudaAttentionOp();

// Output types and shapes of each operator (infer.cpp).
Status* InferQuantize(const CustomOp*, ShapeInferContext* context);
Status* InferDequantize(const CustomOp*, ShapeInferContext* context);
Status* InferAttention(const CustomOp*, ShapeInferContext* context);

}  // namespace hqmq::ort
