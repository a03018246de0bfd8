"""Draws what bench, transformers_models or decoding wrote as JSON: bars that begin at zero.

    python -m profiling.bars RESULTS.json PICTURE.png

A bar says how many times as long something takes as the fastest of what is not flexlocal. A problem
that nothing else took part in has no bars.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import report
from .options import file_to_write, reader, record_in
from .terminal import number

Group = dict[str, float]
"""Milliseconds by name."""

Panel = dict[str, Group]
"""Groups of bars side by side, by what stands below them."""

TALLEST = 3.0  # taller bars are cut, and say how tall they are


def panels_of(record: dict[str, Any]) -> dict[str, Panel]:
    """Panels one below the other, by title.

    Raises:
        ValueError: the record is of another script.
    """
    if "problems" in record:
        kinds = {"forward": "Forward pass", "train": "Training step"}
        return {words: _problems(record["problems"], kind) for kind, words in kinds.items()}
    if "models" in record:
        return {"Training step": _models(record["models"])}
    if "host" in record:
        steps = {"host": "a step, with the host's time", "captured": "in a CUDA graph"}
        found = {words: _medians(record[kind]) for kind, words in steps.items() if kind in record}
        return {"Decoding": found}
    raise ValueError(f"record must hold problems, models or host, got {list(record)}")


def _problems(entries: Sequence[dict[str, Any]], kind: str) -> Panel:
    """Of kernels where these wait for the host, as in ``report.markdown``."""
    found = {}
    for entry in entries:
        field = f"{kind}_kernels_ms" if report.kernels_wait(entry, kind) else f"{kind}_ms"
        rows = [row for row in entry["rows"] if row.get(field) is not None]
        found[entry["name"]] = {row["peer"]: row[field] for row in rows}
    return found


def _models(models: Sequence[dict[str, Any]]) -> Panel:
    found: Panel = {}
    for model in models:
        for row in model["rows"]:
            if row["ms"] is not None:
                shape = " x ".join(map(str, row["shape"]))
                group = found.setdefault(f"{model['name']}\n{shape}", {})
                group[row["implementation"]] = row["ms"]
    return found


def _medians(rounds: dict[str, Sequence[float]]) -> Group:
    return {name: statistics.median(found) for name, found in rounds.items()}


def fastest_other(group: Group) -> float | None:
    """The shortest time that is not flexlocal's; None where nothing else was timed."""
    return min((ms for name, ms in group.items() if not name.startswith(report.OURS)), default=None)


def ratios(panel: Panel) -> Panel:
    """Times as multiples of the fastest other's; without the groups that have no other."""
    found = {}
    for words, group in panel.items():
        base = fastest_other(group)
        if base is not None:
            found[words] = {name: ms / base for name, ms in group.items()}
    return found


def figure(panels: dict[str, Panel], title: str) -> Any:
    """A matplotlib ``Figure`` with a panel for each of ``panels`` that has something to show."""
    from matplotlib.figure import Figure

    shown = {words: (panel, ratios(panel)) for words, panel in panels.items() if ratios(panel)}
    names = list(
        dict.fromkeys(x for _, by in shown.values() for group in by.values() for x in group)
    )
    names.sort(key=lambda name: not name.startswith(report.OURS))
    most = max((len(by) for _, by in shown.values()), default=1)
    size = (3 + (0.8 + 0.45 * len(names)) * most, 0.6 + 3 * max(1, len(shown)))
    made = Figure(figsize=size, layout="constrained")
    if not shown:
        made.text(0.5, 0.5, "nothing to compare with", ha="center")
        return made
    drawn = made.subplots(len(shown), squeeze=False)[:, 0]
    for axes, (words, (panel, by)) in zip(drawn, shown.items(), strict=True):
        _draw(axes, names, panel, by)
        axes.set_title(words, loc="left")
        axes.set_ylabel("times the fastest other")
    handles = {x.get_label(): x for axes in drawn for x in axes.containers}
    made.legend(handles.values(), handles.keys(), loc="outside right upper")
    made.suptitle(title)
    return made


def _draw(axes: Any, names: Sequence[str], panel: Panel, by: Panel) -> None:
    width, tallest = 0.85 / len(names), max(x for group in by.values() for x in group.values())
    for place, name in enumerate(names):
        bars = {
            group + width * (place + 0.5 - len(names) / 2): times[name]
            for group, times in enumerate(by.values())
            if name in times
        }
        if not bars:
            continue
        heights = [min(ratio, TALLEST) for ratio in bars.values()]
        drawn = axes.bar(bars.keys(), heights, width, label=name, color=f"C{place % 10}")
        words = [
            f"{x:.2f}" if x <= TALLEST else f"{x:.1f} \N{UPWARDS ARROW}" for x in bars.values()
        ]
        axes.bar_label(drawn, words, fontsize="x-small", padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    below = [f"{words}\n1 = {number(fastest_other(panel[words]))} ms" for words in by]
    axes.set_xticks(range(len(by)), below, fontsize="small")
    axes.set_xlim(-0.6, len(by) - 0.4)
    axes.set_ylim(0, 1.12 * min(TALLEST, tallest))


def plot(record: dict[str, Any], file: Path) -> None:
    """Writes the picture of ``record`` as a PNG.

    Raises:
        ValueError: the record is of another script.
    """
    settings = record["settings"]
    words = [record["device"], settings.get("dtype", "").removeprefix("torch.")]
    made = figure(panels_of(record), ", ".join(filter(None, words)))
    made.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and draws the picture."""
    parser = reader("bars", __doc__)
    parser.add_argument("file", type=Path, metavar="RESULTS.json")
    parser.add_argument("picture", type=file_to_write, metavar="PICTURE.png")
    options = parser.parse_args(arguments)
    writers = "bench, transformers_models or decoding"
    with record_in(options.file, parser, writers) as record:
        plot(record, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
