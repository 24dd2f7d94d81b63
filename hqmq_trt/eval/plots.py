"""Pictures of the fidelity harness, as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.envelope import (
    FAMILIES,
    FP8,
    INT,
    INT_MED3,
    KIVI,
    LLAMA_CPP,
    OTHER,
    OURS,
    PAPER,
    PAPER_MED3,
    TURBO,
    Point,
    envelope,
)
from hqmq_trt.scheme import PRESETS

MAX_BITS = 10.0
"""Codecs that store more are not drawn: they would squeeze the others together."""
README_BITS = 6.75
"""The same for the README's picture."""
MAX_PERCENT = 1000.0
"""Codecs that lose more have collapsed: they are drawn hollow at the upper edge, with their loss beside them."""
LINEAR_PERCENT = 0.1
"""The vertical axis is linear within ± this, so that losses around 0 show, and logarithmic beyond."""
_STYLES = {
    OURS: ("#0072B2", "o"),
    PAPER: ("#D55E00", "s"),
    PAPER_MED3: ("#E69F00", "D"),
    INT: ("#888888", "v"),
    INT_MED3: ("#444444", "^"),
    LLAMA_CPP: ("#009E73", "P"),
    KIVI: ("#CC79A7", "X"),
    TURBO: ("#56B4E9", "p"),
    FP8: ("#000000", "h"),
    OTHER: ("#8C6D31", "d"),
}
"""Colour (Okabe-Ito, told apart by the colour-blind) and marker of each family."""
_DPI = 130


def bits_loss(panels: Mapping[str, Sequence[Point]], path: Path) -> Path:
    """Bits against loss, a panel a model, with the lower envelopes of ours and of all baselines.

    Args:
        panels: heading to points; see :data:`MAX_BITS`.
        path: PNG to write.

    Raises:
        HqmqError: no panels.
    """
    columns = min(len(panels), 2)
    figure, axes = _panels(len(panels), columns, (7.2 if columns > 1 else 9.0, 5.2))
    for ax, (title, points) in zip(axes, panels.items(), strict=False):
        _draw(ax, points, MAX_BITS)
        ax.set_xlabel("stored bits an element (scales, means, flags and outlier slots included)", fontsize=9)
        ax.set_title(title, fontsize=10)
    _legend(figure, panels, MAX_BITS)
    for ax, points in zip(axes, panels.values(), strict=True):
        _label(figure, ax, [point for point in points if point.bits <= MAX_BITS], everything=True)
    return _save(figure, path, _DPI)


def readme_figure(panels: Mapping[str, Sequence[Point]], path: Path) -> Path:
    """The README's picture: two panels side by side, fewer words, less than 150 kB.

    Raises:
        HqmqError: other than two panels.
    """
    if len(panels) != 2:
        raise HqmqError(f"the README's picture has two panels, not {len(panels)}; choose two models")
    figure, axes = _panels(2, 2, (5.5, 3.9))
    for ax, (title, points) in zip(axes, panels.items(), strict=True):
        _draw(ax, points, README_BITS)
        ax.set_xlabel("stored bits an element", fontsize=9)
        ax.set_title(title, fontsize=11)
    _legend(figure, panels, README_BITS)
    for ax, points in zip(axes, panels.values(), strict=True):
        _label(figure, ax, [point for point in points if point.bits <= README_BITS], everything=False)
    return _save(figure, path, 100)


def heat_maps(panels: Sequence[tuple[str, Sequence[NDArray[np.float64]], bool]], title: str, path: Path) -> Path:
    """Heat maps of layer × KV head, side by side.

    Args:
        panels: (heading, a list of layers with one value a head, whether colours are logarithmic if they span a
            decade).
        title: above all.
        path: PNG to write.
    """
    layers = max(len(values) for _, values, _ in panels)
    figure, axes = _panels(len(panels), len(panels), (3.1, min(max(2.4, 0.16 * layers + 1.2), 10.0)))
    for ax, (name, values, logarithmic) in zip(axes, panels, strict=True):
        grid = np.full((len(values), max(len(heads) for heads in values)), np.nan)
        for row, heads in zip(grid, values, strict=True):
            row[: len(heads)] = heads
        _image(figure, ax, grid, logarithmic)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("KV head")
        ax.set_ylabel("layer")
    figure.suptitle(title, fontsize=11)
    return _save(figure, path, _DPI)


