"""What ``bench`` measured, as text, as a table for docs/ and as a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .terminal import number, paragraph, table
from .timing import TOO_NOISY, Ratio, ratio_of_rows

Entry = dict[str, Any]
"""A problem in a record: its sizes, its floors and a row for each peer."""

KINDS = {"forward": "forward", "train": "training"}
OURS = "flexlocal"

PACED = 0.9
"""Of a call's time, the most that its kernels take where they are said to wait."""


def row_in(entry: Entry, peer: str) -> dict[str, Any]:
    """The peer's row, empty where it has none."""
    return next((row for row in entry["rows"] if row["peer"] == peer), {})


def measured(entries: list[Entry], name: str) -> bool:
    """Whether some peer has it."""
    return any(row.get(name) is not None for entry in entries for row in entry["rows"])


def text(entry: Entry) -> str:
    """A problem's measurements for a terminal; who was not measured stands below, with reasons."""
    above = f"{_title(entry)}\nratio: to {OURS}'s time in the same round, with quartiles\n"
    parts = [paragraph(above)]
    for kind, words in KINDS.items():
        for more in ("", "kernels_"):
            name = f"{kind}_{more}ms"
            if measured([entry], name):
                title = f"{words}, its kernels" if more else words
                parts.append(_table(entry, kind, name, title) + "\n")
    below = (*_noise(entry), *_absent(entry))
    return "\n".join([*parts, *map(paragraph, below)])


def _table(entry: Entry, kind: str, name: str, title: str) -> str:
    ours, lines, last = row_in(entry, OURS), [], "GB" if kind == "train" else "error"
    for row in entry["rows"]:
        if row.get(name) is not None:
            its = ratio_of_rows(row, ours, name)
            cells = [number(row[name]), "-" if its is None else its.words()]
            shown = _gigabytes(row) if kind == "train" else f"{row['error']:.0e}"
            lines.append([row["peer"], *cells, number(row[f"first_{kind}_s"]), shown])
    for floor, ms in entry["floors"][kind].items():
        its = Ratio(ms / ours[name]).words() if ours.get(name) else "-"
        lines.append([f"{floor.removesuffix('_ms')} floor", number(ms), its, "-", "-"])
    return table([title, "ms", "ratio", "first s", last], lines)


def _title(entry: Entry) -> str:
    words = f" ({entry['words']})" if entry["words"] else ""
    sizes = " x ".join(str(size) for size in entry["shape"])
    return f"{entry['name']}{words}: {sizes}, {entry['rule']}"


def _gigabytes(row: dict[str, Any]) -> str:
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"


def _noise(entry: Entry) -> Iterator[str]:
    ours = row_in(entry, OURS)
    for kind, words in KINDS.items():
        ratios = {row["peer"]: ratio_of_rows(row, ours, f"{kind}_ms") for row in entry["rows"]}
        noisy = [peer for peer, its in ratios.items() if its is not None and its.noisy]
        if noisy:
            yield f"{TOO_NOISY} the {words} ratios of {', '.join(noisy)}"


def _absent(entry: Entry) -> Iterator[str]:
    for row in entry["rows"]:
        if row["status"] != "measured":
            yield f"{row['peer']}: {row['status']}: {row['reason']}"
        elif row["reason"]:
            yield f"{row['peer']}: {row['reason']}"


def markdown(record: dict[str, Any]) -> str:
    """A Markdown table: peers in rows, problems in columns, and what they are above it."""
    entries = record["problems"]
    # A processor's own times say little of another's.
    absolute = record["device_type"] != "cpu"
    lines = [
        _caption(record),
        "",
        *(f"- {_title(entry)}" for entry in entries),
        "",
        f"| | {' | '.join(entry['name'] for entry in entries)} |",
        "|---" * (len(entries) + 1) + "|",
    ]
    for name in _peers(entries):
        cells = [_cell(entry, name, absolute) for entry in entries]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _peers(entries: list[Entry]) -> list[str]:
    return list(dict.fromkeys(row["peer"] for entry in entries for row in entry["rows"]))


