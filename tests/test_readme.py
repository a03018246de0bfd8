"""What the README shows runs."""

import json
import re
import shlex
from pathlib import Path

import pytest

from flexlocal.__main__ import parser
from profiling.report import markdown

README = Path(__file__).parents[1] / "README.md"
BENCHES = ("h100.json", "h100_doc256.json", "cpu.json")


def blocks(language):
    """The README's blocks of ``language``, each with the line it begins on."""
    text = README.read_text() if README.is_file() else ""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        pytest.param(match[1], id=f"line {text[: match.start()].count(chr(10)) + 1}")
        for match in found
    ]


def commands():
    """The ``python -m flexlocal ...`` lines of the README's shell blocks."""
    for block in blocks("bash") + blocks("sh") + blocks("console"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:3] == ["python", "-m", "flexlocal"]:
                yield pytest.param(words[3:], id=" ".join(words[3:]))


def test_the_readme_shows_code():
    assert README.is_file()
    assert blocks("python")


@pytest.mark.parametrize("code", blocks("python"))
def test_its_code_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})  # or it raises


@pytest.mark.parametrize("words", list(commands()))
def test_its_commands_are_understood(words):
    assert parser().parse_args(words).command == words[0]


@pytest.mark.parametrize("name", BENCHES)
def test_its_tables_are_those_of_the_results(name):
    record = json.loads((README.parent / "profiling" / "results" / name).read_text())
    assert markdown(record) in README.read_text()