def recall_maps(
    panels: Mapping[str, Mapping[tuple[int, float], float]], title: str, path: Path, label: str = "score"
) -> Path:
    """Heat maps of context × depth, a panel a codec.

    Args:
        panels: codec to {(context in tokens, depth in percent): mean score 0…1}.
        title: above all.
        path: PNG to write.
        label: of the colours.
    """
    contexts = sorted({context for cells in panels.values() for context, _ in cells})
    depths = sorted({depth for cells in panels.values() for _, depth in cells})
    columns = min(len(panels), 4)
    figure, axes = _panels(len(panels), columns, (max(2.6, 0.55 * len(contexts) + 1.4), 0.4 * len(depths) + 1.6))
    image: Any = None
    for ax, (codec, cells) in zip(axes, panels.items(), strict=False):
        grid = np.array([[cells.get((context, depth), np.nan) for context in contexts] for depth in depths])
        image = ax.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if math.isfinite(value):
                colour = "black" if value > 0.6 else "white"
                ax.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        ax.set_xticks(range(len(contexts)), [str(context) for context in contexts], fontsize=7, rotation=45)
        ax.set_yticks(range(len(depths)), [f"{depth:g}%" for depth in depths], fontsize=7)
        ax.set_title(codec, fontsize=9)
        ax.set_xlabel("context (tokens)", fontsize=8)
        ax.set_ylabel("depth", fontsize=8)
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path, _DPI)


def _panels(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """A figure of `count` axes in rows of `columns`, each of `size` inches."""
    if not count:
        raise HqmqError("nothing to draw")
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _draw(ax: Any, points: Sequence[Point], max_bits: float) -> None:
    """Points and envelopes."""
    drawn = [point for point in points if point.bits <= max_bits and point.family in FAMILIES]
    ours = envelope(point for point in drawn if point.family == OURS)
    others = envelope(point for point in drawn if point.family != OURS)
    right = max((point.bits for point in drawn), default=6.0) + 0.25
    for steps, colour, style in ((others, "#444444", "--"), (ours, _STYLES[OURS][0], "-")):
        if steps:
            x, y = [*(point.bits for point in steps), right], [*map(_height, steps), _height(steps[-1])]
            ax.plot(x, y, drawstyle="steps-post", color=colour, linestyle=style, linewidth=1.4, zorder=1)
    for point in drawn:
        colour, marker = _STYLES[point.family]
        own, collapsed = point.family == OURS, point.change > MAX_PERCENT
        ax.errorbar(
            point.bits,
            _height(point),
            yerr=0.0 if collapsed or not math.isfinite(point.error) else point.error,
            fmt=marker,
            color=colour,
            markersize=8 if own else 6,
            markerfacecolor="white" if collapsed else colour,
            markeredgecolor=colour if collapsed else "white",
            markeredgewidth=0.9 if collapsed else 0.6,
            elinewidth=1,
            zorder=3 if own else 2,
        )
    bars = [(point.change, point.error) for point in drawn if point.change <= MAX_PERCENT]
    lowest = min((change - (error if math.isfinite(error) else 0.0) for change, error in bars), default=0.0)
    ax.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    ax.set_yscale("symlog", linthresh=LINEAR_PERCENT, linscale=0.5)
    ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=LINEAR_PERCENT))
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "" if value > MAX_PERCENT else f"{value:+g}%" if value else "0")
    )
    highest = max(map(_height, drawn), default=1.0)
    ax.set_ylim(
        min(1.5 * lowest, -0.3 * LINEAR_PERCENT), (30 if highest == MAX_PERCENT else 3) * max(highest, LINEAR_PERCENT)
    )
    ax.set_xlim(right=right)
    ax.set_ylabel("change of perplexity (symlog)", fontsize=9)
    ax.set_axisbelow(True)
    ax.grid(axis="y", color="#eeeeee")
    ax.spines[["top", "right"]].set_visible(False)


