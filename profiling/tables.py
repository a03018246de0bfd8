"""Prints the Markdown table of what bench, scale, argument_costs or cpu wrote as JSON.

python -m profiling.tables profiling/results/h100.json
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from . import argument_costs, cpu, report, scale
from .options import reader, record_in

# By the field that holds the figures.
TABLES = {
    "problems": report.markdown,
    "lengths": scale.markdown,
    "rows": argument_costs.markdown,
    "cells": cpu.markdown,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and prints the table."""
    parser = reader("tables", __doc__)
    parser.add_argument("file", type=Path, metavar="RESULTS.json")
    file = parser.parse_args(arguments).file
    with record_in(file, parser, "bench, scale, argument_costs or cpu") as record:
        made = [markdown(record) for field, markdown in TABLES.items() if field in record]
        if not made:
            raise ValueError(f"record must hold one of {', '.join(TABLES)}, got {list(record)}")
        print(made[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
