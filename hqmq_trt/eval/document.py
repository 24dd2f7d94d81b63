"""The tables of docs/fidelity.md: summary, envelopes, targets, ablations and a table a model, each with a name.

They stand beside each other what `hqmq_trt.eval.report` shows model by model. :func:`fill` writes them into the marked
places of a document: a line ``<!-- table NAME -->``, the table, a line ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval import ablation, cells
from hqmq_trt.eval.cells import NOT_MEASURED
from hqmq_trt.eval.envelope import (
    BETTER,
    NOTHING,
    OURS,
    WITHIN,
    WORSE,
    Comparison,
    Point,
    best,
    excess_loss,
    judge,
)
from hqmq_trt.eval.perplexity import Perplexity
from hqmq_trt.eval.report_settings import Settings, Target
from hqmq_trt.eval.results import Run, Text
from hqmq_trt.eval.subject import MODES, REFERENCE
from hqmq_trt.eval.table import Table, markdown_table


@dataclass(frozen=True)
class Entry:
    """One model of the document: a text of a run.

    Attributes:
        model: its name in the settings, or in the results.
        name: in the tables: the model's, with details where several entries are of one name.
        head_dim: D if the settings say so.
        run, text: where its numbers are.
    """

    model: str
    name: str
    head_dim: int | None
    run: Run
    text: Text

    def find(self, codec: str, mode: str) -> Perplexity | None:
        """What was measured of a codec in a mode."""
        return next((item for item in self.text.found if (item.codec, item.mode) == (codec, mode)), None)

    def point(self, codec: str, mode: str) -> Point | None:
        """The codec among those that compare, see Text.points."""
        return next((point for point in self.text.points.get(mode, []) if point.codec == codec), None)

    @property
    def usual(self) -> int:
        """Windows that most codecs saw."""
        counts = Counter(item.windows for item in self.text.found)
        return max(counts, key=lambda windows: (counts[windows], windows))


def entries(found: Sequence[Run], settings: Settings) -> list[Entry]:
    """The models in the order of the settings, others after them in the order of the results.

    Raises:
        HqmqError: a target names a model that neither the settings nor the results have.
    """
    known = list(settings.models)
    listed: list[tuple[int, Entry]] = []
    for run, text in ((owner, text) for owner in found for text in owner.texts):
        place = next((i for i, model in enumerate(known) if run.sha256.startswith(model.sha256)), len(known))
        named = known[place] if place < len(known) else None
        name, head_dim = (named.name, named.head_dim) if named else (run.model, None)
        listed.append((place, Entry(name, name, head_dim, run, text)))
    listed.sort(key=lambda pair: pair[0])
    counts = Counter(entry.name for _, entry in listed)
    result = [entry if counts[entry.name] == 1 else _told_apart(entry) for _, entry in listed]
    names = {entry.model for entry in result} | {model.name for model in known}
    for target in settings.targets:
        if target.model not in names:
            raise HqmqError(f"a target is for '{target.model}', which no model is called: {', '.join(sorted(names))}")
    return result


def _told_apart(entry: Entry) -> Entry:
    details = f"{entry.run.where}, {entry.run.sha256[:8]}, {entry.text.title.removeprefix(f'{entry.run.model}, ')}"
    return replace(entry, name=f"{entry.name} ({details})")


def modes_of(models: Sequence[Entry]) -> list[str]:
    """Modes in which anything was measured, in the order of MODES."""
    found = {item.mode for entry in models for item in entry.text.found if item.mode}
    return sorted(found, key=lambda mode: (mode not in MODES, MODES.index(mode) if mode in MODES else 0, mode))


def document_tables(found: Sequence[Run], settings: Settings) -> dict[str, Table]:
    """Every table by name: ``summary``, ``envelopes``, ``above``, ``targets``, ``ablation``, ``balancing`` and
    ``model NAME``.

    Those without rows are not among them, but for ``above`` where something was compared: that it is empty is a result.
    """
    models = entries(found, settings)
    modes = modes_of(models)
    trials = ablation.ablations(models, settings.ablation)
    balancing = ablation.balancing(models)
    tables = {
        "summary": summary(models, modes, settings.summary),
        "envelopes": envelopes(models),
        "above": above(models),
        "targets": targets(models, modes, settings.targets),
        "ablation": ablation.ablation_table(models, modes, trials),
        "balancing": ablation.balancing_table(models, modes, balancing),
    }
    left_out = {name for variants in trials.values() for name in variants[1:]} | {
        f"balanced:{name}" for name in balancing
    }
    tables |= {f"model {entry.name}": model_table(entry, modes, left_out) for entry in models}
    told = {"above"} if tables["envelopes"].rows else set()
    return {name: table for name, table in tables.items() if table.rows or name in told}


def summary(models: Sequence[Entry], modes: Sequence[str], codecs: Sequence[str]) -> Table:
    """Schemes by models: changes of perplexity in percent, one mode after the other.

    `codecs` empty: all that compare, by stored bits.
    """
    if not codecs:
        points = [point for entry in models for mode in modes for point in entry.text.points.get(mode, [])]
        codecs = list(dict.fromkeys(point.codec for point in sorted(points, key=lambda item: (item.bits, item.codec))))
    dims = sorted({entry.head_dim for entry in models if entry.head_dim is not None})
    by_dim = all(entry.head_dim is not None for entry in models)
    groups = (
        [[entry for entry in models if entry.head_dim == dim] for dim in dims] if by_dim else [[one] for one in models]
    )
    labels = f"D = {' / '.join(map(str, dims))}" if by_dim else " / ".join(entry.name for entry in models)
    rows = []
    for codec in codecs:
        stored = []
        for group in groups:
            seen = [entry.find(codec, mode) for entry in group for mode in modes]
            stored.append(cells.bits_range(item.stored_bits for item in seen if item))
        rows.append((codec, " / ".join(stored), *(_changes(entry, codec, modes) for entry in models)))
    columns = ("scheme", f"stored, {labels}", *(entry.name for entry in models))
    return Table("Summary", columns, tuple(rows), f"Change of perplexity in percent, {' / '.join(modes)}.")


def _changes(entry: Entry, codec: str, modes: Sequence[str]) -> str:
    shown = []
    for mode in modes:
        item = entry.find(codec, mode)
        text = NOT_MEASURED
        if item and item.change:
            text = cells.signed(100 * item.change.mean, short=True)
            text += f" ({cells.windows(item.windows)})" if item.windows != entry.usual else ""
        shown.append(text)
    return NOT_MEASURED if set(shown) == {NOT_MEASURED} else " / ".join(shown)


def _compared(models: Sequence[Entry]) -> list[tuple[Entry, str, list[Comparison]]]:
    return [(entry, mode, entry.text.envelopes(mode)) for entry in models for mode in modes_of([entry])
            if mode in entry.text.points]  # fmt: skip


def envelopes(models: Sequence[Entry]) -> Table:
    """How many stretches of budgets have which verdict, by model and mode."""
    rows = []
    for entry, mode, found in _compared(models):
        count = Counter(item.verdict for item in found)
        spans = _spans((item.budget, item.until) for item in found if item.verdict == NOTHING)
        numbers = (len(found), count[BETTER], count[WITHIN], count[WORSE])
        rows.append((entry.name, mode, *map(str, numbers), spans or NOT_MEASURED))
    columns = ("model", "mode", "stretches", "ours better", WITHIN, "ours worse", "nothing of ours so small")
    return Table("Best within a budget", columns, tuple(rows), text_columns=2)


def _spans(found: Iterable[tuple[float, float]]) -> str:
    joined: list[tuple[float, float]] = []
    for low, high in found:
        if joined and joined[-1][1] == low:
            low, _ = joined.pop()
        joined.append((low, high))
    return ", ".join(f"{low:.2f}…{high:.2f}" for low, high in joined)


def above(models: Sequence[Entry]) -> Table:
    """Every stretch in which the best of ours loses more than the best baseline."""
    rows = []
    for entry, mode, found in _compared(models):
        for item in found:
            if item.ours is None or item.excess <= 0:
                continue
            clear = " (clear)" if item.verdict == WORSE else ""
            rows.append(
                (
                    f"{entry.name}, {mode}",
                    f"{item.budget:.3f}…{item.until:.3f}",
                    _named(item.baseline),
                    _named(item.ours),
                    cells.with_error(item.excess, item.error) + clear,
                )
            )
    columns = (
        "model, mode",
        "budget (stored bits)",
        "best baseline",
        "best of ours",
        "ours − baseline (points)",
    )
    note = "Clear: by more than 2 standard errors." if rows else "Ours is nowhere above the baselines."
    return Table("Stretches in which ours is above", columns, tuple(rows), note, 4)


def _named(point: Point) -> str:
    return f"{point.codec} ({cells.signed(point.change)} %)"


def targets(models: Sequence[Entry], modes: Sequence[str], wanted: Sequence[Target]) -> Table:
    """What became of each target: a row a target and entry of its model, a column a mode."""
    rows = []
    for target in wanted:
        found = [entry for entry in models if entry.model == target.model]
        for entry in found:
            cell = {mode: _outcome(entry, target, mode) for mode in modes if target.mode in (None, mode)}
            rows.append((_title(target, entry), *(cell.get(mode, NOT_MEASURED) for mode in modes)))
        if not found:
            rows.append((_title(target, None), *(NOT_MEASURED for _ in modes)))
    note = "Where a target names no codec, the best of ours within the budget, by mode, is judged."
    return Table("Targets", ("target", *modes), tuple(rows), note, 1 + len(modes))


def _title(target: Target, entry: Entry | None) -> str:
    limit = f"≤ {cells.signed(target.percent or 0.0)} %"
    if target.better_than is not None:
        seen = [item.stored_bits for item in (entry.text.found if entry else ()) if item.codec == target.better_than]
        limit = f"better than {target.better_than}" + (f" ({cells.bits_range(seen)})" if seen else "")
    return f"{entry.name if entry else target.model}, ≤ {target.bits:g} bits, {limit}"


def _outcome(entry: Entry, target: Target, mode: str) -> str:
    if target.codec is None:
        ours = [point for point in entry.text.points.get(mode, []) if point.family == OURS]
        own = best(ours, target.bits)
        if own is None:
            return f"nothing of ours fits {target.bits:g} bits" if ours else NOT_MEASURED
    else:
        own = entry.point(target.codec, mode)
        if own is None:
            return _missing(entry, target.codec, mode)
        if best([own], target.bits) is None:
            return f"{target.codec}: stores {cells.bits(own.bits)} bits, beyond the budget"
    if target.percent is not None:
        gap, error, shown, unit = own.change - target.percent, own.error, own.change, "%"
    else:
        name = target.better_than or ""
        baseline = entry.point(name, mode)
        if baseline is None:
            return _missing(entry, name, mode)
        gap, error = excess_loss(own, baseline)
        shown, unit = gap, "points"
    # A bound may be met exactly; "better" may not.
    reached = gap <= 0 if target.percent is not None else gap < 0
    verdict = "reached" if reached else f"**missed by {cells.signed(gap).lstrip('+')} points**"
    doubt = f", {WITHIN}" if judge(gap, error) == WITHIN else ""
    return f"{own.codec} ({own.bits:.3f}): {cells.with_error(shown, error, unit)}, {verdict}{doubt}"


def _missing(entry: Entry, codec: str, mode: str) -> str:
    return f"{codec}: {'does not compare (other windows)' if entry.find(codec, mode) else 'not measured'}"


def model_table(entry: Entry, modes: Sequence[str], left_out: set[str]) -> Table:
    """All codecs of a model by stored bits, with perplexity and change in each mode.

    Codecs of `left_out` (ablations), with codebooks of another seed, or that saw other windows than most are not in it;
    the note names the last.
    """
    codecs: dict[str, dict[str, Perplexity]] = {}
    others = []
    for item in entry.text.found:
        if not item.mode or item.codec in left_out or "#" in item.codec:
            continue
        if item.windows != entry.usual or item.codec in entry.text.apart.get(item.mode, ()):
            others.append(f"{item.codec} ({item.mode}, {cells.windows(item.windows)})")
            continue
        codecs.setdefault(item.codec, {})[item.mode] = item
    rows = []
    for codec, found in codecs.items():
        first = next(iter(found.values()))
        row = [codec, f"{first.stored_bits:.3f}"]
        row += [NOT_MEASURED if first.paper_bits is None else f"{first.paper_bits:.2f}", str(first.tail)]
        for mode in modes:
            row += _measured(found.get(mode))
        rows.append((first.stored_bits, tuple(row)))
    rows.sort(key=lambda pair: (round(pair[0], 6), pair[1][0]))
    reference = entry.find(REFERENCE, "")
    shown = f", reference {reference.perplexity:.3f}" if reference else ""
    note = f"Left out, as they saw other windows than most: {', '.join(sorted(others))}." if others else ""
    columns = ("codec", "stored", "paper", "tail", *(name for mode in modes for name in (f"ppl {mode}", "change")))
    return Table(f"{entry.name}{shown}", columns, tuple(row for _, row in rows), note)


def _measured(item: Perplexity | None) -> list[str]:
    if item is None:
        return [NOT_MEASURED, NOT_MEASURED]
    change = item.change
    shown = cells.with_error(100 * change.mean, 100 * change.error, "%") if change else NOT_MEASURED
    return [cells.perplexity(item.perplexity), shown]


_START = re.compile(r"(?m)^<!-- table .+? -->$")
_BLOCK = re.compile(r"(?m)^<!-- table (?P<name>.+?) -->$.*?^<!-- end -->$", re.DOTALL)


def marked(name: str, table: Table) -> str:
    """A table between its marks, as :func:`fill` writes it."""
    return f"<!-- table {name} -->\n{markdown_table(table)}\n<!-- end -->"


def fill(document: str, tables: Mapping[str, Table]) -> str:
    """The document with every marked table written anew.

    Raises:
        HqmqError: no marks, one without its end, or one for a table that these results do not give.
    """
    if len(_BLOCK.findall(document)) != len(_START.findall(document)):
        raise HqmqError("a mark '<!-- table NAME -->' of the document has no '<!-- end -->' before the next one")
    if not _BLOCK.search(document):
        raise HqmqError("the document has no marks '<!-- table NAME -->' … '<!-- end -->' to fill")

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in tables:
            raise HqmqError(f"the document asks for table '{name}'; these results give {', '.join(tables)}")
        return marked(name, tables[name])

    return _BLOCK.sub(block, document)
