"""The rules of local attention: which keys a query sees, and what is done to its scores.

They import torch and nothing of the layer. ``window`` holds the arithmetic; ``rule`` says what
every rule offers and makes its mask_mod; ``blocks`` makes its BlockMask; ``segments`` lays keys
out for xpos; ``keys``, ``itself``, ``scores`` and ``dropout`` hold the rules beside the window;
``presets`` holds the windows of real models. The pictures and numbers of a mask are in ``view``,
which loads when a name of it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .blocks import EMPTY, FULL, PARTIAL, block_mask
from .itself import but_itself_mod, ends_alone, itself_last
from .keys import padding_mod
from .presets import PRESETS, Preset, preset
from .rule import Reach, Rule, mask_mod
from .scores import in_turn, window_bias
from .segments import Segments
from .window import Window

if TYPE_CHECKING:
    from .view.block_map import BlockMap
    from .view.description import Description
    from .view.heat import bias_map, heat_map
    from .view.picture import MaskPicture, inspect

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "PRESETS",
    "BlockMap",
    "Description",
    "MaskPicture",
    "Preset",
    "Reach",
    "Rule",
    "Segments",
    "Window",
    "bias_map",
    "block_mask",
    "but_itself_mod",
    "ends_alone",
    "heat_map",
    "in_turn",
    "inspect",
    "itself_last",
    "mask_mod",
    "padding_mod",
    "preset",
    "window_bias",
]

_VIEWS = {
    "BlockMap": "block_map",
    "Description": "description",
    "MaskPicture": "picture",
    "bias_map": "heat",
    "heat_map": "heat",
    "inspect": "picture",
}
"""The public names of ``view`` and their files there."""


def __getattr__(name: str) -> Any:
    if name not in _VIEWS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".view.{_VIEWS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_VIEWS])