def _height(point: Point) -> float:
    return min(point.change, MAX_PERCENT)


def _label(figure: Figure, ax: Any, points: Sequence[Point], everything: bool) -> None:
    """Names of points: ours below, the others above; only where they cover no other name and no marker.

    `everything` false: only our presets and what has collapsed. Names of presets, then of the
    envelopes, are placed first.
    """
    figure.draw_without_rendering()  # settles the layout, which positions in pixels need
    points = [point for point in points if point.family in FAMILIES]
    steps = [
        *envelope(point for point in points if point.family == OURS),
        *envelope(point for point in points if point.family != OURS),
    ]
    wanted = [point for point in points if everything or point.codec in PRESETS or point.change > MAX_PERCENT]
    wanted.sort(
        key=lambda point: (
            point.codec not in PRESETS,
            point not in steps,
            point.family != OURS,
            point.bits,
            point.change,
        )
    )
    markers = ax.transData.transform([(point.bits, _height(point)) for point in points])
    half = 3 * figure.dpi / 72
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in markers]
    frame = ax.get_window_extent()
    for point in wanted:
        own = point.family == OURS
        name = ax.annotate(
            point.codec + (f" {_short(point.change)}" if point.change > MAX_PERCENT else ""),
            (point.bits, _height(point)),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8 if own else 7,
            color=_STYLES[point.family][0],
            zorder=4,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
        name.set_in_layout(False)  # else it would move the axes, and with them the names
        width = name.get_window_extent().width * 72 / figure.dpi
        vertical = [(0.0, side * line) for line in (11.0, 20.0) for side in ((-1, 1) if own else (1, -1))]
        for name.xyann in (*vertical, (width / 2 + 6, 0.0), (-width / 2 - 6, 0.0)):
            box = name.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 2 * half and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            name.remove()  # no room: the tables have it


def _short(change: float) -> str:
    return f"{change:+,.0f}%" if change < 1e5 else f"{change / 1e6:+.1f}M%"


def _legend(figure: Figure, panels: Mapping[str, Sequence[Point]], max_bits: float) -> None:
    from matplotlib.lines import Line2D

    shown = {point.family for points in panels.values() for point in points if point.bits <= max_bits}
    handles: list[Any] = [
        Line2D([], [], color=_STYLES[name][0], marker=_STYLES[name][1], linestyle="", label=name)
        for name in FAMILIES
        if name in shown
    ]
    handles.append(Line2D([], [], color=_STYLES[OURS][0], label="ours, lower envelope"))
    handles.append(Line2D([], [], color="#444444", linestyle="--", label="all others, lower envelope"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False)


def _image(figure: Figure, ax: Any, grid: NDArray[np.float64], logarithmic: bool) -> None:
    positive = grid[np.isfinite(grid) & (grid > 0)]
    options: dict[str, Any] = {"vmin": 0}
    if logarithmic and len(positive) and positive.max() > 10 * positive.min():
        options = {"norm": LogNorm(float(positive.min()), float(positive.max()))}
        grid = np.where(grid > 0, grid, positive.min())
    image = ax.imshow(grid, aspect="auto", cmap="magma", interpolation="nearest", **options)
    figure.colorbar(image, ax=ax, shrink=0.85).ax.tick_params(labelsize=7, which="both")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)


def _save(figure: Figure, path: Path, dpi: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A palette makes files a third as large. No version and no date: equal results give equal files.
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png", metadata={"Software": None})
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)
    return path
