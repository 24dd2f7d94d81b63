"""What K balancing and sink tokens are worth: a codec beside itself without them.

For a codec of ours ``hq4``: ``unbalanced:hq4``, ``hq:s170_r4-sinks`` and ``unbalanced:hq:s170_r4-sinks``. For a
baseline ``X``: ``balanced:X``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval import cells
from hqmq_trt.eval.cells import NOT_MEASURED
from hqmq_trt.eval.perplexity import Perplexity
from hqmq_trt.eval.results import Text
from hqmq_trt.eval.subject import BALANCED, UNBALANCED, Codec
from hqmq_trt.eval.table import Table
from hqmq_trt.scheme import DEFAULT_PAGE_SIZE, RoleScheme, Scheme


class Model(Protocol):
    """A model of the document, see hqmq_trt.eval.document.Entry."""

    @property
    def name(self) -> str:
        """In the tables."""

    @property
    def text(self) -> Text:
        """Its numbers."""

    @property
    def usual(self) -> int:
        """Windows that most codecs saw."""

    def find(self, codec: str, mode: str) -> Perplexity | None:
        """What was measured of a codec in a mode."""


def without_sinks(scheme: Scheme) -> Scheme:
    """The same scheme without sink tokens."""

    def name(role: RoleScheme) -> str:
        if not role.sink_tokens:
            return role.name
        body = role.name if role.name.startswith("hq:") else f"hq:s{role.secondaries}_r{role.radius_bits}"
        head, plus, rest = body.partition("+")
        return f"{head}-sinks{plus}{rest}"

    page = "" if scheme.page_size == DEFAULT_PAGE_SIZE else f"@p{scheme.page_size}"
    return Scheme.parse(f"k={name(scheme.key)},v={name(scheme.value)}{page}", scheme.seed)


def variants(codec: str) -> tuple[str, str, str, str]:
    """A codec of ours as it is, without balancing, without sinks, with neither.

    Raises:
        HqmqError: a codec that has no balancing or no sinks to leave out.
    """
    parsed = Codec.parse(codec)
    scheme = parsed.scheme
    if scheme is None or not parsed.balanced or not (scheme.key.sink_tokens or scheme.value.sink_tokens):
        raise HqmqError(f"ablation of '{codec}': only schemes with balanced K and sink tokens can leave them out")
    bare = Codec.of(without_sinks(scheme)).name
    return parsed.name, f"{UNBALANCED}:{parsed.name}", bare, f"{UNBALANCED}:{bare}"


def ablations(models: Sequence[Model], wanted: Sequence[str]) -> dict[str, tuple[str, str, str, str]]:
    """Codec to its variants; `wanted` empty: every codec of which some variant was measured."""
    if wanted:
        return {codec: variants(codec) for codec in wanted}
    measured = dict.fromkeys(item.codec for entry in models for item in entry.text.found if item.mode)
    found = {}
    for codec in measured:
        try:
            names = variants(codec)
        except HqmqError:  # nothing to leave out: a baseline, another variant, an engine's own scheme
            continue
        if set(names[1:]) & set(measured):
            found[codec] = names
    return found


def ablation_table(models: Sequence[Model], modes: Sequence[str], found: dict[str, tuple[str, str, str, str]]) -> Table:
    """A row a model and codec, a column a variant."""
    rows = []
    for entry in models:
        for codec, names in found.items():
            row = [_changes(entry, name, modes) for name in names]
            if any(cell != NOT_MEASURED for cell in row[1:]):
                rows.append((f"{entry.name}, {codec}", *row))
    columns = ("model, codec", "default", "no balancing", "no sinks", "neither")
    return Table("Ablation", columns, tuple(rows), f"Change of perplexity in percent, {'; '.join(modes)}.")


def balancing(models: Sequence[Model]) -> list[str]:
    """Codecs whose K is not balanced by default and that were measured with K balanced."""
    prefix = f"{BALANCED}:"
    return list(
        dict.fromkeys(
            item.codec.removeprefix(prefix)
            for entry in models
            for item in entry.text.found
            if item.codec.startswith(prefix)
        )
    )


def balancing_table(models: Sequence[Model], modes: Sequence[str], codecs: Sequence[str]) -> Table:
    """Each such codec as it is and with K balanced, a column a model."""
    rows = [
        (name, *(_changes(entry, name, modes) for entry in models))
        for codec in codecs
        for name in (codec, f"{BALANCED}:{codec}")
    ]
    columns = ("codec", *(entry.name for entry in models))
    return Table("Baselines with K balanced", columns, tuple(rows), f"In percent, {'; '.join(modes)}.")


def _changes(entry: Model, codec: str, modes: Sequence[str]) -> str:
    shown, windows = [], set()
    for mode in modes:
        item = entry.find(codec, mode)
        if item is None or item.change is None:
            shown.append(NOT_MEASURED)
            continue
        windows |= {item.windows} - {entry.usual}
        shown.append(cells.with_error(100 * item.change.mean, 100 * item.change.error))
    if set(shown) == {NOT_MEASURED}:
        return NOT_MEASURED
    few = f" ({cells.windows(*sorted(windows))})" if windows else ""
    return "; ".join(shown) + few
