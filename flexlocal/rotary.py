"""``Rotary``: the frequencies of rotary position embeddings, and xpos's decay.

Rotary: Su et al., RoFormer, arXiv:2104.09864. xpos: Sun et al., A Length-Extrapolatable
Transformer, arXiv:2212.10554, section 3.2. The buffers are those of the documented module, so its
checkpoints load. Shapes: ``n`` tokens, ``d`` the head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .masks.arguments import check_above_zero, check_count, check_flag
from .torch_limits.kernels import has_float64
from .xpos import decay_of, pairs_of


class Rotary(nn.Module):
    """Holds the frequencies; ``rotation`` turns queries and keys by them.

    Args:
        dim: head size, an even int.
        use_xpos: scale queries and keys by their distance as well.
        scale_base: tokens per unit of xpos's exponent; needed with ``use_xpos``.
        theta: base of the frequencies, ``theta ** (-2c / dim)`` for the pair ``c`` of channels.

    Buffers, always fp32, whatever the default dtype is and whatever the module is cast to:
        inv_freq: ``(dim / 2,)``, saved in checkpoints. Loading one that was rounded to 16 bits
            restores the exact frequencies.
        scale: ``(dim / 2,)``, xpos's decay per channel, not saved.

    Raises:
        ValueError: ``dim`` is odd or below 2, or ``scale_base`` is missing with ``use_xpos``; or
            that or ``theta`` is not above 0 or not finite.
        TypeError: ``dim`` is no int, ``use_xpos`` no flag, or one of the others no number.
    """

    inv_freq: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: int,
        use_xpos: bool = False,
        scale_base: float | None = None,
        *,
        theta: float = 10000.0,
    ) -> None:
        super().__init__()
        dim = check_count("dim", dim, least=2)
        if dim % 2:
            raise ValueError(f"dim must be even for rotary embeddings, got {dim}")
        use_xpos = check_flag("use_xpos", use_xpos)
        if scale_base is not None:
            scale_base = check_above_zero("scale_base", scale_base)
        elif use_xpos:
            raise ValueError("scale_base must be given with use_xpos, got None")
        theta = check_above_zero("theta", theta)
        self.dim, self.use_xpos, self.scale_base, self.theta = dim, use_xpos, scale_base, theta
        self.register_buffer("inv_freq", torch.empty(dim // 2, dtype=torch.float32))
        self.register_buffer("scale", torch.empty(dim // 2, dtype=torch.float32), persistent=False)
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_exact_again)  # type: ignore[no-untyped-call]

    def reset_parameters(self) -> None:
        """Fills the buffers: at construction, and after ``to_empty`` from the meta device."""
        for buffer, exact in zip(
            (self.inv_freq, self.scale), _tables(self.dim, self.theta), strict=True
        ):
            buffer.copy_(exact)

    def forward(self, keys: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Angles and xpos's factors of keys, as the documented module's ``rel_pos`` gives them.

        Args:
            keys: ``(..., n, d)``; its length and device count, not its values.
            positions: integer ``(..., n)``, 0 to ``n - 1`` by default.

        Returns:
            fp32 ``(..., n, dim)`` angles, the same in both halves, and the factors of queries, of
            the same shape: those of keys are their inverses. ``torch.ones(1)`` without xpos.
        """
        n = keys.shape[-2]
        if positions is None:
            positions = torch.arange(n, device=keys.device)
        wide = torch.float64 if has_float64(keys.device) else torch.float32
        angle = positions.to(wide)[..., None] * self.inv_freq.to(wide)
        angle = torch.cat((angle, angle), dim=-1).float()
        if not self.use_xpos:
            return angle, torch.ones(1, device=keys.device)
        assert self.scale_base is not None
        power = (positions - n // 2).to(wide) / self.scale_base
        factors = self.scale.to(wide) ** power[..., None]
        return angle, torch.cat((factors, factors), dim=-1).float()

    def extra_repr(self) -> str:
        xpos = f", xpos base {self.scale_base}" if self.use_xpos else ""
        theta = f", theta={self.theta}" if self.theta != 10000 else ""
        return f"dim={self.dim}{theta}{xpos}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        # `.to(torch.bfloat16)` would round the frequencies: follow the device, keep the dtype.
        kept = {"inv_freq": self.inv_freq, "scale": self.scale}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in kept.items():
            moved = getattr(self, name)
            if moved.dtype != exact.dtype:
                setattr(self, name, exact.to(moved.device))
        return self


def _tables(dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """The frequencies and xpos's decay, fp32 on the CPU."""
    return (theta ** -(pairs_of(dim) / dim)).float(), decay_of(dim)


def _exact_again(rotary: Rotary, saved: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Restores a checkpoint's rounded frequencies to exact fp32 before it is loaded.

    ``load_state_dict(assign=True)`` takes the saved tensors as they are. It also brings layers from
    the meta device, except for xpos's decay, which no checkpoint holds: that is filled in here.
    """
    name = f"{prefix}inv_freq"
    found = saved.get(name)
    if not isinstance(found, Tensor) or found.is_meta:
        return  # load_state_dict says what is wrong
    exact, decay = (table.to(found.device) for table in _tables(rotary.dim, rotary.theta))
    if found.dtype != torch.float32:
        saved[name] = exact if torch.equal(exact.to(found.dtype), found) else found.float()
    if rotary.scale.is_meta:
        rotary.scale = decay
