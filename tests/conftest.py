"""Shared fixtures: tiny models with a byte tokenizer, and their exports, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """arch → folder of a saved tiny model (safetensors) with its tokenizer."""
    made: dict[str, Path] = {}

    def make(arch: str = "llama") -> Path:
        if arch not in made:
            from transformers import AutoModelForCausalLM

            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(arch)
            model = AutoModelForCausalLM.from_config(tiny_config(arch)).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    # Ordinary initialisation is so small that every token is as likely as any other.
                    parameter.mul_(2.0 if "norm" not in name else 1.0)
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            made[arch] = folder
        return made[arch]

    return make


@pytest.fixture(scope="session")
def tiny_export(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(scheme, mode, arch) → folder of an export; a test that changes it must copy it first."""
    made: dict[tuple[str, str, str], Path] = {}

    def make(scheme: str = "hq4@p16", mode: str = "fused", arch: str = "llama") -> Path:
        from hqmq_trt.export import export_model

        key = (scheme, mode, arch)
        if key not in made:
            folder = tmp_path_factory.mktemp("export") / "model"
            export_model(str(tiny_model(arch)), folder, scheme, mode=mode)
            made[key] = folder
        return made[key]

    return make
