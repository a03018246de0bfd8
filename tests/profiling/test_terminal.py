"""The bar and the table: what a terminal sees of them, and what a file or a pipe does."""

import io
import json
import sys
from pathlib import Path

import pytest

from profiling import decoding
from profiling.terminal import number, table, watched

RESULTS = Path(__file__).parents[2] / "profiling/results"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def seen(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    assert list(watched("abcd", 4, "at work")) == list("abcd")
    return stream.getvalue()


def test_a_terminal_sees_a_bar(monkeypatch):
    text = seen(monkeypatch, Terminal())
    assert "at work" in text and "25%" in text


def test_a_file_sees_no_bar(monkeypatch):
    assert seen(monkeypatch, io.StringIO()) == ""


ROWS = [["one", "1.5", "because of this and of that, and of some more"], ["another", "22", "-"]]


def test_numbers_are_set_to_the_right_and_words_to_the_left():
    lines = table(["name", "ms", "reason"], ROWS, ["reason"]).splitlines()
    assert lines[0] == "name     ms reason"
    assert lines[2].startswith("one     1.5 because of this and of that, and of some more")
    assert lines[3] == "another  22 -"


def test_words_go_on_in_the_next_line_of_a_narrow_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    lines = table(["name", "ms", "reason"], ROWS, ["reason"]).splitlines()
    assert max(map(len, lines)) <= 30
    assert lines[2] == "one     1.5 because of this"
    assert lines[3].strip() == "and of that, and"


def test_a_pipe_is_given_80_columns_and_all_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    long, words = "x" * 300, "some words " * 30
    text = table(["name", "ms", "reason"], [[long, "123", words], ["y", "4", "z"]], ["reason"])
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("x") == 300 and text.count("words") == 30
    assert "123" in text


def test_a_table_of_decoding_fits_80_columns_of_a_pipe():
    record = json.loads((RESULTS / "h200_decoding.json").read_text())
    text = decoding.text(record)
    assert max(map(len, text.splitlines())) <= 80
    assert all(f" {number(sorted(x)[3])} " in text for x in record["host"].values())


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.1234, "0.123"), (1.0, "1.00"), (99.94, "99.9"), (123.4, "123")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text
