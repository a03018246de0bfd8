"""Heat maps: attention weights over tokens, and a bias over its window.

Both show where the rule lets nothing through: hidden places are hatched, not the colour
of 0.
"""

import torch
from torch import Tensor

from ..spans import from_spans
from ..window import Window
from .counting import bounds_of
from .drawing import lines_of
from .sheet import File, Sheet

_HIDDEN, _LINES = "#dddddd", "#b8b8b8"
_MOST_TOKENS = 1024
_ROWS = 512


def heat_map(weights: Tensor, window: Window, file: File, *, dense: bool = False) -> None:
    """Writes a PNG of attention weights, as ``LocalAttention.attention_map`` gives them.

    Up to 1024 tokens are drawn query by key. A longer map keeps the windowed layout, key places
    in the query's windows across, and its rows are means of neighbouring queries.

    Args:
        weights: ``(n, window.span)`` of one head, or ``(n, n)`` with ``dense``.
        window: the rule they come from.
        file: a path or a binary file.
        dense: a column is a key, not a place in the query's windows.

    Raises:
        ValueError: another shape; choose one head.
        ModuleNotFoundError: matplotlib is missing; the message says what to install.
    """
    n = weights.shape[0] if weights.dim() else 0
    if n < 1 or tuple(weights.shape) != (n, n if dense else window.span):
        wanted = "(n, n), dense" if dense else f"(n, {window.span})"
        raise ValueError(
            f"weights must have the shape {wanted}, those of one head, got {tuple(weights.shape)}"
        )
    values = weights.detach().double().cpu()
    query, key = torch.arange(n, device="cpu")[:, None], torch.arange(n, device="cpu")
    subtitle, side = f"{window.reach.label}, {n} queries, {n} keys", "key"
    if not dense and n <= _MOST_TOKENS:
        values = from_spans(values, window)
    elif not dense:
        key = window.span_start(query) + torch.arange(window.span, device="cpu")
        subtitle = f"{window.reach.label}, {n} queries, by place in the query's windows"
        side = "key's place in the query's windows"
    inside = _sees(window, query, key) & (key >= 0) & (key < n)
    values = values.masked_fill(~inside, torch.nan)
    step = 1
    if len(values) > _MOST_TOKENS:
        step = -(-n // _ROWS)
        values = torch.stack([part.nanmean(0) for part in values.split(step)])
        subtitle += f", means of {step} queries"
    _draw(values, n, window, "Attention weights", subtitle, ("query", side), file, signed=False)


def bias_map(bias: Tensor, window: Window, file: File) -> None:
    """Writes a PNG of a bias over its window; a key that -inf hides is drawn as hidden.

    Args:
        bias: ``(W, window.span)``, one head of an ``attn_bias``.
        window: the rule that it is for.
        file: a path or a binary file.

    Raises:
        ValueError: another shape; choose one head.
        ModuleNotFoundError: matplotlib is missing; the message says what to install.
    """
    if tuple(bias.shape) != (window.size, window.span):
        raise ValueError(
            f"bias must have the shape ({window.size}, {window.span}), one head of an attn_bias, "
            f"got {tuple(bias.shape)}"
        )
    query = torch.arange(window.size, device="cpu")[:, None]
    key = window.span_start(query) + torch.arange(window.span, device="cpu")
    values = bias.detach().double().cpu()
    hidden = ~_sees(window, query, key) | (values == -torch.inf)
    values = values.masked_fill(hidden, torch.nan)
    sides = "query's place in its window", "key's place in the query's windows"
    _draw(
        values, window.size, window, "Bias over its window", window.reach.label, sides, file, True
    )


def _sees(window: Window, query: Tensor, key: Tensor) -> Tensor:
    first, last = bounds_of(window, query)
    return (first <= key) & (key <= last)


def _draw(
    values: Tensor,
    rows: int,
    window: Window,
    title: str,
    subtitle: str,
    sides: tuple[str, str],
    file: File,
    signed: bool,
) -> None:
    columns = values.shape[1]
    sheet = Sheet(rows, columns, title, subtitle)
    with sheet.style():
        from matplotlib.patches import Patch, Rectangle

        seen = values[~values.isnan()]
        most = float(seen.abs().max()) if len(seen) else 1.0
        image = sheet.axes.imshow(
            values.numpy(),
            extent=(0, columns, rows, 0),
            interpolation="nearest",
            aspect="auto",
            cmap="PuOr" if signed else "viridis",
            vmin=-most if signed else 0.0,
            vmax=most or 1.0,
        )
        ground = Rectangle(
            (0, 0), columns, rows, facecolor=_HIDDEN, edgecolor=_LINES, hatch="////", zorder=-1
        )
        sheet.axes.add_patch(ground)
        sheet.edges(lines_of(window.size, (rows, columns)))
        sheet.label(sides[1], sides[0], window.size, offset=0.5)
        sheet.scale(image)
        sheet.legend([(Patch(facecolor=_HIDDEN, edgecolor=_LINES, hatch="////"), "hidden")])
        drawn = values.nan_to_num(nan=-1e30).round(decimals=3).tolist()
        sheet.save(file, ["heat", drawn], colors=256)
