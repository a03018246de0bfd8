"""The bar and the table: what a terminal sees of them, and what a file or a pipe does."""

import io
import sys

import pytest

from profiling.terminal import Bar, number, paragraph, table


class Terminal(io.StringIO):
    def isatty(self):
        return True


def seen(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    with Bar(4) as bar:
        bar.show("at work")
        bar.advance()
    return stream.getvalue()


def test_a_terminal_sees_a_bar_as_wide_as_it(monkeypatch):
    text = seen(monkeypatch, Terminal())
    assert "at work" in text and "1/4" in text
    lines = [line for line in io.StringIO(text).read().split("\r") if "1/4" in line]
    assert lines


def test_a_file_sees_no_bar(monkeypatch):
    assert seen(monkeypatch, io.StringIO()) == ""


def test_results_go_where_they_are_sent_while_a_bar_is_shown(monkeypatch):
    """rich would show them above the bar, past the file or pipe that standard output is."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", out)
    with Bar(1) as bar:
        bar.show("at work")
        print("a result")
    assert out.getvalue() == "a result\n"


ROWS = [["one", "1.5", "because of this and of that, and of some more"], ["another", "22", "-"]]


def test_numbers_are_set_to_the_right_and_words_to_the_left():
    lines = table(["name", "ms", "reason"], ROWS, ["reason"]).splitlines()
    assert lines[0] == "name     ms reason"
    assert lines[2].startswith("one     1.5 because of this and of that, and of some more")
    assert lines[3] == "another  22 -"


def test_words_go_on_in_the_next_line_of_a_narrow_terminal():
    lines = table(["name", "ms", "reason"], ROWS, ["reason"], width=30).splitlines()
    assert max(map(len, lines)) <= 30
    assert lines[2] == "one     1.5 because of this"
    assert lines[3].strip() == "and of that, and"


def test_nothing_is_cut_or_broken_in_a_pipe(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    long = "x" * 300
    assert long in table(["name", "ms"], [[long, "1"]])
    assert paragraph(long + " y") == long + " y"


def test_a_paragraph_is_as_wide_as_the_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "10")
    assert paragraph("one two three\nfour") == "one two\nthree\nfour"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.1234, "0.123"), (1.0, "1.00"), (99.94, "99.9"), (123.4, "123")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text
