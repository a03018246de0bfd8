"""What the README and docs/ show runs, and their figures are those that were measured."""

import argparse
import builtins
import functools
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from flexlocal.cli.main import parser
from profiling import tables

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
COMPARISON = ROOT / "docs" / "comparison.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "profiling" / "results"
TABLES = {
    "h100.json": COMPARISON,
    "h100_doc256.json": COMPARISON,
    "cpu.json": COMPARISON,
    "cpu_fp32.json": RESULTS / "README.md",
    "cpu_fp32_two_threads.json": RESULTS / "README.md",
    "cpu_fp32_heads.json": RESULTS / "README.md",
    "cpu_fp32_batch_8.json": RESULTS / "README.md",
    "cpu_fp32_32768.json": RESULTS / "README.md",
    "cpu_bf16.json": RESULTS / "README.md",
    "h100_rotary.json": RESULTS / "README.md",
    "h200.json": RESULTS / "README.md",
    "h200_rotary.json": RESULTS / "README.md",
    "h100_arguments.json": RESULTS / "README.md",
    "h100_mask_doc256.json": RESULTS / "README.md",
    "h100_mask_slide1k.json": RESULTS / "README.md",
    "h100_mask_slide4k.json": RESULTS / "README.md",
    "h100_scale.json": RESULTS / "README.md",
}

WRITTEN = "must hold what bench, scale, argument_costs or cpu wrote"


def blocks(language, pages=PAGES):
    """The pages' blocks of ``language``, each with the line it begins on."""
    found = []
    for page in pages:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append(pytest.param(match[1], id=f"{page.name}, line {line}"))
    return found


def commands(*begin):
    """What follows ``begin`` in the commands of the pages' shell blocks that begin so."""
    for block in blocks("bash"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                if tuple(words[: len(begin)]) == begin:
                    yield pytest.param(words[len(begin) :], id=" ".join(words[len(begin) :]))


def shown(code):
    """What the code says that its prints print: line -> pattern; ``...`` stands for anything."""
    found = {}
    for number, line in enumerate(code.splitlines(), 1):
        match = re.match(r"\s*print\(.*\)\s+# (.*)$", line)
        if match:
            parts = re.split(r"\s*\.\.\.\s*", match[1])
            found[number] = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return found


def printed(code, monkeypatch):
    """What the code's prints print: line -> text."""
    found = {}

    def print(*values):
        found[sys._getframe(1).f_lineno] = " ".join(map(str, values))

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "print", print)
        exec(compile(code, "a page", "exec"), {"__name__": "__main__"})
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_code_prints_what_stands_behind_its_prints(code, monkeypatch):
    expected = shown(code)
    assert expected
    # Traced as by Inductor, without the half minute that its C++ takes; tests/flex/ has that.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    told = printed(code, monkeypatch)
    for number, pattern in expected.items():
        assert pattern.fullmatch(told[number]), f"line {number} printed {told[number]!r}"


def test_what_is_behind_a_print_is_found(monkeypatch):
    code = "x = 4\nprint(x, 5)   # 4 ...\nprint('a\\nb c')  # ... c\nprint(x)\ny = x  # 5\n"
    assert {n: p.pattern for n, p in shown(code).items()} == {2: "4.*", 3: ".*c"}
    assert printed(code, monkeypatch) == {2: "4 5", 3: "a\nb c", 4: "4"}


@pytest.mark.parametrize("name", ["README", "recipes", "differences", "limits", "transformers"])
def test_a_page_shows_code(name):
    (page,) = (page for page in PAGES if page.stem == name)
    assert blocks("python", [page])


def test_the_readme_is_short_and_says_what_a_swap_changes():
    text = README.read_text()
    assert text.count("\n") <= 150
    beside = text[text.index("Drop-in") : text.index("## Where to read on")]
    rows = re.findall(r"^\| ([^|]+) \|", beside, re.MULTILINE)[1:]
    table = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "differences.md").read_text(), re.M)[1:]
    assert len(rows) == len(table) == 8
    assert rows[1:] == table[1:]  # the first is dropout, in other words
    assert "0.1" in beside and "dropout=0.0" in beside


