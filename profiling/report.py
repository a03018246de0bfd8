"""What ``bench`` measured, as text and as a table for docs/."""

from typing import Any

from .terminal import number, table
from .timing import TOO_NOISY, Ratio, ratio_of_rows

Entry = dict[str, Any]
"""A problem in a record: its sizes and a row for each peer."""

KINDS = {"forward": "forward", "train": "training"}
OURS = "flexlocal"

PACED = 0.9  # of a call's time, the most that its kernels take where they are said to wait


def row_in(entry: Entry, peer: str) -> dict[str, Any]:
    """The peer's row, empty where it has none."""
    return next((row for row in entry["rows"] if row["peer"] == peer), {})


def measured(entries: list[Entry], name: str) -> bool:
    """Whether some peer has it."""
    return any(row.get(name) is not None for entry in entries for row in entry["rows"])


def text(entry: Entry) -> str:
    """A problem's measurements for a terminal; what is noisy or missing stands below."""
    parts = [f"{_title(entry)}\nratio: to {OURS}'s time in the same round, with quartiles"]
    notes, ours = [], row_in(entry, OURS)
    for kind, words in KINDS.items():
        for name, title in ((f"{kind}_ms", words), (f"{kind}_kernels_ms", f"{words}, kernels")):
            lines = []
            for row in entry["rows"]:
                ratio = ratio_of_rows(row, ours, name)
                if row.get(name) is not None:
                    cells = [number(row[name]), _ratio(ratio), number(row[f"first_{kind}_s"])]
                    lines.append([row["peer"], *cells, f"{row['error']:.0e}", _gigabytes(row)])
                if ratio is not None and ratio.noisy:
                    notes.append(f"{TOO_NOISY} the {title} ratio of {row['peer']}")
            titles = [title, "ms", "ratio", "first s", "error", "GB"]
            parts += [table(titles, lines)] if lines else []
    absent = [row for row in entry["rows"] if row["status"] != "measured"]
    notes += [f"{row['peer']}: {row['status']}: {row['reason']}" for row in absent]
    untrained = [row for row in entry["rows"] if row["reason"] and row not in absent]
    notes += [f"{row['peer']}: {row['reason']}" for row in untrained]
    return "\n\n".join([*parts, "\n".join(notes)])


def _ratio(ratio: Ratio | None) -> str:
    return "-" if ratio is None else ratio.words()


def _title(entry: Entry) -> str:
    words = f" ({entry['words']})" if entry["words"] else ""
    sizes = " x ".join(str(size) for size in entry["shape"])
    return f"{entry['name']}{words}: {sizes}, {entry['rule']}"


def _gigabytes(row: dict[str, Any]) -> str:
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"


def markdown(record: dict[str, Any]) -> str:
    """A Markdown table: peers in rows, problems in columns, and what they are above it."""
    entries = record["problems"]
    # A processor's own times say little of another's.
    absolute = record["device_type"] != "cpu"
    lines = [_caption(record, absolute), "", *(f"- {_title(entry)}" for entry in entries), ""]
    lines.append(f"| | {' | '.join(entry['name'] for entry in entries)} |")
    lines.append("|---" * (len(entries) + 1) + "|")
    for name in dict.fromkeys(row["peer"] for entry in entries for row in entry["rows"]):
        cells = [_cell(entry, name, absolute) for entry in entries]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _caption(record: dict[str, Any], absolute: bool) -> str:
    settings, entries = record["settings"], record["problems"]
    extras = [settings["dtype"]]
    extras += ["with rotary embeddings"] * settings["rotary"]
    extras += ["of transposed views"] * settings["views"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    times, step = "ow many times flexlocal's time", "a training step (forward and backward)"
    what = f"H{times} a forward pass / {step} takes"
    if absolute:
        what = f"Milliseconds of a forward pass / of {step}, in brackets h{times}"
    if any(kernels_wait(entry, kind) for entry in entries for kind in KINDS):
        what += f", and of its kernels where some take less than {PACED:.0%} of it"
    if measured(entries, "peak_bytes"):
        what += "; then the most memory that the step holds"
    return f"{record['device']} ({versions}), {', '.join(extras)}. {what}:"


def _cell(entry: Entry, peer: str, absolute: bool) -> str:
    row = row_in(entry, peer)
    if row.get("status") in ("wrong", "out of memory"):
        return row["status"]
    if row.get("forward_ms") is None:
        return "-"
    times = []
    for kind in KINDS:
        time, kernels = f"{kind}_ms", f"{kind}_kernels_ms"
        words = _time(entry, row, time, absolute)
        if row.get(kernels) is not None and kernels_wait(entry, kind):
            words += f", kernels {_time(entry, row, kernels, absolute)}"
        times.append(words)
    memory = "" if row["peak_bytes"] is None else f", {_gigabytes(row)} GB"
    return " / ".join(times) + memory


def _time(entry: Entry, row: dict[str, Any], name: str, absolute: bool) -> str:
    ratio = ratio_of_rows(row, row_in(entry, OURS), name)
    if not absolute:
        return _ratio(ratio)
    return number(row.get(name)) + (f" ({ratio.words(bracket=False)})" if ratio else "")


def kernels_wait(entry: Entry, kind: str) -> bool:
    """Whether some peer's kernels take much less than its calls, as where a host is slow."""
    call, kernels = f"{kind}_ms", f"{kind}_kernels_ms"
    timed = [row for row in entry["rows"] if row.get(kernels) is not None]
    return any(row[kernels] < PACED * row[call] for row in timed)
