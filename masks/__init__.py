"""Rules of local attention: which keys a query sees, and FlexAttention's block masks of it.

They import torch and nothing of the layer. ``window`` holds the rule of the layer and ``rule`` what
every rule is; ``placed`` holds a window over ``documents`` and offsets; ``block_lists`` makes a
BlockMask by formula; ``key_layout`` copies keys for xpos; ``keys`` hides padding; ``presets`` holds
the windows of real models. The pictures and numbers of a mask are in ``view``, which loads when a
name of it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .block_lists import EMPTY, FULL, PARTIAL, block_mask
from .documents import documents_from_cu_seqlens, documents_from_positions
from .key_layout import KeyLayout
from .keys import padding_mod
from .presets import PRESETS, Preset, preset
from .rule import Reach, Rule, mask_mod
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
    "KeyLayout",
    "MaskPicture",
    "Preset",
    "Reach",
    "Rule",
    "Window",
    "bias_map",
    "block_mask",
    "documents_from_cu_seqlens",
    "documents_from_positions",
    "heat_map",
    "inspect",
    "mask_mod",
    "padding_mod",
    "preset",
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
