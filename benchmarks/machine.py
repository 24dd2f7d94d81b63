"""Where a measurement was made: date, card, versions, commit; and a log with the time since the start."""

from __future__ import annotations

import datetime
import importlib
import platform
import subprocess
import sys
import time
from pathlib import Path

_STARTED = time.monotonic()


def log(text: str) -> None:
    """One line on stderr, with wall-clock time and seconds since the start."""
    now = datetime.datetime.now().strftime("%H:%M:%S")
    print(f"[{now} +{time.monotonic() - _STARTED:6.1f}s] {text}", file=sys.stderr, flush=True)


def command_output(*command: str) -> str:
    """What a command prints, stripped; empty if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def version_of(module: str) -> str:
    """``__version__`` of a module, or ``missing``."""
    try:
        return str(importlib.import_module(module).__version__)
    except Exception:  # an import can fail with anything when a shared library is missing
        return "missing"


def machine(commit: str | None = None) -> dict[str, str]:
    """Date, card, driver, versions and commit; `commit` where git cannot tell."""
    root = str(Path(__file__).resolve().parent.parent)
    query = command_output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    card = (query.splitlines() or [""])[0].split(", ")
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "card": card[0] or "none",
        "driver": card[1] if len(card) > 1 else "none",
        "commit": commit or command_output("git", "-C", root, "rev-parse", "--short", "HEAD") or "unknown",
        "python": platform.python_version(),
    }
    return found | {name: version_of(name) for name in ("tensorrt", "torch", "onnxruntime", "transformers")}
