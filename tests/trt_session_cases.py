"""What TrtSession must do, for a simulated GPU (tests/test_runtime_trt.py) and a real one (tests/gpu).

A class that inherits gives the fixtures `export` (an exported folder of the tiny Llama, float32, pages of 16), `engine`
(an engine of it for MAX_BATCH x MAX_CONTEXT with PREFILL_CHUNK) and `tolerance` (of logits against ONNX Runtime).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hqmq_trt.engine.manifest import EngineManifest
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_bytes
from hqmq_trt.manifest import Manifest, record_file
from hqmq_trt.runtime import OrtSession, Request, Sampling, TrtSession, generate, open_session
from hqmq_trt.runtime.session import Session
from hqmq_trt.scheme import ROLES

PAGE = 16
MAX_BATCH, MAX_CONTEXT, PREFILL_CHUNK = 4, 128, 32


def text(count: int, seed: int = 0) -> list[int]:
    """Random byte tokens."""
    tokens: list[int] = np.random.default_rng(seed).integers(0, 256, count).tolist()
    return tokens


def caches(session: Session, sequence: int, length: int) -> list[NDArray[Any]]:
    """Every cache tensor of one sequence: its full pages, and the rows of the tail in use, sink tokens included."""
    result = []
    for layer in range(len(session.manifest.layers)):
        for role in ROLES:
            *packed, tail = session.cache_arrays(layer, role)
            for array in packed:
                pages = length // PAGE
                result.append(array[sequence, :, : pages * PAGE if array.shape[2] == session.max_context else pages])
            result.append(tail[sequence, :, : min(length, PAGE)])
            result.append(tail[sequence, :, PAGE : PAGE + length])
    return result


def contents(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and tensors of a safetensors file, whose order the library leaves open."""
    with safe_open(path, "np") as file:
        return file.metadata(), {name: array.tobytes() for name, array in load_file(path).items()}


def same_share(a: list[NDArray[Any]], b: list[NDArray[Any]]) -> float:
    """Share of equal elements; 1 of none."""
    total = sum(x.size for x in a)
    equal = sum(int((x == y).sum()) for x, y in zip(a, b, strict=True))
    return equal / total if total else 1.0


