"""Prints the Markdown table of what bench, scale or argument_costs wrote as JSON.

    python -m profiling.tables profiling/results/h100.json

Which of them wrote it is told by the field that holds the figures.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import argument_costs, lengths, report

TABLES = {
    "problems": report.markdown,
    "lengths": lengths.markdown,
    "rows": argument_costs.markdown,
}
"""By that field: of bench, scale and argument_costs."""


def table(record: dict[str, Any]) -> str:
    """The table of any of the records.

    Raises:
        ValueError: there is none of its kind.
    """
    for field, markdown in TABLES.items():
        if field in record:
            return markdown(record)
    raise ValueError(f"record must hold one of {', '.join(TABLES)}, got {', '.join(record)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.tables", description=__doc__.split("\n")[0]
    )
    parser.add_argument("file", type=Path, metavar="RESULTS.json")
    file = parser.parse_args(arguments).file
    try:
        print(table(json.loads(file.read_text())))
    except (OSError, ValueError) as wrong:  # of which a text that is no JSON is one
        parser.error(f"{file}: {wrong}")
    except (KeyError, TypeError, IndexError, AttributeError):
        parser.error(f"{file}: must hold what bench, scale or argument_costs wrote")
    return 0


if __name__ == "__main__":
    sys.exit(main())
