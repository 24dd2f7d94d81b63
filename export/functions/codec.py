"""What a function body needs to know of the node it is for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from hqmq_trt.format import Plane, mask_words, planes
from hqmq_trt.scheme import Gain, Storage


@dataclass(frozen=True)
class Codec:
    """Attributes of a HqmqQuantize or HqmqDequantize node and the static sizes of its inputs."""

    storage: int
    gain: int
    radius_bits: int
    hadamard: int
    page_mean: int
    outlier_capacity: int
    sink_tokens: int
    page_size: int
    heads: int
    head_dim: int
    secondaries: int

    @staticmethod
    def of(node: ir.Node) -> Codec:
        """Read a node whose last input is the tail [B, H, P+N, D] and whose codebook comes before the cache."""
        number = {
            name: node.attributes[name].as_int()
            for name in (
                "storage",
                "gain",
                "radius_bits",
                "hadamard",
                "page_mean",
                "outlier_capacity",
                "sink_tokens",
                "page_size",
            )
        }
        tail = node.inputs[-1]
        assert tail is not None
        assert tail.shape is not None
        secondaries = 0
        for value in node.inputs:
            if value is not None and (value.name or "").endswith(".secondaries"):
                secondaries = int(value.shape[1])
        return Codec(heads=int(tail.shape[1]), head_dim=int(tail.shape[3]), secondaries=secondaries, **number)

    @property
    def name(self) -> str:
        """Overload of the functions for this codec."""
        parts = ["fp16"]
        if self.packed:
            parts = [f"s{self.secondaries}_r{self.radius_bits}", "rms" if self.rms else "max"]
            parts += ["hadamard"] * self.hadamard + ["mean"] * self.page_mean
            parts += [f"med3x{self.outlier_capacity}"] if self.outlier_capacity else []
        parts += [f"sinks{self.sink_tokens}"] if self.sink_tokens else []
        return "_".join([*parts, f"h{self.heads}_d{self.head_dim}_p{self.page_size}"])

    @property
    def packed(self) -> bool:
        """Whether tokens are quaternion codes."""
        return self.storage == Storage.HQMQ

    @property
    def rms(self) -> bool:
        """Whether the gain is RMS (else MAX)."""
        return self.gain == Gain.RMS

    @property
    def chunks(self) -> int:
        """C: chunks a token."""
        return self.head_dim // 4

    @property
    def index_bits(self) -> int:
        """Bits of a codeword's index."""
        return math.ceil(math.log2(12 * self.secondaries))

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Bit planes of a token."""
        return planes(self.index_bits + self.radius_bits + 1, self.head_dim)

    @property
    def words(self) -> int:
        """W: words a token."""
        bits = (self.index_bits + self.radius_bits + 1) * self.chunks if self.packed else 16 * self.head_dim
        return -(-bits // 32)

    @property
    def mask_words(self) -> int:
        """Words of a page's outlier mask, the count of dropped ones included."""
        return mask_words(self.head_dim, self.page_size)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the cache tensors, in order."""
        if not self.packed:
            return ("codes", "tail")
        mean = ("mean",) if self.page_mean else ()
        outliers = ("outlier_mask", "outlier_value") if self.outlier_capacity else ()
        return ("codes", "scales", *mean, *outliers, "tail")
