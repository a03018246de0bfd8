"""Functions of one score, as FlexAttention takes them, with their derivatives."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""From a score, batch entry, head, query and key index to the score that takes its place."""


@dataclass(frozen=True)
class Mod:
    """A function of a score, and its derivative.

    Attributes:
        value: the score that takes the place of a score.
        gradient: the score's gradient. It takes the gradient of ``value``, then the arguments of
            ``value``. None where the score's gradient is that of ``value``.
    """

    value: ScoreMod
    gradient: Callable[..., Tensor] | None = None


def in_turn(*score_mods: ScoreMod) -> ScoreMod | None:
    """One score_mod that applies all of them, first to last; None for none."""
    if not score_mods:
        return None

    def apply(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        for score_mod in score_mods:
            score = score_mod(score, batch, head, query, key)
        return score

    return apply
