"""A call of ``local_attention`` as one value: what it is given, by the same names."""

from dataclasses import dataclass
from operator import index
from typing import Any, Literal

from torch import Tensor

from .masks import Window
from .rotary import Rotary, Xpos

BackendName = Literal["auto", "flex", "eager"]


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of ``local_attention``, which says what each is."""

    q: Tensor
    k: Tensor
    v: Tensor
    window: Window
    mask: Tensor | None = None
    attn_bias: Tensor | None = None
    scale: float | None = None
    shared_qk: bool = False
    dropout: float = 0.0
    dropout_seed: Tensor | None = None
    rotary: Rotary | None = None
    backend: BackendName = "auto"
    kernel_options: dict[str, Any] | None = None

    @property
    def factor(self) -> float:
        """``scale`` with its default filled in."""
        # index has a compiler settle on a number: kernels take no power of an open size.
        if self.scale is None:
            default: float = index(self.q.shape[-1]) ** -0.5
            return default
        return float(index(self.scale)) if isinstance(self.scale, int) else self.scale

    @property
    def inv_freq(self) -> Tensor | None:
        """Frequencies of the rotation, None without one."""
        return None if self.rotary is None else self.rotary.inv_freq

    @property
    def xpos(self) -> Xpos | None:
        """xpos's tables, None without it."""
        return None if self.rotary is None else self.rotary.xpos
