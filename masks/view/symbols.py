"""What a picture of a mask is made of: cell kinds, their characters and their colours.

The colours are those of Okabe and Ito (Color Universal Design, 2008), told apart by the
colour-blind, and differ in lightness, so that they are told apart in print as well. Tokens are
blue and orange squares side by side; blocks are green tiles with gaps, so that neither picture
is taken for the other.
"""

from dataclasses import dataclass

HIDDEN, STRUCK, SEEN, OWN = 0, 1, 2, 3
"""A token pair: not seen, hidden by the key mask alone, seen, seen and the query's own key."""


@dataclass(frozen=True)
class Kind:
    """How one kind of cell is drawn.

    Attributes:
        name: an identifier, the class in HTML.
        words: its meaning in a legend.
        character: in a terminal.
        plain: in a terminal that knows ASCII only.
        color: in print and on white, as ``#rrggbb``.
        dark: on black.
        ansi: its colour among a terminal's 256.
        hatched: crossed by lines, in print.
    """

    name: str
    words: str
    character: str
    plain: str
    color: str
    dark: str
    ansi: int
    hatched: bool = False


TOKENS = (
    Kind("hidden", "not seen", "·", ".", "#f4f4f4", "#262626", 240),
    Kind("struck", "hidden by the key mask", "×", "x", "#cccccc", "#5a5a5a", 245),
    Kind("seen", "seen", "■", "#", "#0072b2", "#56b4e9", 33),
    Kind("own", "seen, the query's own key", "◆", "@", "#e69f00", "#f0c04c", 214),
)
"""By ``HIDDEN``, ``STRUCK``, ``SEEN`` and ``OWN``."""

SHADES = (
    Kind("none", "none", "·", ".", "#f4f4f4", "#262626", 240),
    Kind("few", "up to 1/3", "░", "-", "#7fbce0", "#1f4e6b", 39),
    Kind("half", "up to 2/3", "▒", "+", "#3f97cc", "#2f7fae", 33),
    Kind("most", "below all", "▓", "*", "#0072b2", "#56b4e9", 27),
    Kind("all", "all", "█", "#", "#004a75", "#a6d8f7", 21),
)
"""Shares of a cell's token pairs that see each other, see ``shade``."""

BLOCKS = (
    Kind("empty", "empty: skipped", "[ ]", "[ ]", "#ffffff", "#1a1a1a", 240),
    Kind("partial", "partial: computed, then masked", "[P]", "[P]", "#a8dccb", "#2c5c4e", 79, True),
    Kind("full", "full: computed", "[F]", "[F]", "#006b4f", "#00c48f", 29),
)
"""By ``masks.EMPTY``, ``masks.PARTIAL`` and ``masks.FULL``."""


def shade(share: float) -> int:
    """The place in ``SHADES`` of a share between 0 and 1; its ends are exact."""
    if share in (0.0, 1.0):
        return 4 * int(share)
    return 1 if share <= 1 / 3 else 2 if share <= 2 / 3 else 3
