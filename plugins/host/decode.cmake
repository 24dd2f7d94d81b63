# Decode side of the host library: HqmqDequantize and HqmqAttention.
list(APPEND HQMQ_KERNELS attention_kernels.cpp)
list(APPEND HQMQ_CORE attention.cpp word_table.cpp)
list(APPEND HQMQ_HOST_API attention_api.cpp)
