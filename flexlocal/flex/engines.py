"""Whose kernels serve a call on the flex path: the fastest by measurement."""

from typing import Literal

from ..spec import Inputs, Spec
from . import dense, flash
from .flash import Way

Engine = Literal["flex", "dense"] | Way
"""FlexAttention's own kernels, ``scaled_dot_product_attention`` over all pairs of tokens, or
FlashAttention 4's in one of two ways."""


def preferred(spec: Spec, inputs: Inputs) -> tuple[Engine, str | None]:
    """Whose kernels are to be called.

    Returns:
        That, and what is wrong with an install of FlashAttention 4 that would be faster.
    """
    if dense.serves(spec, inputs):
        return "dense", None
    way, fault = flash.preferred(spec, inputs)
    return way or "flex", fault
