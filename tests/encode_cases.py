"""Values for HqmqQuantize, and a pair of caches for the tests that compare the CUDA library's bytes with the host's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hqmq_trt import cuda, native, oracle
from hqmq_trt.scheme import RoleScheme, Scheme
from tests.attention_cases import bits
from tests.codec_cases import activations, codebook, lengths

VALUES = ("model", "ties", "wide")


def inputs(values: str, *shape: int) -> Tensor:
    """float32 [B, H, T, D]. ties: few values, equal chunks and tokens; wide: fp16 subnormals to its largest values."""
    g = torch.Generator().manual_seed(shape[-1])
    if values == "model":
        return activations(*shape).clamp(-6e4, 6e4)
    if values == "ties":
        x = torch.randint(-1, 2, shape, generator=g).float()
        x[..., : shape[-1] // 2] *= 0.5
        x[:, :, ::3, 4:8] = 1.0
        x[:, :, 1::5] = 0
        x[:, :, 2::7] = 1
        return x
    x = torch.randn(shape, generator=g) * torch.exp(6 * torch.randn(shape[:-1], generator=g))[..., None]
    x[:, :, ::4] *= 2.0**-22
    x[:, :, 1::9] = 6e4
    x[:, :, 3::8, :4] = 5e4
    x[:, :, 5::8, 8:] = 0
    x[:, :, 6::8] = 6e-8
    x[:, :, 7::16, 1:] = 0
    return x.clamp(-6e4, 6e4)


class Caches:
    """A cache on the host and one of the CUDA library, on `device`, that take the same calls."""

    def __init__(
        self, name: str, role_name: str, head_dim: int, heads: int, batch: int, tokens: int,
        sinks: int | None = None, device: str = "cuda",
    ) -> None:  # fmt: skip
        scheme = Scheme.parse(name)
        self.page = scheme.page_size
        role = scheme.role(role_name)
        self.role: RoleScheme = role if sinks is None else replace(role, sink_tokens=sinks)
        self.book = codebook(self.role, heads, role_name)
        pages = -(-tokens // self.page)
        self.host = list(oracle.empty_cache(self.role, self.page, head_dim, heads, batch, pages).values())
        self.host[-1].normal_(generator=torch.Generator().manual_seed(tokens))  # rows nobody writes must stay
        self.on = device
        self.device = [self.there(tensor) for tensor in self.host]

    def there(self, tensor: Tensor) -> Tensor:
        """A copy on the device."""
        return tensor.to(self.on, copy=True)

    def append(self, x: Tensor, past: list[int], new: list[int]) -> None:
        """x [B, H, T, D] on the host, and bit for bit the same cache afterwards."""
        native.append(x, lengths(*past), lengths(*new), self.role, self.book, self.host)
        book = [self.there(tensor) for tensor in self.book]
        lens = self.there(lengths(*past)), self.there(lengths(*new))
        cuda.append(self.there(x), *lens, self.role, book, self.device)
        different = [int((bits(a) != bits(b.cpu())).sum()) for a, b in zip(self.host, self.device, strict=True)]
        assert sum(different) == 0, f"differing words by tensor: {different} of {[a.numel() for a in self.host]}"
