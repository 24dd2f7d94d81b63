"""Fidelity: what a model keeps when its KV cache is compressed (``hqmq-trt eval``)."""
