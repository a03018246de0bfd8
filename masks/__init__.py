"""The rules of local attention: which keys a query sees, and what is done to its scores.

They import torch and nothing of the layer. ``window`` holds the arithmetic; ``rule`` says what
every rule offers and makes its mask_mod; ``blocks`` makes its BlockMask; ``segments`` lays keys
out for xpos; ``keys``, ``scores`` and ``dropout`` hold the rules beside the window.
"""

from .blocks import EMPTY, FULL, PARTIAL, block_mask
from .keys import padding_mod
from .rule import Rule, mask_mod
from .scores import drop_scores, in_turn, self_token, window_bias
from .segments import Segments
from .window import Window

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Rule",
    "Segments",
    "Window",
    "block_mask",
    "drop_scores",
    "in_turn",
    "mask_mod",
    "padding_mod",
    "self_token",
    "window_bias",
]
