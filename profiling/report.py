"""What ``bench`` measured, as text, as a table for docs/ and as a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
"""A problem in a record: its sizes, its floors and a row for each peer."""

KINDS = ("forward", "train")
OURS = "flexlocal"

TIMES = {
    "forward_ms": "forward ms",
    "forward_kernels_ms": "its kernels",
    "train_ms": "train ms",
    "train_kernels_ms": "its kernels",
}
"""The times of a row and what a table calls them."""

PACED = 0.9
"""Of a call's time, the most that its kernels take where they are said to wait."""


def number(value: float | None) -> str:
    """Three digits, or a dash where there is nothing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def ratio(ours: float | None, other: float | None) -> str:
    """``ours`` over ``other``, or a dash."""
    return "-" if ours is None or not other else f"{ours / other:.2f}"


def row_of(entry: Entry, peer: str) -> dict[str, Any]:
    """The peer's row, empty where it has none."""
    return next((row for row in entry["rows"] if row["peer"] == peer), {})


def table(entry: Entry) -> str:
    """A problem's measurements for a terminal; who was not measured stands below, with reasons."""
    ours = row_of(entry, OURS)
    rows = [row for row in entry["rows"] if row["status"] == "measured"]
    times = [name for name in TIMES if any(row.get(name) is not None for row in rows)]
    heads = [column for name in times for column in (TIMES[name], "ours/it")]
    lines = [("", *heads, "peak GB", "first s", "error")]
    for row in rows:
        found = [(row[name], ours.get(name)) for name in times]
        cells = [cell for its, mine in found for cell in (number(its), ratio(mine, its))]
        first = " + ".join(_seconds(row[f"first_{kind}_s"]) for kind in KINDS)
        lines.append((row["peer"], *cells, _gigabytes(row), first, f"{row['error']:.0e}"))
    return "\n".join([_title(entry), *_aligned(lines), *_comparisons(entry), *_absent(entry)])


def _title(entry: Entry) -> str:
    words = f" ({entry['words']})" if entry["words"] else ""
    return f"{entry['name']}{words}: {_sizes(entry)}, {entry['rule']}"


def _sizes(entry: Entry) -> str:
    return " x ".join(str(size) for size in entry["shape"])


def _gigabytes(row: dict[str, Any]) -> str:
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _comparisons(entry: Entry) -> Iterator[str]:
    """Our time over the best peer's and over the floors."""
    ours = row_of(entry, OURS)
    for kind in KINDS:
        mine = ours.get(f"{kind}_ms")
        if mine is None:
            continue
        parts = [
            f"{ratio(mine, floor)} x the {name.removesuffix('_ms')} floor of {number(floor)} ms"
            for name, floor in entry["floors"][kind].items()
        ]
        best = best_peer(entry, kind)
        if best is not None:
            alone = ratio(ours.get(f"{kind}_kernels_ms"), best.get(f"{kind}_kernels_ms"))
            words = "" if alone == "-" else f" (kernels {alone} x its kernels)"
            times = ratio(mine, best[f"{kind}_ms"])
            parts.insert(0, f"{times} x the best peer, {best['peer']}{words}")
        yield f"flexlocal {kind}: {'; '.join(parts)}"


def best_peer(entry: Entry, kind: str) -> dict[str, Any] | None:
    """The fastest that is not ours."""
    others = [
        row
        for row in entry["rows"]
        if not row["peer"].startswith(OURS) and row[f"{kind}_ms"] is not None
    ]
    return min(others, key=lambda row: row[f"{kind}_ms"], default=None)


def _absent(entry: Entry) -> Iterator[str]:
    for row in entry["rows"]:
        if row["status"] != "measured":
            yield f"{row['peer']}: {row['status']}: {row['reason']}"
        elif row["reason"]:
            yield f"{row['peer']}: {row['reason']}"


def markdown(record: dict[str, Any]) -> str:
    """A Markdown table: peers in rows, problems in columns, and what they are above it."""
    entries = record["problems"]
    names = list(dict.fromkeys(row["peer"] for entry in entries for row in entry["rows"]))
    # A processor's own times say little of another's.
    absolute = record["device_type"] != "cpu"
    cells = {name: [_cell(entry, name, absolute) for entry in entries] for name in names}
    lines = [
        _caption(record),
        "",
        *(f"- {_title(entry)}" for entry in entries),
        "",
        f"| | {' | '.join(entry['name'] for entry in entries)} |",
        "|---" * (len(entries) + 1) + "|",
    ]
    for name, row in cells.items():
        if any(cell != "-" for cell in row):
            lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines)


