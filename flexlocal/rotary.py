"""Rotary position embeddings and xpos, applied to queries and keys before either path.

Rotary: Su et al., RoFormer, arXiv:2104.09864. xpos: Sun et al., A Length-Extrapolatable
Transformer, arXiv:2212.10554, section 3.2. The buffers are those of the documented module, so its
checkpoints load. Shapes: ``n`` tokens, ``d`` the head size.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .angles import angles
from .masks import Rule
from .masks.arguments import check_count, check_flag, check_number
from .masks.key_layout import KeyLayout
from .torch_limits.kernels import has_float64
from .torch_limits.memory import written_out
from .torch_limits.tracing import is_transformed

# xpos's factors lie between 2**-bits and 2**bits. Within _RANGE_BITS of a dtype, scaled queries and
# keys are finite. Within _PRODUCT_BITS, so are the products of queries and keys that they do not
# see: scores are computed before they are hidden.
_RANGE_BITS = {torch.float16: 11}
_WIDE_RANGE_BITS = 64
_PRODUCT_BITS = {torch.float32: 56, torch.float64: 480}

# Bits per unit of xpos's exponent where the decay is steepest: zeta of the first pair of channels.
_STEEPEST = -math.log2(0.4 / 1.4)


@dataclass(frozen=True)
class Xpos:
    """xpos for one call: a factor is ``zeta ** (distance / base)``.

    Attributes:
        zeta: ``(d / 2,)``, the decay of each pair of channels.
        base: tokens per unit of the exponent.
    """

    zeta: Tensor
    base: float

    def scales(
        self, queries: int, before: int, after: int, shift: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Factors of ``queries`` consecutive queries and of the keys around them.

        Distances are from an origin in their middle, which keeps the factors nearest to 1.

        Args:
            before: keys before the first query.
            after: keys after the last query.
            shift: added to the positions of queries, not of keys: ``window.after``.

        Returns:
            ``(queries, d / 2)`` and ``(before + queries + after, d / 2)``. One factor serves both
            channels of a pair.
        """
        origin = (queries + max(after, shift) - before) // 2
        zeta = self.zeta
        if not has_float64(zeta.device):
            zeta = _xpos_decay(2 * zeta.shape[0])
        query = torch.arange(queries, device=zeta.device) + shift - origin
        key = torch.arange(before + queries + after, device=zeta.device) - before - origin
        return self._decay(zeta, query, dtype), self._decay(zeta, -key, dtype)

    def _decay(self, zeta: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
        # In fp64: the error of an fp32 power grows with its exponent on a GPU.
        exponent = position.to(torch.float64)[:, None] / self.base
        factor = (zeta.to(torch.float64) ** exponent).to(dtype)
        return written_out(factor.to(self.zeta.device))


def most_windows(rule: Rule, base: float, dtype: torch.dtype) -> int:
    """Most windows that may share an origin of xpos at ``dtype`` without overflow, at least 1."""
    size: int = rule.window.size
    bits = _RANGE_BITS.get(dtype, _WIDE_RANGE_BITS)
    around = sum(-(-keys // size) for keys in rule.reach.around(size))
    return max(1, int(2 * bits * base / (_STEEPEST * size)) - around)


def xpos_fits(tokens: int, base: float, dtype: torch.dtype) -> bool:
    """Whether so many consecutive tokens may share an origin at ``dtype``, finite."""
    return _bits(tokens, base) <= _RANGE_BITS.get(dtype, _WIDE_RANGE_BITS)


def xpos_products_fit(tokens: int, base: float, dtype: torch.dtype) -> bool:
    """Whether hidden scores among them are finite as well; ``dtype`` is fp32 or fp64."""
    return _bits(tokens, base) <= _PRODUCT_BITS[dtype]


def _bits(tokens: int, base: float) -> float:
    """The largest factor over consecutive tokens, as an exponent of two."""
    return _STEEPEST * tokens / (2 * base)


Table = tuple[Tensor, Tensor]
"""The cosines and sines of positions' angles, ``(..., n, d / 2)`` each."""


def table_of(
    position: Tensor, inv_freq: Tensor, dtype: torch.dtype, factor: Tensor | None = None
) -> Table:
    """The table that turns ``dtype``, in fp32 at least.

    Args:
        position: ``(n,)``, or what broadcasts to the dimensions before the last.
        factor: multiplies both halves of what is turned; ``(n, d / 2)``, or what broadcasts
            likewise.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    angle = angles(position, inv_freq)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    if factor is not None:
        cos, sin = cos * factor, sin * factor
    return written_out(cos), written_out(sin)


def tables_of(
    query: Tensor,
    key: Tensor,
    shift: int,
    inv_freq: Tensor,
    dtype: torch.dtype,
    factors: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Table, Table]:
    """The tables of queries and of keys, computed once where they are the same.

    Args:
        query, key: positions as for ``table_of``; one tensor for both says that they are equal.
        shift: added to the positions of queries.
        factors: of queries and of keys, as for ``table_of``.
    """
    of_keys = table_of(key, inv_freq, dtype, factors[1])
    if query is key and not shift and factors[0] is None:
        return of_keys, of_keys
    return table_of(query + shift if shift else query, inv_freq, dtype, factors[0]), of_keys


def rotate(x: Tensor, table: Table, layout: KeyLayout | None = None) -> Tensor:
    """``x`` ``(..., n, d)`` rotated by a table of its positions, in that table's dtype.

    Args:
        layout: lays ``x`` out in slots first; ``n`` of table and result are then slots.
    """
    cos, sin = table
    if is_transformed():
        return _Turned.forward(x, cos, sin, layout)
    turned: Tensor = _Turned.apply(x, cos, sin, layout)  # type: ignore[no-untyped-call]
    return turned


class _Turned(torch.autograd.Function):
    """Rotates the halves of ``x``, or of its slots, against each other; backward rotates back.

    Inductor makes one pass each way of this, which loads several channels at a time and a table for
    half of them only. Of autograd's own backward pass it makes several: that one adds up the halves
    one by one, and writes every copy of a key before it adds them up.
    """

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, layout: KeyLayout | None) -> Tensor:
        laid_out = x if layout is None else layout.in_slots(x)
        return torch.cat(_turned(laid_out, cos, sin, cos.dtype), dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, cos, sin, ctx.layout = inputs
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        halves = _turned(grad, cos, -sin, ctx.dtype)
        if ctx.layout is not None:  # before `cat`, whose result Inductor would write to memory
            halves = tuple(ctx.layout.from_slots(half) for half in halves)
        return torch.cat(halves, dim=-1), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Both halves of ``x``, rotated in ``cos``'s dtype, each a tensor of its own in ``dtype``."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


def check_above_zero(name: str, value: float, wanted: str = "a number") -> float:
    """``value``, returned plain, is a finite number above 0; ``name`` is the caller's argument."""
    value = check_number(name, value, wanted)
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and above 0, got {value}")
    return value


class Rotary(nn.Module):
    """Holds the frequencies; rotation itself is ``rotate``.

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
    return (theta ** -(_pairs(dim) / dim)).float(), _xpos_decay(dim)


def _xpos_decay(dim: int) -> Tensor:
    return ((_pairs(dim) + 0.4 * dim) / (1.4 * dim)).float()


def _pairs(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float64, device="cpu")


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
