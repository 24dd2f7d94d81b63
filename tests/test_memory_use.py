"""Generating holds the packed cache and no full-length fp16 or fp32 copy of K or V."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("scheme", ["hq3", "hq4"])
def test_attention_makes_no_dense_copy_of_the_cache(scheme: str) -> None:
    probe = Path(__file__).with_name("memory_probe.py")
    done = subprocess.run([sys.executable, str(probe), scheme], capture_output=True, text=True, check=True)
    numbers = json.loads(done.stdout)
    # K alone in fp16 would be half of numbers["fp16"]; one chunk's activations and tables are far smaller.
    assert numbers["grown"] < numbers["fp16"] / 16
    assert numbers["packed"] < numbers["fp16"] / 3
