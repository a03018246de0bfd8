"""``compare_logits``: whether a model computes the same by another implementation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .registry import NAME


class Comparison(NamedTuple):
    """Two runs of one model on the same input, padding left out.

    Attributes:
        implementation, other: the two implementations.
        apart: largest absolute difference of two logits, or of two hidden states in models that
            give no logits.
        size: largest absolute value of the other's.
        agreement: share of tokens whose highest logit is the same.
    """

    implementation: str
    other: str
    apart: float
    size: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"{self.implementation} and {self.other}: at most {self.apart:.1e} apart, of "
            f"{self.size:.1e}; the highest is the same for {self.agreement:.2%} of the tokens"
        )


@torch.no_grad()
def compare_logits(
    model: Any, inputs: Mapping[str, Any], *, implementation: str = NAME, other: str = "eager"
) -> Comparison:
    """Runs ``model`` on ``inputs`` by two implementations, without gradients.

    The model's mode and implementation are as before afterwards. In training mode dropout makes the
    two differ.

    Args:
        model: a model of Transformers.
        inputs: its keyword arguments, as a tokenizer makes them. What ``attention_mask`` hides is
            left out.
        implementation, other: names of implementations; flexlocal's must be registered.

    Raises:
        ValueError: the two results differ in shape.
    """
    before = model.config._attn_implementation
    try:
        ours, theirs = (_run(model, inputs, name) for name in (implementation, other))
    finally:
        model.set_attn_implementation(before)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{implementation} and {other} must give one shape, got {tuple(ours.shape)} and "
            f"{tuple(theirs.shape)}"
        )
    kept = inputs.get("attention_mask")
    if isinstance(kept, Tensor) and kept.shape == ours.shape[:2]:
        ours, theirs = ours[kept.bool()], theirs[kept.bool()]
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    apart = (ours.double() - theirs.double()).abs().max().item()
    return Comparison(implementation, other, apart, theirs.abs().max().item(), same)


def _run(model: Any, inputs: Mapping[str, Any], implementation: str) -> Tensor:
    model.set_attn_implementation(implementation)
    found = model(**inputs)
    logits = getattr(found, "logits", None)
    result: Tensor = found.last_hidden_state if logits is None else logits
    return result
