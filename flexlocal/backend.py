"""Which path a call takes, and why."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from . import flex
from .masks import Window
from .rotary import Rotary

BackendName = Literal["auto", "flex", "eager"]


@dataclass(frozen=True)
class Choice:
    """The path that a call takes.

    Attributes:
        backend: ``"flex"`` or ``"eager"``.
        reason: why, in a line.
        flash: the fused kernel is FlashAttention 4's instead of Triton's.
    """

    backend: Literal["flex", "eager"]
    reason: str
    flash: bool = False

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


_KERNEL = {False: "", True: ", FlashAttention 4's: measured to be faster at this size"}


def choose(
    backend: BackendName,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    bias: Tensor | None,
    dropout: float,
    rotary: Rotary | None,
    flash: bool,
) -> Choice:
    """The path for a call with these arguments.

    Args:
        flash: take FlashAttention 4's kernel for the fused path, see ``flex.prefers_flash``.

    Raises:
        ValueError: ``backend="flex"`` where the fused kernel cannot run; says why.
    """
    if backend == "eager":
        return Choice("eager", "asked for by name")
    if backend == "auto" and q.device.type != "cuda":
        reason = f"auto takes the fused kernel on a GPU, and q is on {q.device.type}"
        return Choice("eager", reason)
    refusal = flex.refusal(q, k, v, window, bias, dropout, rotary)
    if refusal is None:
        words = "one fused kernel on the GPU" if backend == "auto" else "asked for by name"
        return Choice("flex", words + _KERNEL[flash], flash)
    if backend == "auto":
        return Choice("eager", refusal)
    raise ValueError(
        f"backend 'flex' cannot run this call: {refusal}. backend must be 'auto' or 'eager' here"
    )
