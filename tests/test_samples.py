"""samples/chat.py on ONNX Runtime: turns read only their own tokens, and a saved conversation goes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

SAMPLES = Path(__file__).parents[1] / "samples"
Models = Callable[[str], Path]
CHAT_TEMPLATE = (
    "{% for m in messages %}<user>{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<user>assistant:{% endif %}"
)
OPENING = len("xuser:Hello\n") + len("xassistant:")
FOLLOWING = len("\n") + len("xuser:And now?\n") + len("xassistant:")
NEW = 12


@pytest.fixture(scope="module")
def export(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template that keeps earlier turns as they were. <user> and each byte are a token."""
    from transformers import AutoModelForCausalLM

    from hqmq_trt.export import export_model
    from tests.conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    folder = tmp_path_factory.mktemp("chat") / "model"
    export_model(model, folder, "hq4@p16", tokenizer=tokenizer)
    return folder


def chat(folder: Path, lines: str, *options: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a chat fed with lines."""
    command = [sys.executable, str(SAMPLES / "chat.py"), str(folder), "-n", str(NEW), *options]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def turns(err: str) -> list[tuple[int, int]]:
    """(tokens read, tokens held) of each turn."""
    return [(int(a), int(b)) for a, b in re.findall(r"read (\d+) tokens, (\d+) held", err)]


def test_turns_read_only_their_own_tokens(export: Path) -> None:
    code, out, err = chat(export, "Hello\nAnd now?\n/reset\nHello\n/quit\nnever read\n")
    assert code == 0, err
    first, second, again = turns(err)
    # The last token of an answer that was cut short is read with the next turn.
    assert first == again == (OPENING, OPENING + NEW - 1)
    assert second[0] in (FOLLOWING, FOLLOWING + 1)
    assert second[1] <= first[1] + second[0] + NEW - 1
    assert out


def test_saved_conversation_goes_on(export: Path, tmp_path: Path) -> None:
    first, whole, rest = (tmp_path / name for name in ("first", "whole", "rest"))
    code, said, err = chat(export, f"Hello\n/save {first}\nAnd now?\n/save {whole}\n")
    assert code == 0, err
    code, later, loaded = chat(export, f"/load {first}\nAnd now?\n/save {rest}\n")
    assert code == 0, loaded
    assert turns(loaded) == turns(err)[1:]
    assert later
    assert said.endswith(later)
    kept, again = (json.loads(path.with_name(path.name + ".json").read_text()) for path in (whole, rest))
    assert kept == again
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant"] * 2
    tensors, same = load_file(whole), load_file(rest)
    assert tensors.keys() == same.keys()
    assert all(np.array_equal(tensors[name], same[name]) for name in tensors)
    assert sum(x.size for x in tensors.values()) > sum(x.size for x in load_file(first).values())


def test_mistakes(export: Path, tmp_path: Path) -> None:
    code, _, err = chat(tmp_path, "Hello\n")
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    code, out, err = chat(export, f"/load {tmp_path / 'none'}\n/what\n{'long ' * 40}\nHello\n", "--max-context", "64")
    assert code == 2
    assert [line.split(":")[0] for line in err.splitlines()[:3]] == ["error"] * 3
    assert "unknown command '/what'" in err
    assert "raise max_context" in err
    assert len(turns(err)) == 1, "a line that failed leaves the conversation usable"
    assert out
