"""What a picture says of its cells, and where lines at windows' edges have room."""

import pytest

from flexlocal.masks.view.drawing import Drawing, lines_of
from flexlocal.masks.view.symbols import BLOCKS, SHADES, TOKENS


def drawing(kinds, step, axes=("query", "key")):
    return Drawing("seen", "of these", (8, 8), ((0, 2), (2, 0)), kinds, step, 4, axes)


def test_a_unit_says_what_a_cell_stands_for():
    blocks = "query block", "key block"
    assert drawing(TOKENS, 1).unit("a cell", "shaded") == "a cell is one query and one key"
    assert drawing(SHADES, 4).unit("it", "shaded") == "it is 4 queries by 4 keys, shaded"
    found = drawing(BLOCKS, 4, blocks).unit("it", "shaded")
    assert found == "it is 4 query blocks by 4 key blocks"


def test_the_legend_has_the_kinds_that_are_there():
    assert drawing(TOKENS, 1).used == [TOKENS[0], TOKENS[2]]


@pytest.mark.parametrize(
    ("edge", "shape", "step", "lines"),
    [
        (5, (20, 20), 1, 5),
        (1, (20, 20), 1, 0),  # a line at every token
        (5, (160, 20), 1, 5),
        (5, (161, 20), 1, 0),  # more than 32 windows
        (5, (20, 161), 1, 0),
        (8, (64, 64), 4, 8),
        (7, (64, 64), 4, 0),  # less than two cells
    ],
)
def test_lines_stand_where_they_have_room(edge, shape, step, lines):
    assert lines_of(edge, shape, step) == lines
