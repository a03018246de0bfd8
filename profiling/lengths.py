"""What was measured at each length: its growth, its table and its picture."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import number


@dataclass(frozen=True)
class Length:
    """What was measured at one length; None where memory ran out or the path cannot train.

    ``kernels_ms`` is what a training step's kernels take on a GPU, without the host's launches.
    ``peak_bytes`` is of training where the path can train, else of the forward pass, and
    includes the tensors that are passed in. The block mask is timed by itself, outside a compiled
    graph, which would fuse it.
    """

    n: int
    forward_ms: float | None
    train_ms: float | None
    kernels_ms: float | None
    peak_bytes: int | None
    mask_bytes: int
    mask_ms: float | None
    out_of_memory: bool

    @property
    def per_token(self) -> dict[str, float]:
        """Each of the measured, by its name, over the length."""
        return {name: value / self.n for name in MEASURED if (value := getattr(self, name))}


MEASURED = ("forward_ms", "train_ms", "kernels_ms", "peak_bytes", "mask_bytes", "mask_ms")
"""The attributes of ``Length`` that may grow with the length."""


def growth(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The exponent ``p`` of ``value = c * length ** p``, by least squares on logarithms."""
    logs = [math.log(length) for length in lengths], [math.log(value) for value in values]
    return statistics.linear_regression(*logs).slope


def growths(rows: Sequence[Length]) -> dict[str, float]:
    """The growth of each of the measured over the longer half of the lengths that have it."""
    found = {}
    for name in MEASURED:
        known = [(row.n, value) for row in rows if (value := getattr(row, name))]
        # Where calls are short, what a call costs at any length hides the growth.
        longer = known[len(known) // 2 :] if len(known) > 3 else known
        if len(longer) > 1:
            found[name] = growth(*zip(*longer, strict=True))
    return found


_COLUMNS = (
    # title, attribute, its unit, whether over the length
    ("forward ms", "forward_ms", 1.0, False),
    ("ns/token", "forward_ms", 1e6, True),
    ("train ms", "train_ms", 1.0, False),
    ("ns/token", "train_ms", 1e6, True),
    ("kernels ms", "kernels_ms", 1.0, False),
    ("ns/token", "kernels_ms", 1e6, True),
    ("peak MB", "peak_bytes", 1e-6, False),
    ("B/token", "peak_bytes", 1.0, True),
    ("mask kB", "mask_bytes", 1e-3, False),
    ("B/token", "mask_bytes", 1.0, True),
    ("mask ms", "mask_ms", 1.0, False),
    ("ns/token", "mask_ms", 1e6, True),
)


def heading() -> str:
    """The table's first line."""
    return f"{'n':>8}" + "".join(f"{title:>12}" for title, *_ in _COLUMNS)


def line(row: Length) -> str:
    """One length of the table."""
    cells = []
    for _, name, unit, over in _COLUMNS:
        value = row.per_token.get(name) if over else getattr(row, name)
        cells.append(number(None if value is None else value * unit))
    note = "  out of memory" if row.out_of_memory else ""
    return f"{row.n:8}" + "".join(f"{cell:>12}" for cell in cells) + note


def growth_line(found: dict[str, float]) -> str:
    """The table's last line: the exponents, under the columns that they belong to."""
    cells = [
        "" if over or name not in found else f"n^{found[name]:.2f}" for _, name, _, over in _COLUMNS
    ]
    return f"{'growth':>8}" + "".join(f"{cell:>12}" for cell in cells)


def markdown(record: dict[str, Any]) -> str:
    """A Markdown table of lengths."""
    lines = [
        "| tokens | forward ms | training step ms | its ns a token | its kernels' ns a token "
        "| most GB | its bytes a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (Length(**fields) for fields in record["lengths"]):
        values = (
            (row.forward_ms, 1.0),
            (row.train_ms, 1.0),
            (row.per_token.get("train_ms"), 1e6),
            (row.per_token.get("kernels_ms"), 1e6),
            (row.peak_bytes, 1e-9),
            (row.per_token.get("peak_bytes"), 1.0),
        )
        cells = [number(None if value is None else value * unit) for value, unit in values]
        lines.append(f"| {row.n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Length], title: str, file: Path) -> None:
    """Draws time and memory for each token against the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    time, memory = figure.subplots(1, 2)
    curves = (
        (time, "forward_ms", 1e6, "forward"),
        (time, "train_ms", 1e6, "forward + backward"),
        (time, "kernels_ms", 1e6, "its kernels alone"),
        (memory, "peak_bytes", 1.0, "at most"),
        (memory, "mask_bytes", 1.0, "block mask"),
    )
    for plot, name, unit, words in curves:
        points = [(row.n, row.per_token[name] * unit) for row in rows if name in row.per_token]
        if points:
            plot.plot(*zip(*points, strict=True), marker="o", label=words)
    time.set(xlabel="tokens", ylabel="ns a token")
    memory.set(xlabel="tokens", ylabel="bytes a token", yscale="log")
    for plot in (time, memory):
        plot.set_xscale("log", base=2)
        plot.grid(alpha=0.3)
        plot.legend()
    time.set_ylim(bottom=0)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