def _caption(record: dict[str, Any]) -> str:
    settings = record["settings"]
    extras = [settings["dtype"]]
    extras += ["with rotary embeddings"] * settings["rotary"]
    extras += ["of transposed views"] * settings["views"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rows = [row for entry in record["problems"] for row in entry["rows"]]
    memory = any(row["peak_bytes"] is not None for row in rows)
    passes = "a forward pass / {}a training step (forward and backward)"
    if record["device_type"] == "cpu":
        what = f"How many times flexlocal's time {passes.format('')} takes"
    else:
        what = (
            f"Milliseconds of {passes.format('of ')}, in brackets how many times flexlocal's time"
        )
    wait = any(kernels_wait(entry, kind) for entry in record["problems"] for kind in KINDS)
    then = f", and of its kernels where some take less than {PACED:.0%} of it" if wait else ""
    then += "; then the most memory that the step holds" if memory else ""
    return f"{record['device']} ({versions}), {', '.join(extras)}. {what}{then}:"


def _cell(entry: Entry, peer: str, absolute: bool) -> str:
    row, ours = row_of(entry, peer), row_of(entry, OURS)
    if row.get("status") in ("wrong", "out of memory"):
        return row["status"]
    if row.get("forward_ms") is None:
        return "-"
    times = " / ".join(_times(entry, row, ours, kind, absolute) for kind in KINDS)
    return times if row["peak_bytes"] is None else f"{times}, {_gigabytes(row)} GB"


def _times(
    entry: Entry, row: dict[str, Any], ours: dict[str, Any], kind: str, absolute: bool
) -> str:
    """A call's time and, where some peer's kernels wait for the host, its kernels'."""
    call, kernels = f"{kind}_ms", f"{kind}_kernels_ms"
    time = _time(row[call], ours.get(call), absolute)
    if row.get(kernels) is None or not kernels_wait(entry, kind):
        return time
    return f"{time}, kernels {_time(row[kernels], ours.get(kernels), absolute)}"


def kernels_wait(entry: Entry, kind: str) -> bool:
    """Whether some peer's kernels take much less than its calls, as where a host is slow."""
    call, kernels = f"{kind}_ms", f"{kind}_kernels_ms"
    timed = [row for row in entry["rows"] if row.get(kernels) is not None]
    return any(row[kernels] < PACED * row[call] for row in timed)


def _time(other: float | None, ours: float | None, absolute: bool) -> str:
    if other is None or ours is None:
        return number(other) if absolute else "-"
    times = other / ours
    ratio = f"{times:.{1 if times >= 9.95 else 2}f}x"
    return f"{number(other)} ({ratio})" if absolute else ratio


def plot(record: dict[str, Any], file: Path) -> None:
    """Writes a bar for each peer, grouped by problem; lines are the larger of the two floors."""
    from matplotlib.figure import Figure

    entries = record["problems"]
    names = list(dict.fromkeys(row["peer"] for entry in entries for row in entry["rows"]))
    kinds = [kind for kind in KINDS if any(best_peer(e, kind) or row_of(e, OURS) for e in entries)]
    figure = Figure(figsize=(3 + 2.5 * len(entries), 4 * len(kinds)), layout="constrained")
    for axes, kind in zip(figure.subplots(len(kinds), squeeze=False)[:, 0], kinds, strict=True):
        _bars(axes, entries, names, kind)
    figure.axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{record['device']}, {record['settings']['dtype']}")
    figure.savefig(file, dpi=120)


def _bars(axes: Any, entries: list[Entry], names: list[str], kind: str) -> None:
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        left = [group + width * (place + 0.5) - 0.4 for group in range(len(entries))]
        heights = [row_of(entry, name).get(f"{kind}_ms") or 0 for entry in entries]
        if any(heights):
            axes.bar(left, heights, width, label=name)
    for group, entry in enumerate(entries):
        axes.hlines(max(entry["floors"][kind].values()), group - 0.4, group + 0.4, "black")
    axes.set_yscale("log")
    axes.set_ylabel(f"{kind}, ms")
    axes.set_xticks(range(len(entries)), [entry["name"] for entry in entries])
