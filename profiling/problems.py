"""What is measured: the standard problems, and others of the same kind.

Sizes are those at which the peers' figures are known; operations and bytes, from which ``timing``
makes the floors, follow from the sizes alone.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexlocal import Window


@dataclass(frozen=True)
class Problem:
    """One call of local attention, forward and backward.

    Attributes:
        name: an identifier.
        batch, heads, n, d: the sizes of query, key and value, ``(batch, heads, n, d)``.
        window: which keys a query sees.
        words: what it stands for.
        rotary: whether q and k are rotated first; the bounds below leave that out.
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
        return f"{self.name}: {self.batch} x {self.heads} x {self.n} x {self.d}"

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, ours and the documented layer's alike, without rotary."""
        return {
            "window_size": self.window.size,
            "causal": self.window.causal,
            "look_backward": self.window.look_backward,
            "look_forward": self.window.look_forward,
            "exact_windowsize": self.window.exact,
            "autopad": True,
            "dropout": 0.0,
        }

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, in all heads and batch entries."""
        query = torch.arange(self.n)
        first = self.window.first_key(query).clamp(min=0)
        last = self.window.last_key(query).clamp(max=self.n - 1)
        return self.batch * self.heads * int((last - first + 1).clamp(min=0).sum())

    def flops(self, train: bool) -> int:
        """Floating-point operations in products over the pairs: 2 forward, 5 more backward."""
        return (7 if train else 2) * 2 * self.d * self.pairs

    def traffic(self, dtype: torch.dtype, train: bool) -> int:
        """Bytes read and written once: q, k, v and the output; training also reads these and the
        output's gradient, and writes three gradients."""
        tensor = self.batch * self.heads * self.n * self.d * dtype.itemsize
        return (4 + 8 if train else 4) * tensor

    def floors(self, rates: dict[str, float], dtype: torch.dtype, train: bool) -> dict[str, float]:
        """Milliseconds at ``timing.measure_rates`` for the bytes and for the operations alone."""
        return {
            "memory_ms": 1e3 * self.traffic(dtype, train) / rates["copy"],
            "arithmetic_ms": 1e3 * self.flops(train) / rates["product"],
        }

    def tensors(
        self, dtype: torch.dtype, device: torch.device | str, *, views: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, which want a gradient, and the output's gradient, random.

        Args:
            views: ``(batch, n, heads, d)`` in memory, as a projection leaves them, seen as
                ``(batch, heads, n, d)``.
        """
        generator = torch.Generator(device).manual_seed(0)

        def draw() -> Tensor:
            shape = (self.batch, self.n, self.heads, self.d) if views else self.shape
            x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
            return x.transpose(1, 2) if views else x

        q, k, v = (draw().requires_grad_() for _ in range(3))
        return q, k, v, draw()

    def scaled(self, n: int, batch: int = 1, heads: int = 2) -> "Problem":
        """The same window on a shorter sequence, to check results on."""
        return replace(self, n=n, batch=batch, heads=heads)


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("doc256", 4, 16, 16384, 64, Window(256, True), "the documented default"),
        Problem("slide256", 4, 16, 16384, 64, Window(256, True, exact=True), "256 keys back"),
        Problem("encoder64", 8, 12, 8192, 64, Window(64, exact=True), "64 each side: ModernBERT"),
        Problem("slide1k", 1, 32, 32768, 128, Window(1024, True, exact=True), "as Gemma 3"),
        Problem("slide4k", 1, 32, 32768, 128, Window(4096, True, exact=True), "as Mistral"),
        Problem("cpu", 1, 8, 4096, 64, Window(128, True), "for a processor without a GPU"),
        Problem("tiny", 1, 2, 256, 16, Window(32, True), "to see that the scripts run"),
    )
}
"""By name; the first five are the standard ones."""

STANDARD = tuple(PROBLEMS)[:5]
