"""Results on disk: one JSON line an item, so that an interrupted run keeps what it has and goes on from there.

A record's ``key`` fields say what was measured (task, model, codec, item, …); its ``value`` fields what came out.
Two records with the same key are one measurement, and the later one counts. Codecs in keys go by presets' names
(hqmq_trt.scheme.preset_spelling), also those of a file that has the parts of what became a preset later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError
from hqmq_trt.scheme import preset_spelling

FILE = "results.jsonl"
Record = dict[str, Any]


class Store:
    """The results of a folder.

    Args:
        folder: made if it is not there.
        read_only: nothing is written, so that another run may be adding records meanwhile.

    Raises:
        HqmqError: the file holds something else than records. A last line that was cut off is dropped: its run was
            interrupted.
    """

    def __init__(self, folder: str | Path, read_only: bool = False) -> None:
        self.path = Path(folder) / FILE
        self._records: dict[str, Record] = {}
        self._read_only = read_only
        if not read_only:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data) and not self._read_only:
            # Whole lines only, else the next record would continue the broken one.
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.decode().splitlines(), 1):
            try:
                record = json.loads(line)
                record["key"] = _with_preset(record["key"])
                self._records[_name(record["key"])] = record
            except (ValueError, KeyError, TypeError) as error:
                raise HqmqError(f"{self.path}:{number}: not a result ({error}); give another --output") from error

    def get(self, key: Record, circumstances: Record | None = None) -> Record | None:
        """The values measured under `key`, or None; also None if they were measured under other `circumstances`."""
        record = self._records.get(_name(_with_preset(key)))
        if record is None or not (circumstances or {}).items() <= record.get("about", {}).items():
            return None
        value: Record = record["value"]
        return value

    def add(self, key: Record, value: Record, about: Record | None = None) -> None:
        """Keep a measurement; it is on disk when this returns. `about`: circumstances (card, version, seconds)."""
        if self._read_only:
            raise ValueError(f"{self.path} was opened to be read only")
        record = {"key": _with_preset(key), "value": value, **({"about": about} if about else {})}
        line = json.dumps(record, allow_nan=False, sort_keys=True) + "\n"
        with self.path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._records[_name(record["key"])] = record

    def records(self, **wanted: Any) -> Iterator[Record]:
        """Records whose key has these fields."""
        wanted = _with_preset(wanted)
        for record in self._records.values():
            if all(record["key"].get(name) == value for name, value in wanted.items()):
                yield record


def _with_preset(key: Record) -> Record:
    return {**key, "codec": preset_spelling(key["codec"])} if "codec" in key else key


def _name(key: Record) -> str:
    return json.dumps(key, sort_keys=True)


def item_name(key: Record) -> str:
    """What a key names but for codec and mode: two codecs' records of one item share it."""
    return repr(sorted((name, value) for name, value in key.items() if name not in ("codec", "mode")))


def column(values: Iterable[Record], name: str) -> NDArray[np.float64]:
    """One field of many records' values, float64 [N]."""
    return np.array([value[name] for value in values], np.float64)