def test_the_readmes_two_commands_need_nothing_before_them():
    demo, tests = (line for line in README.read_text().splitlines() if " && " in line)
    assert demo == "pip install -e . -c constraints.txt && python -m flexlocal demo"
    install, run = tests.split(" && ")
    assert install == 'pip install -e ".[test]" -c constraints.txt'
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert run in ci and f"python -m {install.replace('install', 'install --quiet')}" in ci


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    for link in links:
        name, _, place = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if place else []
        assert not place or place in {
            re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads
        }, link


@pytest.mark.parametrize("words", list(commands("python", "-m", "flexlocal")))
def test_its_commands_are_understood(words):
    assert parser().parse_args(words).command == words[0]


class Understood(Exception):
    """A command line was read to its end."""


SCRIPTS = [
    pytest.param((f"profiling.{name}", *words.values[0]), id=f"{name} {words.id}")
    for name in (
        "argument_costs",
        "bars",
        "bench",
        "compiles",
        "cpu",
        "decoding",
        "scale",
        "tables",
        "trace",
        "transformers_models",
        "tune",
    )  # fmt: skip
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
    shell = "".join(block.values[0] for block in blocks("bash"))
    assert len(SCRIPTS) == shell.count("python -m profiling.") > 0


@pytest.mark.parametrize("name", TABLES)
def test_its_tables_are_those_of_the_results(name, capsys):
    tables.main([str(RESULTS / name)])
    assert capsys.readouterr().out in TABLES[name].read_text()


def measured(file, problem):
    """Peer -> what was measured of a problem."""
    problems = json.loads((RESULTS / file).read_text())["problems"]
    (found,) = (one for one in problems if one["name"] == problem)
    return {row["peer"]: row for row in found["rows"]}


def says(page, words):
    """Whether the page holds the words, wherever its lines break."""
    return words in re.sub(r"\s+", " ", page.read_text())


def test_figures_in_sentences_are_those_of_the_results():
    doc256 = measured("h100_doc256.json", "doc256")
    ours, theirs = doc256["flexlocal"], doc256["local-attention"]
    compiled, stock = doc256["local-attention compiled"], doc256["FlexAttention, stock"]

    def times(one, other, kind):
        return one[f"{kind}_ms"] / other[f"{kind}_ms"]

    slow = [f"{times(theirs, ours, kind):.0f} times" for kind in ("forward", "train")]
    fast = [f"{times(compiled, ours, kind):.1f}" for kind in ("forward", "train")]
    assert says(
        README,
        f"local-attention takes {slow[0]} as long forward and {slow[1]} as long in training, "
        f"compiled {fast[0]} and {fast[1]} times",
    )

    first = [row["first_forward_s"] + row["first_train_s"] for row in (ours, stock)]
    assert says(
        COMPARISON, f"took {first[0]:.1f} s to compile; stock FlexAttention's took {first[1]:.1f} s"
    )

    ours = measured("h100.json", "doc256")["flexlocal"]
    flash = measured("h100.json", "slide256")["FlashAttention 4"]
    forward, train = times(ours, flash, "forward"), times(ours, flash, "train")
    assert says(
        COMPARISON, f"{forward:.2f} times as long forward and {train:.2f} times as long in training"
    )

    rotary = [measured("h100_rotary.json", name) for name in ("slide256", "encoder64")]
    layer = [times(rows["flexlocal"], rows["FlashAttention 4"], "train") for rows in rotary]
    assert says(COMPARISON, f"takes {layer[0]:.2f} times as long as a compiled rotation")
    assert says(COMPARISON, f"On encoder64 it takes {layer[1]:.2f} times as long")

    rows = json.loads((RESULTS / "h100_arguments.json").read_text())["rows"]
    plain, rotary = rows["plain"], rows["rotary"]
    padding, learned = rows["key mask, the last 5 % hidden"], rows["bias, learned"]
    bias32 = rows["bias, learned in fp32"]
    for words in (
        f"| rotary embeddings | {times(rotary, plain, 'train'):.1f} times the plain step",
        f"| xpos | {times(rows['xpos'], rotary, 'train'):.2f} times rotary |",
        f"| a key mask | {times(padding, plain, 'train'):.1f} times;",
        f"| a learned bias | {times(learned, plain, 'train'):.1f} times; "
        f"{times(bias32, plain, 'train'):.1f} in fp32 |",
        f"| dropout | {times(rows['dropout'], plain, 'train'):.1f} times |",
    ):
        assert says(COMPARISON, words), words


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "record must hold one of problems, lengths, rows, cells"),
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
