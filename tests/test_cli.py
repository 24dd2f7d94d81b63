"""The command line: results, JSON, exit codes, and one line of error for every mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from hqmq_trt import cli, ort_library
from hqmq_trt.cli.output import Output
from hqmq_trt.format import FORMAT_VERSION

Export = Callable[..., Path]
Hqmq = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hqmq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Hqmq:
    """Call the entry point: (exit code, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(Output, "verbose", False)
        monkeypatch.setattr(sys, "argv", ["hqmq-trt", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def refuse(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def document(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = result
    assert code == 0, err
    content: dict[str, Any] = json.loads(out)
    return content


@pytest.fixture
def copy(tiny_export: Export, tmp_path: Path) -> Path:
    """An export that a test may damage."""
    return Path(shutil.copytree(tiny_export(), tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---------------------------------------------------------------- results


def test_version(hqmq: Hqmq) -> None:
    code, out, _ = hqmq("--version")
    assert code == 0
    found = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert {"hqmq-trt", "format", "library", "python", "torch", "onnx", "onnxruntime", "transformers"} <= set(found)
    assert found["format"] == str(FORMAT_VERSION)
    assert document(hqmq("--version", "--json"))["python"] == sys.version.split()[0]


def test_help_is_quick_and_needs_no_torch() -> None:
    program = "import sys; from hqmq_trt.cli import app; print('torch' in sys.modules, 'onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_run_does_not_need_torch(tiny_export: Export) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        f"sys.argv = ['hqmq-trt', 'run', {str(tiny_export())!r}, '-p', 'abc', '-n', '3', '--json']\n"
        "from hqmq_trt.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completions"][0]["prompt_tokens"] > 0


def test_run_is_deterministic_and_batched(hqmq: Hqmq, tiny_export: Export, tmp_path: Path) -> None:
    prompts = ["a", "a much longer prompt that fills more than one page of the cache"]
    (tmp_path / "second.txt").write_text(prompts[1])
    common = ("--raw", "-n", "12", "--temperature", "1", "--seed", "5", "--json", "--prefill-chunk", "20")
    batch = ("run", tiny_export(), "-p", prompts[0], "--prompt-file", tmp_path / "second.txt", *common)
    first, second = document(hqmq(*batch)), document(hqmq(*batch))
    assert first["completions"] == second["completions"]
    alone = document(hqmq("run", tiny_export(), "-p", prompts[0], *common))
    assert first["completions"][0] == alone["completions"][0]
    assert [found["prompt_tokens"] for found in first["completions"]] == [len(text) for text in prompts]
    assert first["cache_bytes"] == sum(first["cache_bytes_by_kind"].values())
    assert first["max_context"] == 80
    other = document(hqmq(*batch, "--seed", "6"))
    assert other["completions"] != first["completions"]


def test_run_streams_text(hqmq: Hqmq, tiny_export: Export) -> None:
    arguments = ("run", tiny_export(), "-p", "Hello", "-n", "9")
    text = document(hqmq(*arguments, "--json"))["completions"][0]["text"]
    code, out, err = hqmq(*arguments)
    assert (code, out) == (0, text + "\n")
    assert "new at" in err
    code, out, err = hqmq(*arguments, "-q")
    assert (code, out, err) == (0, text + "\n", "")


def test_chat_and_raw_differ(hqmq: Hqmq, tiny_export: Export) -> None:
    chat, raw = (
        document(hqmq("run", tiny_export(), "-p", "Hi", "-n", "1", flag, "--json")) for flag in ("--chat", "--raw")
    )
    assert raw["completions"][0]["prompt_tokens"] == 2
    assert chat["completions"][0]["prompt_tokens"] == 4


def test_export_inspect_memory(hqmq: Hqmq, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    made = document(
        hqmq("export", tiny_model("qwen2"), "-o", folder, "--scheme", "paper:s8_r3+med3", "--mode", "qdq", "--json")
    )
    assert (made["layers"], made["mode"], made["scheme"]) == (2, "qdq", "paper:s8_r3+med3")
    refuse(hqmq("export", tiny_model("qwen2"), "-o", folder), "not empty", "--overwrite")

    seen = document(hqmq("inspect", folder, "--context", "100", "--batch", "3", "--json"))
    assert seen["nodes"]["com.hqmq::HqmqQuantize"] == seen["nodes"]["com.hqmq::HqmqDequantize"] == 4
    assert seen["fp16_bytes"] == 2 * 2 * 2 * 2 * 64 * 100 * 3
    shapes = {tensor["name"]: tensor["shape"] for tensor in seen["cache"]}
    assert shapes["0.key.codes"] == [3, 2, 128, 6]
    assert seen["cache_bytes"] == sum(tensor["bytes"] for tensor in seen["cache"])
    sized = document(
        hqmq("memory", "-m", tiny_model("qwen2"), "--context", "100", "--batch", "3", "-s", made["scheme"], "--json")
    )
    by_kind = sized["schemes"][0]["by_kind"]
    assert seen["cache_bytes"] == sum(by_kind.values()) - by_kind["codebooks"]
    assert (seen["stored_bits"], seen["fp16_bytes"]) == (sized["schemes"][0]["stored_bits"], sized["fp16_bytes"])

    graph = document(hqmq("inspect", folder / "model.onnx", "--json"))
    assert {node["type"] for node in graph["attention"]} >= {"HqmqQuantize", "HqmqDequantize"}
    assert "past.1.value.outlier_mask" in {value["name"] for value in graph["inputs"]}
    source = document(hqmq("inspect", tiny_model("qwen2"), "--json"))
    assert (source["kind"], source["layers"], source["kv_heads"]) == ("hugging_face", 2, 2)
    for path in (folder, folder / "model.onnx", tiny_model("qwen2")):
        code, out, _ = hqmq("inspect", path)
        assert code == 0
        assert out


def test_diff(hqmq: Hqmq, tiny_export: Export, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    arguments = ("diff", tiny_export(), "--model", tiny_model("llama"), "--tokens", "90", "--decode-steps", "10")
    found = document(hqmq(*arguments, "--chunk", "40", "--report", report, "--json"))
    assert found["logits"]["same"]["mean_kl"] < 1e-5 < found["logits"]["unpacked"]["mean_kl"]
    assert found["logits"]["same"]["positions"] == 100
    assert found["logits"]["pinned"]["mean_kl"] < 1e-6
    assert found["logits"]["pinned"]["top1"] == 1.0
    assert max(found["changed_chunks"].values()) < 0.05
    assert [(error["layer"], error["role"]) for error in found["layers"]] == [
        (layer, role) for layer in (0, 1) for role in ("key", "value")
    ]
    for error in found["layers"]:
        # hq4 codes a Gaussian chunk with a relative MSE of 0.0079; the last page and its tail are exact.
        assert 0.003 < error["codec"] < 0.012
        assert error["in_run"] < 0.05
    first = found["layers"][0]
    assert first["in_run"] == pytest.approx(first["codec"], rel=0.01), "layer 0 sees no earlier error"
    page = report.read_text()
    assert page.count("<svg") == 3
    assert "src=" not in page
    assert 'href="http' not in page.replace("xlink:href", "")
    code, out, _ = hqmq(*arguments, "--against", "same", "--max-kl", "1e-4", "--min-top1", "0.99")
    assert code == 0
    assert "mean KL" in out
    code, out, err = hqmq(*arguments, "--against", "unpacked", "--max-kl", "1e-9")
    assert code == 1
    assert "outside the limits" in err


# ---------------------------------------------------------------- mistakes


def test_unknown_scheme(hqmq: Hqmq, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    for scheme in ("hq9", "paper:s0_r3", "paper:s8_r9", "hq4@p5"):
        refuse(hqmq("memory", "--scheme", scheme))
        refuse(hqmq("export", tiny_model("llama"), "-o", tmp_path / "out", "--scheme", scheme))
        assert not (tmp_path / "out").exists()


def test_unknown_model(hqmq: Hqmq, tmp_path: Path) -> None:
    refuse(hqmq("export", tmp_path / "none", "-o", tmp_path / "out"), "none")
    (tmp_path / "empty").mkdir()
    refuse(hqmq("export", tmp_path / "empty", "-o", tmp_path / "out"), "config.json")
    assert not (tmp_path / "out").exists()
    refuse(hqmq("memory", "--model", "none"), "unknown model 'none'")
    refuse(hqmq("inspect", tmp_path / "none"), "no such file")


def test_cache_too_small(hqmq: Hqmq, tiny_export: Export) -> None:
    result = hqmq("run", tiny_export(), "-p", "a" * 40, "--raw", "-n", "20", "--max-context", "32", "--json")
    refuse(result, "holds 32 tokens", "59 are needed", "--max-context 59")


def test_bad_run_options(hqmq: Hqmq, tiny_export: Export, tmp_path: Path) -> None:
    refuse(hqmq("run", tiny_export(), "-p", "a", "--temperature", "-1"), "temperature")
    refuse(hqmq("run", tiny_export(), "-p", "a", "--top-p", "2"), "top_p")
    refuse(hqmq("run", tiny_export(), "-p", "", "--raw"), "no tokens")
    refuse(hqmq("run", tiny_export(), "-p", "a", "--max-context", "0"), "max-context")
    refuse(hqmq("run", tiny_export(), "-p", "a", "--threads", "-2"), "threads")
    refuse(hqmq("run", tiny_export(), "--prompt-file", tmp_path / "none"), "--prompt-file")
    refuse(hqmq("run", tmp_path / "none", "-p", "a"), "no such folder")
    refuse(hqmq("memory", "--layers", "3"), "--kv-heads")


MANIFESTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_text(path.read_text()[:200]), "cut off"),
    "empty": (lambda path: path.write_text(""), "not JSON"),
    "foreign": (lambda path: path.write_text('{"name": "package"}'), "not a manifest of hqmq-trt"),
    "missing": (lambda path: path.unlink(), "holds no manifest.json"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "outside": (
        lambda path: edit(path.parent, lambda c: c["files"][0].update(name="../../secret")),
        "outside the folder",
    ),
    "absolute": (
        lambda path: edit(path.parent, lambda c: c["files"][0].update(name="/etc/passwd")),
        "outside the folder",
    ),
    "format": (
        lambda path: edit(path.parent, lambda c: c.update(format_version=1)),
        "format_version is 1, this library knows 3",
    ),
    "plugin": (lambda path: edit(path.parent, lambda c: c.update(plugin_version="9")), "plugin_version is '9'"),
    "scheme": (lambda path: edit(path.parent, lambda c: c.update(scheme="hq9@p16")), "unknown scheme"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_bad_manifest(hqmq: Hqmq, copy: Path, name: str) -> None:
    damage, message = MANIFESTS[name]
    damage(copy / "manifest.json")
    refuse(hqmq("run", copy, "-p", "a"), message)
    refuse(hqmq("inspect", copy, "--json"), message)
    refuse(hqmq("diff", copy, "--model", "none"), message)


def test_codebook_that_does_not_match_its_hash(hqmq: Hqmq, copy: Path) -> None:
    path = copy / "model.onnx"
    model = onnx.load(path)
    book = next(tensor for tensor in model.graph.initializer if tensor.name == "codebook.1.value.secondaries")
    values = onnx.numpy_helper.to_array(book).copy()
    values[0, 0] = -values[0, 0]
    book.CopyFrom(onnx.numpy_helper.from_array(values, book.name))
    onnx.save(model, path)
    edit(copy, lambda c: [f.update(size=path.stat().st_size) for f in c["files"] if f["name"] == path.name])
    refuse(hqmq("run", copy, "-p", "a"), "codebook.1.value.secondaries", "does not match its hash")


def test_truncated_model(hqmq: Hqmq, copy: Path) -> None:
    path = copy / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    refuse(hqmq("run", copy, "-p", "a"), "has 1000 bytes")
    edit(copy, lambda c: [f.update(size=1000) for f in c["files"] if f["name"] == path.name])
    refuse(hqmq("run", copy, "-p", "a"), "model.onnx")
    refuse(hqmq("inspect", path), "not an ONNX file")


def test_library_of_another_format(
    hqmq: Hqmq, tiny_export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_library, "FORMAT_VERSION", 99)
    refuse(hqmq("run", tiny_export(), "-p", "a"), f"built for format version {FORMAT_VERSION}", "needs 99")
    monkeypatch.undo()
    monkeypatch.setenv("HQMQ_LIBRARY_DIR", str(tmp_path))
    refuse(hqmq("run", tiny_export(), "-p", "a"), "libhqmq_ort.so")
    (tmp_path / "libhqmq_ort.so").write_text("not a library")
    refuse(hqmq("run", tiny_export(), "-p", "a"), "cannot load ONNX Runtime library")


def test_diff_mistakes(hqmq: Hqmq, tiny_export: Export, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    refuse(hqmq("diff", tiny_export(), "--model", tmp_path / "none", "--tokens", "20"), "none")
    (tmp_path / "short.txt").write_text("short")
    short = ("--text", tmp_path / "short.txt")
    refuse(hqmq("diff", tiny_export(), "--model", tiny_model("llama"), *short), "the text has 5 tokens")
    refuse(hqmq("diff", tiny_export(), "--model", tiny_model("llama"), "--text", tmp_path / "none"), "--text")


def test_verbose_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hqmq_trt.cli", "run", str(tmp_path / "none"), "-p", "a"]
    plain, verbose = (
        subprocess.run([*command, *more], capture_output=True, text=True, check=False) for more in ([], ["-v"])
    )
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    assert "Traceback" in verbose.stderr


@pytest.mark.parametrize("command", ["export", "run", "diff", "inspect", "memory"])
def test_every_command_has_the_common_options(hqmq: Hqmq, command: str) -> None:
    code, out, _ = hqmq(command, "--help")
    assert code == 0
    for option in ("--json", "--quiet", "--verbose"):
        assert option in out
