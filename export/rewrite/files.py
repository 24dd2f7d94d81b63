"""What lies beside a model: its tokenizer, and configurations that name ends of text and the longest context."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Beside:
    """Files and facts found beside a model.

    Attributes:
        tokenizer: its files.
        architecture: class of the model, or an empty text.
        eos, bos, pad: token ids.
        max_position: longest context, or None.
    """

    tokenizer: list[Path] = field(default_factory=list)
    architecture: str = ""
    eos: list[int] = field(default_factory=list)
    bos: int | None = None
    pad: int | None = None
    max_position: int | None = None

    def save_pretrained(self, folder: Path) -> None:
        """Copy the tokenizer's files, as a tokenizer of transformers would write them."""
        for path in self.tokenizer:
            shutil.copyfile(path, folder / path.name)


def look_beside(path: Path) -> Beside:
    """What lies beside the ONNX file `path`, or, for a file in a folder ``onnx``, one folder higher."""
    folders = [path.parent]
    if path.resolve().parent.name == "onnx":
        folders.append(path.resolve().parent.parent)
    config: dict[str, Any] = {}
    tokenizer: list[Path] = []
    for folder in folders:
        tokenizer = tokenizer or [folder / name for name in _TOKENIZER if (folder / name).is_file()]
        genai = _json(folder / "genai_config.json").get("model", {})
        found = {**_known(genai if isinstance(genai, dict) else {}), **_known(_json(folder / "config.json"))}
        found.update(_known(_json(folder / "generation_config.json")))
        config = {**found, **config}
    ends = config.get("eos_token_id")
    return Beside(
        tokenizer,
        next(iter(config.get("architectures") or []), "") if isinstance(config.get("architectures"), list) else "",
        [ends] if isinstance(ends, int) else [end for end in ends or [] if isinstance(end, int)],
        _int(config.get("bos_token_id")),
        _int(config.get("pad_token_id")),
        _int(config.get("max_position_embeddings")) or _int(config.get("context_length")),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _known(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return {key: value for key, value in {**(inner if isinstance(inner, dict) else {}), **config}.items() if value} | {
        key: config[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id") if config.get(key) is not None
    }


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