class TrtNumericCases:
    """Logits and cache bytes of one engine; see the module."""

    def test_logits_and_cache_equal_onnx_runtime(self, engine: Path, export: Path, tolerance: float) -> None:
        with TrtSession(engine) as session:
            reference = OrtSession(export, MAX_BATCH, MAX_CONTEXT)
            prompts = [text(45), text(7, 1), text(31, 2)]
            found, wanted = session.append(prompts), reference.append(prompts)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)
            assert np.abs(wanted - wanted[::-1]).max() > 3 * tolerance
            for step in range(20):
                tokens = [step, 100 + step, None if step % 3 else 200]
                found, wanted = session.decode(tokens).copy(), reference.decode(tokens)
                np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)
                if step % 3:
                    assert not found[2].any()
            assert session.lengths.tolist() == reference.lengths.tolist() == [65, 27, 38, 0]
            for b, length in enumerate(session.lengths[:3].tolist()):
                ours, theirs = caches(session, b, length), caches(reference, b, length)
                assert same_share(ours, theirs) > (0.7 if tolerance > 1e-3 else 0.999)

    def test_past_and_present_are_one_address(self, engine: Path) -> None:
        with TrtSession(engine) as session:
            session.append([text(20), text(20, 1)])
            session.decode([1, 2])
            pairs = session.cache_addresses(2)
            assert set(pairs) == set(session.cache_specs())
            assert all(past == present for past, present in pairs.values())
            assert len({past for past, _ in pairs.values()}) == len(pairs)

    def test_the_cache_is_zero_and_as_large_as_the_format_says(self, engine: Path) -> None:
        with TrtSession(engine, 3, 100) as session:
            manifest = session.manifest
            layer = manifest.layers[0]
            expected = cache_bytes(
                manifest.parsed_scheme, len(manifest.layers), layer.num_kv_heads, layer.head_dim, 112, 3
            )
            expected.pop("codebooks")
            assert session.cache_nbytes() == expected
            total = sum(expected.values())
            assert total <= session.device_nbytes()["cache"] <= 1.01 * total
            assert not any(array.any() for role in ROLES for array in session.cache_arrays(1, role))
            session.append([text(20)])
            codes, *_, tail = session.cache_arrays(0, "key")
            assert codes[0, :, :PAGE].any((1, 2)).all()
            assert not codes[0, :, PAGE:].any()
            assert not codes[1:].any()
            assert tail[0].any(-1).all()

    def test_graph_and_no_graph_are_equal(self, engine: Path) -> None:
        results = []
        for cuda_graph in (True, False):
            with TrtSession(engine, cuda_graph=cuda_graph) as session:
                rows = [session.append([text(17), text(40, 1)])]
                rows += [session.decode([step, step + 1]).copy() for step in range(36)]
                results.append((np.concatenate(rows), caches(session, 0, 53), caches(session, 1, 76)))
        (logits, *graph), (plain_logits, *plain) = results
        np.testing.assert_array_equal(logits, plain_logits)
        for ours, theirs in zip(graph, plain, strict=True):
            assert same_share(ours, theirs) == 1.0

    def test_prefill_decode_and_chunks_agree(self, engine: Path, tolerance: float) -> None:
        tokens = text(60)
        with TrtSession(engine) as session, TrtSession(engine, prefill_chunk=7) as small:
            whole, chunked = session.append([tokens]), small.append([tokens])
            session.reset()
            single = [session.decode([token]).copy() for token in tokens]
            np.testing.assert_allclose(chunked, whole, rtol=0, atol=tolerance)
            np.testing.assert_allclose(single[-1], whole, rtol=0, atol=tolerance)
            session.reset()
            ids = np.array([tokens[:PREFILL_CHUNK]], np.int64)
            rows = np.arange(PREFILL_CHUNK, dtype=np.int64)[None]
            logits = session.step(ids, np.array([PREFILL_CHUNK], np.int32), rows)
            np.testing.assert_allclose(logits[0], np.concatenate(single)[:PREFILL_CHUNK], rtol=0, atol=tolerance)

    def test_batch_sizes_come_and_go(self, engine: Path, tolerance: float) -> None:
        """Each batch size has its graph; going back to one still reads the right sequences."""
        prompts = [text(20 + b, b) for b in range(MAX_BATCH)]
        with TrtSession(engine) as session, TrtSession(engine, 1) as single:
            session.append(prompts)
            seen = [list(prompt) for prompt in prompts]
            for step, batch in enumerate([4, 1, 3, 4, 2, 1, 4, 3]):
                logits = session.decode([step] * batch).copy()
                for b in range(batch):
                    seen[b].append(step)
            single.reset()
            np.testing.assert_allclose(logits[2], single.append([seen[2]])[0], rtol=0, atol=tolerance)
            assert session.lengths.tolist() == [len(row) for row in seen]

    def test_sequences_are_reset_one_by_one(self, engine: Path, tolerance: float) -> None:
        with TrtSession(engine, 2) as session:
            first = session.append([text(20), text(30, 1)])
            session.reset(0)
            again = session.append([text(20), []])
            assert session.lengths.tolist() == [20, 30]
            np.testing.assert_allclose(again[0], first[0], rtol=0, atol=tolerance)
            assert not again[1].any()
            turn = session.append([[], text(12, 2)])
            session.reset()
            np.testing.assert_allclose(
                session.append([[], [*text(30, 1), *text(12, 2)]])[1], turn[1], rtol=0, atol=tolerance
            )


