"""Which path a call takes, and why."""

from dataclasses import dataclass
from typing import Literal

from . import flex
from .call import Call
from .tuning import prefers_flash


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


def choose(call: Call) -> Choice:
    """The path for a call whose arguments fit.

    Raises:
        ValueError: ``backend="flex"`` where the fused kernel cannot run; says why.
    """
    if call.backend == "eager":
        return Choice("eager", "asked for by name")
    device = call.q.device.type
    if call.backend == "auto" and device != "cuda":
        refusal: str | None = f"auto takes the fused kernel on a GPU, and q is on {device}"
    else:
        refusal = flex.refusal(call)
    if refusal is None:
        flash = prefers_flash(call)
        words = "one fused kernel on the GPU" if call.backend == "auto" else "asked for by name"
        return Choice("flex", words + _KERNEL[flash], flash)
    if call.backend == "auto":
        unused = call.kernel_options is not None
        more = "; kernel_options have no kernel to go to" if unused else ""
        return Choice("eager", refusal + more)
    raise ValueError(
        f"backend 'flex' cannot run this call: {refusal}. backend must be 'auto' or 'eager' here"
    )
