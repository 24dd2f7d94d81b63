"""Where a model comes from: an object, a folder with safetensors, a GGUF file, or a name on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hqmq_trt.errors import HqmqError

from .gguf_reading import reading_once
from .safetensors_reading import reading_apart

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


_MODALITIES = ("vision_config", "audio_config", "speech_config", "image_config", "video_config", "thinker_config")
"""Parts of a configuration that say that a model sees or hears."""

_WORD_STARTS, _SAMPLED_WORDS = ("▁", "Ġ"), 200
"""What tokens of words begin with in SentencePiece and byte-level vocabularies."""


@dataclass(frozen=True)
class Source:
    """A loaded model, its tokenizer (None if it has none) and what to call it."""

    model: Any
    tokenizer: Any
    name: str


def load(source: Any, dtype: str | None = None, gguf_file: str | None = None) -> Source:
    """Load a causal language model.

    Args:
        source: a transformers model, a folder, the path of a .gguf file, or a hub name.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None: the checkpoint's own, float32 for GGUF.
        gguf_file: name of a GGUF file inside the folder `source`.

    Raises:
        HqmqError: nothing there, not a causal language model, or an architecture that transformers does not know.
    """
    if dtype is not None and dtype not in DTYPES:
        raise HqmqError(f"unknown dtype '{dtype}': use {', '.join(DTYPES)}")
    if isinstance(source, torch.nn.Module):
        found = _of_object(source, dtype)
    else:
        found = _of_path(str(source), dtype, gguf_file)
    config = found.model.config
    if getattr(config, "is_encoder_decoder", False):
        raise HqmqError(f"{found.name} is an encoder-decoder model; HQMQ serves decoder-only language models")
    others = sorted(name.removesuffix("_config") for name in _MODALITIES if getattr(config, name, None) is not None)
    if others:
        raise HqmqError(
            f"{found.name} ({type(found.model).__name__}) is a multimodal model ({', '.join(others)}); the graph takes "
            "token ids only: load its language model on its own as a causal LM"
        )
    if found.model.get_output_embeddings() is None:
        raise HqmqError(f"{found.name} ({type(found.model).__name__}) has no language-model head; load a causal LM")
    return found


def _of_object(model: Any, dtype: str | None) -> Source:
    if not isinstance(model, PreTrainedModel):
        raise HqmqError(f"{type(model).__name__} is not a transformers model; pass one, or a folder")
    if dtype is not None and model.dtype != DTYPES[dtype]:
        raise HqmqError(f"the model is {model.dtype}, not {dtype}; convert it first with model.to(torch.{dtype})")
    return Source(model, None, model.config.name_or_path or type(model).__name__)


def _of_path(source: str, dtype: str | None, gguf_file: str | None) -> Source:
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise HqmqError(f"{path}: is a file but no .gguf; give the model's folder")
        source, gguf_file = str(path.parent), path.name
    elif path.is_dir():
        if gguf_file is None and not (path / "config.json").is_file():
            inside = sorted(file.name for file in path.glob("*.gguf"))
            hint = f"; name one of its GGUF files: {', '.join(inside)}" if inside else ""
            raise HqmqError(f"{path}: holds no config.json{hint}")
        if gguf_file is not None and not (path / gguf_file).is_file():
            raise HqmqError(f"{path / gguf_file}: no such GGUF file")
    elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or source.endswith(".gguf"):
        raise HqmqError(f"{source}: no such file or folder")
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    name = gguf_file or (path.resolve().name if path.exists() else source)
    chosen = DTYPES[dtype] if dtype else (torch.float32 if gguf_file else "auto")
    with reading_once() if gguf_file else reading_apart(chosen):
        model = _model(source, name, chosen, options)
        tokenizer = _tokenizer(source, name, options)
    if gguf_file:
        check_words(tokenizer, name)
    return Source(model, tokenizer, name)


def _model(source: str, name: str, dtype: Any, options: dict[str, Any]) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except Exception as error:  # transformers raises what it likes for damaged and unknown models
        raise HqmqError(f"{name}: transformers cannot load it as a causal language model: {_reason(error)}") from error


def _tokenizer(source: str, name: str, options: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        path = Path(source)
        if path.is_dir() and not options and not list(path.glob("*token*")):
            return None  # a bare model: it runs on ids
        raise HqmqError(f"{name}: transformers cannot load its tokenizer: {_reason(error)}") from error


def check_words(tokenizer: Any, name: str) -> None:
    """Whether words that the vocabulary holds are one token each, as far as a sample tells.

    transformers builds the merges of a GGUF file's tokenizer itself. 5.17 built those of Gemma wrongly: its texts were
    cut into twice as many tokens, and any perplexity, text or accuracy that followed was of a damaged model.

    Raises:
        HqmqError: most of the sample is cut into pieces.
    """
    words = sorted(
        (index, token[1:])
        for token, index in tokenizer.get_vocab().items()
        if token[:1] in _WORD_STARTS and len(token) > 4 and token[1:].isascii() and token[1:].isalpha()
    )
    sample = words[:: max(1, len(words) // _SAMPLED_WORDS)]
    # With or without the space, which some tokenizers add themselves; what counts is the last token.
    cut = [
        word
        for index, word in sample
        if all(tokenizer(text, add_special_tokens=False)["input_ids"][-1:] != [index] for text in (" " + word, word))
    ]
    if 2 * len(cut) > len(sample):
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(" " + cut[0], add_special_tokens=False)["input_ids"])
        raise HqmqError(
            f"{name}: transformers {transformers.__version__} cuts words of the file's own vocabulary into pieces "
            f"({len(cut)} of {len(sample)}; '{cut[0]}' into {' '.join(pieces)}), so the model would read nonsense; "
            "use transformers 5.19 or later, or the Hugging Face folder of the model"
        )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
