"""``python -m flexlocal mask``: which keys each query sees, before and after blocks."""

import re
from pathlib import Path

import torch
from torch import Tensor

from .. import masks
from ..masks import PRESETS, MaskPicture, Window, inspect

_BLOCK = 128


class CannotShow(Exception):
    """What was asked for cannot be shown; the message says why."""


def run(
    *,
    window: int | None,
    preset: str | None,
    list: bool,
    causal: bool,
    look_backward: int | None,
    look_forward: int | None,
    exact: bool,
    autopad: bool,
    length: int | None,
    hide: str | None,
    blocks: int | None,
    query: int | None,
    png: str | None,
    html: str | None,
) -> int:
    """Show what the flags ask for and return the exit status.

    Raises:
        CannotShow: flags that do not fit together, or a file that cannot be written.
    """
    if list:
        print("\n\n".join(str(found) for found in PRESETS.values()))
        return 0
    try:
        said = []
        if preset is not None:
            if causal or exact or look_backward is not None or look_forward is not None:
                raise CannotShow(
                    "argument --preset: brings its own window, drop flags that shape one"
                )
            found = masks.preset(preset)
            if query is None:  # one query's answer stands alone
                said.append(f"{found}\n")
            shape, autopad = found.window, True  # a model takes any length
        else:
            assert window is not None
            back = 1 if look_backward is None else look_backward
            shape = Window(window, causal, back, look_forward, exact)
        n = 4 * shape.size if length is None else length
        if n % shape.size and not autopad:
            raise CannotShow(
                f"argument --len: must be a multiple of --window {shape.size} without --autopad, "
                f"got {n}"
            )
        if query is not None and query >= n:
            raise CannotShow(f"argument --query: must be below --len {n}, got {query}")
        picture = inspect(
            shape, n, key_mask=_key_mask(hide, n), block_size=_BLOCK if blocks is None else blocks
        )
        said += _shown(picture, blocks is not None, query)
        said += _written(picture, blocks is not None, png, html)
    except (ValueError, ModuleNotFoundError) as error:
        raise CannotShow(str(error)) from error
    except RuntimeError as error:  # of torch's allocator, there is no other
        raise CannotShow(f"too large for memory: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise CannotShow(f"cannot write {error.filename}: {error.strerror}") from error
    print("\n".join(said))
    return 0


def _key_mask(hide: str | None, n: int) -> Tensor | None:
    """False for the keys of ``3,8-11``."""
    if hide is None:
        return None
    mask = torch.ones(n, dtype=torch.bool)
    for part in hide.split(","):
        run = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(run[1]), int(run[2] or run[1])) if run else (n, n)
        if not first <= last < n:
            raise CannotShow(
                f"argument --hide: must be keys below {n}, as 3,8-11, got {part.strip()!r}"
            )
        mask[first : last + 1] = False
    return mask


def _shown(picture: MaskPicture, blocks: bool, query: int | None) -> list[str]:
    if query is not None:
        return [picture.query(query)]
    return [str(picture.blocks if blocks else picture), "", picture.describe().numbers()]


def _written(picture: MaskPicture, blocks: bool, png: str | None, html: str | None) -> list[str]:
    said = []
    if png is not None:
        (picture.blocks if blocks else picture).png(png)
        said.append(f"wrote {png}")
    if html is not None:
        Path(html).write_text(picture.html(), encoding="utf-8")
        said.append(f"wrote {html}")
    return said
