"""What the README shows runs."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from flexlocal.__main__ import parser
from profiling import tables

README = Path(__file__).parents[2] / "README.md"
RESULTS = README.parent / "profiling" / "results"
TABLES = {
    "h100.json": README,
    "h100_doc256.json": README,
    "cpu.json": README,
    "h100_rotary.json": RESULTS / "README.md",
    "h100_arguments.json": RESULTS / "README.md",
    "h100_mask_doc256.json": RESULTS / "README.md",
    "h100_mask_slide1k.json": RESULTS / "README.md",
    "h100_mask_slide4k.json": RESULTS / "README.md",
    "h100_scale.json": RESULTS / "README.md",
}

WRITTEN = "must hold what bench, scale or argument_costs wrote"

SHOWN = (
    "a query sees at most 128 keys: its window of 64 up to",
    "eager: auto takes the fused kernel on a GPU, and q is on cpu",
    "444 700",
    "query 7 sees 6 keys: 2 to 7, the query's own included",
)
"""What the README says that its code prints."""


def blocks(language):
    """The README's blocks of ``language``, each with the line it begins on."""
    text = README.read_text() if README.is_file() else ""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        pytest.param(match[1], id=f"line {text[: match.start()].count(chr(10)) + 1}")
        for match in found
    ]


def commands(*begin):
    """What follows ``begin`` in the lines of the README's shell blocks that begin so."""
    for block in blocks("bash") + blocks("sh") + blocks("console"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if tuple(words[: len(begin)]) == begin:
                yield pytest.param(words[len(begin) :], id=" ".join(words[len(begin) :]))


def test_the_readme_shows_code():
    assert README.is_file()
    code = "".join(block.values[0] for block in blocks("python"))
    assert all(words in code for words in SHOWN)


@pytest.mark.parametrize("code", blocks("python"))
def test_its_code_prints_what_it_shows(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed
    assert [words for words in SHOWN if words in code and words not in printed] == []


@pytest.mark.parametrize("words", list(commands("python", "-m", "flexlocal")))
def test_its_commands_are_understood(words):
    assert parser().parse_args(words).command == words[0]


class Understood(Exception):
    """A command line was read to its end."""


SCRIPTS = [
    pytest.param((f"profiling.{name}", *words.values[0]), id=f"{name} {words.id}")
    for name in ("argument_costs", "bench", "compiles", "scale", "tables", "trace", "tune")
    for words in commands("python", "-m", f"profiling.{name}")
]


@pytest.mark.parametrize("words", SCRIPTS)
def test_its_scripts_are_understood(words, monkeypatch):
    as_it_is = argparse.ArgumentParser.parse_args

    def parse_args(reader, arguments):
        as_it_is(reader, arguments)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    script, *arguments = words
    with pytest.raises(Understood):
        importlib.import_module(script).main(arguments)


def test_none_of_its_scripts_is_left_out():
    assert len(SCRIPTS) == README.read_text().count("python -m profiling.") > 0


@pytest.mark.parametrize("name", TABLES)
def test_its_tables_are_those_of_the_results(name, capsys):
    tables.main([str(RESULTS / name)])
    assert capsys.readouterr().out in TABLES[name].read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "record must hold one of problems, lengths, rows"),
        ("{", "Expecting"),
        ("5", WRITTEN),
        ('{"problems": [{"name": 1}]}', WRITTEN),
    ],
)
def test_what_is_no_table_is_refused(text, says, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(SystemExit) as exit:
        tables.main([str(file)])
    assert exit.value.code == 2
    assert f"{file}: {says}" in capsys.readouterr().err
