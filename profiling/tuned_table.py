"""The table that ``flexlocal.tuning`` reads: one entry more, or another in place of the old."""

import json
from pathlib import Path
from typing import Any

from flexlocal import tuning

SHIPPED = Path(tuning.__file__).with_name("tuned.json")

Table = dict[str, Any]
Entry = dict[str, Any]


def read_table(file: Path) -> Table | None:
    """The table in ``file``, None where there is no such file."""
    return json.loads(file.read_text()) if file.exists() else None


def same_call(one: Entry, other: Entry) -> bool:
    """Whether two entries serve the same calls, so that only one can stay."""
    return all(one[name] == other[name] for name in ("capability", "head_size", "reach"))


def old_flash(table: Table | None, entry: Entry) -> bool:
    """What the table knew of FlashAttention 4 for the calls of ``entry``."""
    entries = [] if table is None else table["entries"]
    return any(old["flash"] for old in entries if same_call(old, entry))


def merged(table: Table | None, entry: Entry) -> Table:
    """``table`` with ``entry`` in place of the one for the same calls, or at its end.

    The table's device and torch are those of entries that name none.
    """
    if table is None:
        where = {name: entry[name] for name in ("device", "torch")}
        table = {"made_by": "python -m profiling.tune", **where, "entries": []}
    entries = list(table["entries"])
    places = [at for at, old in enumerate(entries) if same_call(old, entry)]
    if places:
        entries[places[0]] = entry
    else:
        entries.append(entry)
    return {**table, "entries": entries}


def text_of(table: Table) -> str:
    """JSON with a few lines to an entry, so that a change shows as one."""
    head = [f"{_json(name)}: {_json(table[name])}," for name in table if name != "entries"]
    entries = ",\n".join(_text_of_entry(entry) for entry in table["entries"])
    return "{\n  " + "\n  ".join(head) + f'\n  "entries": [\n{entries}\n  ]\n}}\n'


def _text_of_entry(entry: Entry) -> str:
    fields = {name: value for name, value in entry.items() if name != "options"}
    options = entry["options"]
    passes = [{name: options[name] for name in options if name[:4] == p} for p in ("fwd_", "bwd_")]
    lines = ",\n        ".join(_json(each)[1:-1] for each in passes)
    return (
        f"    {{\n      {_json(fields)[1:-1]},\n"
        f'      "options": {{\n        {lines}\n      }}\n    }}'
    )


def _json(value: Any) -> str:
    return json.dumps(value)