def _caption(record: dict[str, Any]) -> str:
    settings = record["settings"]
    extras = [settings["dtype"]]
    extras += ["with rotary embeddings"] * settings["rotary"]
    extras += ["of transposed views"] * settings["views"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    entries, step = record["problems"], "a training step (forward and backward)"
    what = f"How many times flexlocal's time a forward pass / {step} takes"
    if record["device_type"] != "cpu":
        what = f"Milliseconds of a forward pass / of {step}, in brackets how many times"
        what += " flexlocal's time"
    wait = any(kernels_wait(entry, kind) for entry in entries for kind in KINDS)
    then = f", and of its kernels where some take less than {PACED:.0%} of it" if wait else ""
    memory = measured(entries, "peak_bytes")
    then += "; then the most memory that the step holds" if memory else ""
    return f"{record['device']} ({versions}), {', '.join(extras)}. {what}{then}:"


def _cell(entry: Entry, peer: str, absolute: bool) -> str:
    row = row_in(entry, peer)
    if row.get("status") in ("wrong", "out of memory"):
        return row["status"]
    if row.get("forward_ms") is None:
        return "-"
    times = " / ".join(_times(entry, row, kind, absolute) for kind in KINDS)
    return times if row["peak_bytes"] is None else f"{times}, {_gigabytes(row)} GB"


def _times(entry: Entry, row: dict[str, Any], kind: str, absolute: bool) -> str:
    """A call's time and, where some peer's kernels wait for the host, its kernels'."""
    time, kernels = (_time(entry, row, f"{kind}_{name}ms", absolute) for name in ("", "kernels_"))
    known = row.get(f"{kind}_kernels_ms") is not None and kernels_wait(entry, kind)
    return f"{time}, kernels {kernels}" if known else time


def _time(entry: Entry, row: dict[str, Any], name: str, absolute: bool) -> str:
    its = ratio_of_rows(row, row_in(entry, OURS), name)
    if its is None:
        return number(row.get(name)) if absolute else "-"
    return f"{number(row[name])} ({its.words(bracket=False)})" if absolute else its.words()


def kernels_wait(entry: Entry, kind: str) -> bool:
    """Whether some peer's kernels take much less than its calls, as where a host is slow."""
    call, kernels = f"{kind}_ms", f"{kind}_kernels_ms"
    timed = [row for row in entry["rows"] if row.get(kernels) is not None]
    return any(row[kernels] < PACED * row[call] for row in timed)


def plot(record: dict[str, Any], file: Path) -> None:
    """Writes a bar for each peer, grouped by problem; lines are the larger of the two floors."""
    from matplotlib.figure import Figure

    entries = record["problems"]
    names = _peers(entries)
    kinds = [kind for kind in KINDS if measured(entries, f"{kind}_ms")]
    figure = Figure(figsize=(3 + 2.5 * len(entries), 4 * len(kinds)), layout="constrained")
    width = 0.8 / len(names)
    for axes, kind in zip(figure.subplots(len(kinds), squeeze=False)[:, 0], kinds, strict=True):
        for place, name in enumerate(names):
            left = [group + width * (place + 0.5) - 0.4 for group in range(len(entries))]
            heights = [row_in(entry, name).get(f"{kind}_ms") or 0 for entry in entries]
            if any(heights):
                axes.bar(left, heights, width, label=name)
        for group, entry in enumerate(entries):
            axes.hlines(max(entry["floors"][kind].values()), group - 0.4, group + 0.4, "black")
        axes.set(yscale="log", ylabel=f"{kind}, ms")
        axes.set_xticks(range(len(entries)), [entry["name"] for entry in entries])
    figure.axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{record['device']}, {record['settings']['dtype']}")
    figure.savefig(file, dpi=120)
