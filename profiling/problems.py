"""What is measured: the standard problems, and others of the same kind.

Sizes are those at which the peers' figures are known.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexlocal import Window


@dataclass(frozen=True)
class Problem:
    """One call of local attention on ``(batch, heads, n, d)``; ``words`` say what it stands for.

    With ``rotary`` q and k are rotated first.
    """

    name: str
    batch: int
    heads: int
    n: int
    d: int
    window: Window
    words: str = ""
    rotary: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, n, d)``."""
        return self.batch, self.heads, self.n, self.d

    @property
    def label(self) -> str:
        """Name and sizes, for a table."""
        return f"{self.name}: {' x '.join(map(str, self.shape))}"

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, ours and the documented layer's alike, without rotary."""
        window = self.window
        looks = {"look_backward": window.look_backward, "look_forward": window.look_forward}
        flags = {"causal": window.causal, "exact_windowsize": window.exact, "autopad": True}
        return {"window_size": window.size, "dropout": 0.0, **looks, **flags}


@dataclass(frozen=True)
class Task:
    """A problem and how it is to be measured: ``seconds`` are of timed calls, each.

    With ``views`` tensors are ``(batch, n, heads, d)`` in memory, as a projection leaves them, seen
    as ``(batch, heads, n, d)``.
    """

    problem: Problem
    dtype: torch.dtype
    device: torch.device
    seconds: float = 0.3
    views: bool = False
    train: bool = True

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, which want a gradient, and the output's gradient, random."""
        batch, heads, n, d = self.problem.shape
        shape = (batch, n, heads, d) if self.views else (batch, heads, n, d)
        torch.manual_seed(0)
        made = torch.randn((4, *shape), dtype=self.dtype, device=self.device)
        *qkv, grad = (x.transpose(1, 2) if self.views else x for x in made)
        return *(x.detach().requires_grad_() for x in qkv), grad


_ALL = (
    Problem("doc256", 4, 16, 16384, 64, Window(256, True), "the documented default"),
    Problem("slide256", 4, 16, 16384, 64, Window(256, True, exact=True), "256 keys back"),
    Problem("encoder64", 8, 12, 8192, 64, Window(64, exact=True), "64 each side: ModernBERT"),
    Problem("slide1k", 1, 32, 32768, 128, Window(1024, True, exact=True), "as Gemma 3"),
    Problem("slide4k", 1, 32, 32768, 128, Window(4096, True, exact=True), "as Mistral"),
    Problem("cpu", 1, 8, 4096, 64, Window(128, True), "for a processor without a GPU"),
    Problem("tiny", 1, 2, 256, 16, Window(32, True), "to see that the scripts run"),
)
PROBLEMS = {problem.name: problem for problem in _ALL}
STANDARD = tuple(PROBLEMS)[:5]