class TrtSessionCases(TrtNumericCases):
    """All tests of one engine; see the module."""

    def test_continuous_batching(self, engine: Path) -> None:
        requests = [Request(text(5 + 7 * i, i), 3 + i % 4, Sampling(seed=i)) for i in range(9)]
        with TrtSession(engine) as session, open_session(engine, max_batch=1) as single:
            together = generate(session, requests).completions
            assert together == [generate(single, [request]).completions[0] for request in requests]

    def test_cache_files_pass_between_runtimes(self, engine: Path, export: Path, tmp_path: Path) -> None:
        prompts = [text(40), [], text(3, 1), text(16, 2)]
        reference = OrtSession(export, MAX_BATCH, MAX_CONTEXT)
        reference.append(prompts)
        reference.save_cache(tmp_path / "ort")
        with TrtSession(engine) as session:
            session.append([text(50, 9)] * MAX_BATCH)
            session.load_cache(tmp_path / "ort")
            assert session.lengths.tolist() == [40, 0, 3, 16]
            for b, length in enumerate([40, 0, 3, 16]):
                assert same_share(caches(session, b, length), caches(reference, b, length)) == 1.0
            session.save_cache(tmp_path / "trt")
            assert contents(tmp_path / "trt") == contents(tmp_path / "ort")
            tokens = [7, None, 8, 9]
            found, wanted = session.decode(tokens), reference.decode(tokens)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-3)  # all read the same codes
            assert np.abs(wanted[0] - wanted[2]).max() > 0.1
        with TrtSession(engine, 3) as session, pytest.raises(HqmqError, match="4 sequences, the session max_batch=3"):
            session.load_cache(tmp_path / "ort")

    def test_a_damaged_cache_file_changes_nothing(self, engine: Path, tmp_path: Path) -> None:
        path = tmp_path / "cache"
        with TrtSession(engine, 1) as session:
            session.append([text(20)])
            session.save_cache(path)
            arrays = load_file(path)
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            session.decode([5])
            before = caches(session, 0, 21)
            with pytest.raises(HqmqError, match="sha256 differs"):
                session.load_cache(path)
            save_file(arrays, path, {"kind": "other"})
            with pytest.raises(HqmqError, match="is not a cache"):
                session.load_cache(path)
            assert session.lengths.tolist() == [21]
            assert same_share(caches(session, 0, 21), before) == 1.0

    def test_device_arrays(self, engine: Path, on_device: Callable[[NDArray[Any]], Any]) -> None:
        with TrtSession(engine, 2) as session, TrtSession(engine, 2) as plain:
            prompts = np.array([text(20), text(20, 1)], np.int64)
            np.testing.assert_array_equal(session.append([on_device(row) for row in prompts]), plain.append(prompts))
            ids, one, zero = np.array([[3], [4]], np.int64), np.ones(2, np.int32), np.zeros((2, 1), np.int64)
            expected = plain.step(ids, one, zero)
            logits = session.step_device(on_device(ids), one, zero)
            interface = logits.__cuda_array_interface__
            assert interface["shape"] == expected.shape == logits.shape
            assert interface["typestr"] == "<f4"
            np.testing.assert_array_equal(logits.to_host(), expected)
            np.testing.assert_array_equal(session.decode_device([1, 2]).to_host()[:, 0], plain.decode([1, 2]))
            assert session.lengths.tolist() == plain.lengths.tolist()
            with pytest.raises(HqmqError, match="token 260 is outside the vocabulary"):
                session.step(on_device(ids + 257), one, zero)
            with pytest.raises(HqmqError, match="input_ids must hold integers"):
                session.step(on_device(ids.astype(np.float32)), one, zero)

    @pytest.mark.parametrize("cuda_graph", [True, False])
    def test_host_time_is_counted(self, engine: Path, cuda_graph: bool) -> None:
        with TrtSession(engine, 1, cuda_graph=cuda_graph) as session:
            session.append([text(20)])
            session.decode([1])
            assert session.host_steps == 0  # it prepared the batch size
            for token in range(10):
                session.decode([token])
            assert session.host_steps == 10
            assert 0 < session.host_seconds < 1
            session.reset_host_time()
            assert (session.host_seconds, session.host_steps) == (0, 0)

    def test_bad_input_leaves_the_session_usable(self, engine: Path) -> None:
        one, zero = np.ones(1, np.int32), np.zeros((1, 1), np.int64)
        ids = np.array([[1]], np.int64)
        with TrtSession(engine, 2, 64) as session:
            before = session.append([text(20), text(9, 1)])
            long = np.ones((1, PREFILL_CHUNK + 1), np.int64)
            bad: list[tuple[str, Callable[[], Any]]] = [
                ("holds 64 tokens a sequence but 70 are needed", lambda: session.append([text(50)])),
                ("3 sequences do not fit a session of max_batch=2", lambda: session.decode([1, 1, 1])),
                ("outside the vocabulary", lambda: session.append([[1] * 40 + [260]])),
                ("outside the vocabulary", lambda: session.decode([-1])),
                ("input_ids must hold integers", lambda: session.step(ids.astype(np.float32), one, zero)),
                ("new_length must hold integers", lambda: session.step(ids, one.astype(np.float64), zero)),
                ("new_length must be", lambda: session.step(ids, one * 2, zero)),
                ("exceeds the engine's prefill_chunk=32", lambda: session.step(long, one, zero)),
                ("there is no sequence 2", lambda: session.reset(2)),
            ]
            for message, call in bad:
                with pytest.raises(HqmqError, match=message):
                    call()
                assert session.lengths.tolist() == [20, 9]
            session.reset()
            np.testing.assert_array_equal(session.append([text(20), text(9, 1)]), before)

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ({"max_batch": 5}, "max_batch 5 exceeds the engine's 4.*--max-batch 5"),
            ({"max_context": 129}, "max_context 129 exceeds the engine's 128.*--max-context 129"),
            ({"prefill_chunk": 33}, "prefill_chunk 33 exceeds the engine's 32"),
            ({"max_batch": 0}, "max_batch must be at least 1"),
            ({"device": 99}, "there is no GPU 99"),
        ],
    )
    def test_limits(self, engine: Path, limits: dict[str, Any], message: str) -> None:
        with pytest.raises(HqmqError, match=message):
            TrtSession(engine, **limits)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tensorrt_version": "9.3.0"}, "built by TensorRT 9.3.0"),
            ({"compute_capability": "6.1"}, "compute capability 6.1"),
        ],
    )
    def test_engine_of_another_machine(
        self, engine: Path, tmp_path: Path, change: dict[str, str], message: str
    ) -> None:
        folder = Path(shutil.copytree(engine, tmp_path / "copy"))
        EngineManifest.load(folder).model_copy(update=change).save(folder)
        with pytest.raises(HqmqError, match=message):
            TrtSession(folder)

    def test_damaged_plan(self, engine: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(engine, tmp_path / "copy"))
        plan = folder / "engine.plan"
        data = bytearray(plan.read_bytes())
        data[len(data) // 2] ^= 1
        plan.write_bytes(data)
        with pytest.raises(HqmqError, match=r"engine\.plan: sha256 differs"):
            TrtSession(folder)
        data[: len(data) // 2] = bytes(len(data) // 2)
        plan.write_bytes(data)
        self._accept(folder)
        with pytest.raises(HqmqError, match="TensorRT refuses it"):
            TrtSession(folder)
        plan.write_bytes(data[:-10])
        with pytest.raises(HqmqError, match=r"engine\.plan: has \d+ bytes"):
            TrtSession(folder)
        plan.unlink()
        with pytest.raises(HqmqError, match=r"engine\.plan: is missing"):
            TrtSession(folder)

    def test_an_engine_of_another_model(self, engine: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(engine, tmp_path / "copy"))
        content = json.loads((folder / "manifest.json").read_text())
        content["layers"].append(content["layers"][0])
        (folder / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(HqmqError, match=r"tensor 'past\.2\.key\.codes' is missing"):
            TrtSession(folder)

    def test_closed_sessions(self, engine: Path, tmp_path: Path) -> None:
        with TrtSession(engine, 1) as session:
            session.append([text(5)])
        session.close()
        for call in (
            lambda: session.append([[1]]),
            lambda: session.decode([1]),
            lambda: session.save_cache(tmp_path / "x"),
            lambda: session.cache_arrays(0, "key"),
        ):
            with pytest.raises(HqmqError, match="the session is closed"):
                call()

    @staticmethod
    def _accept(folder: Path) -> None:
        """Make engine.json and manifest.json describe the plan as it now lies there."""
        record = record_file(folder, "engine.plan", "engine")
        limits = EngineManifest.load(folder)
        limits.model_copy(update={"plan_size": record.size, "plan_sha256": record.sha256}).save(folder)
        manifest = Manifest.load(folder)
        kept = [file for file in manifest.files if file.purpose == "tokenizer"]
        manifest.model_copy(update={"files": [record, *kept]}).save(folder)
