"""The rules of local attention: which keys a query sees, and what is done to its scores.

They import torch and nothing of the layer. ``window`` holds the arithmetic; ``rule`` says what
every rule offers and makes its mask_mod; ``blocks`` makes its BlockMask; ``segments`` lays keys
out for xpos; ``keys``, ``itself``, ``scores`` and ``dropout`` hold the rules beside the window.
``picture`` shows a rule as text, PNG, HTML and numbers, ``block_map`` its blocks, ``presets`` the
windows of real models.
"""

from .block_map import BlockMap
from .blocks import EMPTY, FULL, PARTIAL, block_mask
from .description import Description
from .heat import bias_map, heat_map
from .itself import but_itself_mod, ends_alone, itself_last
from .keys import padding_mod
from .picture import MaskPicture, inspect
from .presets import PRESETS, Preset, preset
from .rule import Rule, mask_mod
from .scores import in_turn, window_bias
from .segments import Segments
from .window import Window

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "PRESETS",
    "BlockMap",
    "Description",
    "MaskPicture",
    "Preset",
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
