"""One query in words: which keys it sees, and what hides the others of its interval."""

from html import escape

import torch
from torch import Tensor

from ..arguments import check_count
from ..rule import Rule
from ..window import Window

_MOST_INTERVALS = 8


class QueryWords(str):
    """What one query sees, in words; a ``str`` that a notebook shows as lines of text."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return f"<p>{'<br>'.join(map(escape, self.splitlines()))}</p>"


def query_words(
    rule: Rule, i: int, n: int, n_keys: int, key_mask: Tensor | None, batch: int, head: int
) -> QueryWords:
    """Which keys query ``i`` sees, in words.

    Args:
        rule: the mask rule.
        i: the query, below ``n``.
        n, n_keys: queries, and key slots.
        key_mask: boolean ``(n_keys,)`` by slot, True = keep; ``None`` to keep every key.
        batch, head: the entry that is asked for.

    Raises:
        ValueError: there is no query ``i``.
        TypeError: ``i`` is no int.
    """
    i = check_count("query", i, least=0)
    if i >= n:
        raise ValueError(f"query must be at least 0 and below {n}, got {i}")
    first, last = (int(end) for end in rule.keys(batch, head, i))
    position = int(rule.query_position(batch, head, i))
    start = max(first, 0)
    slots = torch.arange(start, max(min(last + 1, n_keys), start), device="cpu")
    struck = slots[:0]
    if key_mask is not None:
        kept = key_mask[slots]
        slots, struck = slots[kept], slots[~kept]
    if len(slots):
        query = torch.tensor(i, device="cpu")
        own = rule.seen_position(batch, head, query, slots) == position
        included = "included" if bool(own.any()) else "not among them"
        count = "1 key" if len(slots) == 1 else f"{len(slots):,} keys"
        lines = [f"query {i} sees {count}: {_listed(slots)}, the query's own {included}"]
    else:
        lines = [f"query {i} sees no key: attention gives zeros"]
    if len(struck):
        lines.append(f"hidden by the key mask: {_listed(struck)}")
    if rule.is_window:
        lines += _place(rule.window, i, "tokens")
        lines += _cut(first, last, n_keys)
    elif rule.window is not None and position != i:
        lines.append(f"its position is {position}")
        lines += _place(rule.window, position, "positions")
    return QueryWords("\n".join(lines))


def _place(window: Window, position: int, counted: str) -> list[str]:
    """The window that a query stands in, unless the window slides with it."""
    if window.exact or position < 0:
        return []
    number, place = divmod(position, window.size)
    start = number * window.size
    return [
        f"it stands in window {number}, {counted} {start} to {start + window.size - 1}, "
        f"as token {place} of it"
    ]


def _cut(first: int, last: int, n_keys: int) -> list[str]:
    """What the ends of the sequence take away from the interval."""
    before, after = -first, last - (n_keys - 1)
    cut = [f"{before:,} before its start"] if before > 0 else []
    cut += [f"{after:,} after its end"] if after > 0 else []
    return [f"cut off by the sequence's ends: {' and '.join(cut)}"] if cut else []


def _listed(slots: Tensor) -> str:
    """Intervals of neighbouring slots: ``3 to 7, 9``."""
    breaks = (slots.diff() != 1).nonzero().flatten() + 1
    starts = torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), breaks))
    stops = torch.cat((breaks, torch.tensor([len(slots)], device="cpu")))
    shown = zip(starts[:_MOST_INTERVALS].tolist(), stops[:_MOST_INTERVALS].tolist(), strict=True)
    ends = [(int(slots[start]), int(slots[stop - 1])) for start, stop in shown]
    words = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in ends)
    more = len(starts) - len(ends)
    if more:
        words += f" and {more} more interval{'s' if more > 1 else ''} up to {int(slots[-1])}"
    return words
