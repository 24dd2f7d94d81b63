"""Shared fixtures: tiny models with a byte tokenizer, and their exports, made once for all test processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch starts its threads: the processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock

if TYPE_CHECKING:
    from tests.emulated_cuda import EmulatedGpu

HEAD_DIM = 64
VOCABULARY = 260


def tiny_config(arch: str) -> Any:
    """Configuration of a tiny random model: llama or qwen2 (with K bias), two layers, GQA 2, head_dim 64."""
    from transformers import LlamaConfig, Qwen2Config

    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[arch]
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=4 * HEAD_DIM,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        tie_word_embeddings=False,
    )


def tiny_tokenizer() -> Any:
    """One token a byte, then <bos>, <eos>, <pad> and <user>; with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>", "<user>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<bos>"
    return fast


@pytest.fixture(scope="session", autouse=True)
def _operators_once() -> Iterator[None]:
    """torch.onnx reads its table of operators anew for each export, a sixth of the time of a tiny one: read it once."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read, tables = ONNXRegistry.from_torchlib, {}

    def copy(*args: int, **kwargs: int) -> ONNXRegistry:
        key = (args, tuple(kwargs.items()))
        if key not in tables:
            tables[key] = read(*args, **kwargs)
        registry = ONNXRegistry()
        registry.__dict__.update(tables[key].__dict__)
        registry.functions = {target: list(found) for target, found in tables[key].functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copy))
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """(name, make) → folder of this name, by the first test process that asks for it: make(a folder that is not there)
    makes it. A test that changes it must copy it first."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path = root / f"shared-{name}"
        with FileLock(root / f"shared-{name}.lock"):
            if not path.is_dir():
                partial = root / f"partial-{name}"
                make(partial)
                partial.rename(path)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_model(shared_folder: Callable[..., Path]) -> Callable[[str], Path]:
    """arch → folder of a saved tiny model (safetensors) with its tokenizer."""

    def save(folder: Path, arch: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(arch)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Ordinary initialisation is so small that every token is as likely as any other.
                parameter.mul_(2.0 if "norm" not in name else 1.0)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)

    def make(arch: str = "llama") -> Path:
        return shared_folder(arch, lambda folder: save(folder, arch))

    return make


@pytest.fixture(scope="session")
def tiny_export(tiny_model: Callable[[str], Path], shared_folder: Callable[..., Path]) -> Callable[..., Path]:
    """(scheme, mode, arch) → folder of an export; a test that changes it must copy it first."""

    def make(scheme: str = "hq4@p16", mode: str = "fused", arch: str = "llama") -> Path:
        from hqmq_trt.export import export_model

        name = f"{arch}-{mode}-{scheme}".replace(":", "_")
        return shared_folder(name, lambda folder: export_model(str(tiny_model(arch)), folder, scheme, mode=mode))

    return make


@pytest.fixture
def emulated() -> Iterator[EmulatedGpu]:
    """The CUDA kernels on the CPU: hqmq_trt.cuda takes tensors on the CPU in this test."""
    from tests.emulated_cuda import emulated_gpu

    with emulated_gpu() as gpu:
        yield gpu
