"""One query in words: which keys it sees, which of its window are hidden."""

from typing import TYPE_CHECKING

import torch

from .arguments import check_count
from .clip import at_least, at_most
from .window import Window

if TYPE_CHECKING:
    from .picture import MaskPicture

_MOST_RUNS = 8


def query_words(picture: "MaskPicture", i: int) -> str:
    """Which keys query ``i`` sees, in words."""
    check_count("query", i, least=0)
    if i >= picture.n:
        raise ValueError(f"query must be at least 0 and below {picture.n}, got {i}")
    rule = picture.rule
    first = at_least(rule.first_key(i), 0)
    last = at_most(rule.last_key(i), picture.n_keys - 1)
    lines = []
    keys = torch.arange(first, max(last + 1, first), device="cpu")
    struck = keys[:0]
    if picture.key_mask is not None:
        kept = picture.key_mask[keys]
        keys, struck = keys[kept], keys[~kept]
    if len(keys):
        own = i in rule.key_position(torch.tensor(i, device="cpu"), keys).tolist()
        count = "1 key" if len(keys) == 1 else f"{len(keys):,} keys"
        included = "included" if own else "not among them"
        lines.append(f"query {i} sees {count}: {_listed(keys)}, the query's own {included}")
    else:
        lines.append(f"query {i} sees no key: attention gives zeros")
    if len(struck):
        lines.append(f"hidden by the key mask: {_listed(struck)}")
    if isinstance(rule, Window):
        if not rule.exact:
            lines.append(_place(rule, i))
        lines += _cut(rule, i, picture.n_keys)
    return "\n".join(lines)


def _place(window: Window, i: int) -> str:
    number, place = divmod(i, window.size)
    start = number * window.size
    return (
        f"it stands in window {number}, tokens {start} to {start + window.size - 1}, "
        f"as token {place} of it"
    )


def _cut(window: Window, i: int, n_keys: int) -> list[str]:
    """What the ends of the sequence take away."""
    before, after = -window.first_key(i), window.last_key(i) - (n_keys - 1)
    cut = [f"{count:,} before its start" for count in (before,) if count > 0]
    cut += [f"{count:,} after its end" for count in (after,) if count > 0]
    return [f"cut off by the sequence's ends: {' and '.join(cut)}"] if cut else []


def _listed(keys: torch.Tensor) -> str:
    """Runs of neighbouring keys: ``3 to 7, 9``."""
    breaks = (keys.diff() != 1).nonzero().flatten() + 1
    starts = torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), breaks))
    stops = torch.cat((breaks, torch.tensor([len(keys)], device="cpu")))
    runs = [
        (int(keys[a]), int(keys[b - 1]))
        for a, b in zip(starts[:_MOST_RUNS].tolist(), stops[:_MOST_RUNS].tolist(), strict=True)
    ]
    words = [f"{a}" if a == b else f"{a} to {b}" for a, b in runs]
    more = len(starts) - len(runs)
    return ", ".join(words) + (f" and {more} more runs up to {int(keys[-1])}" if more else "")
