"""xpos: factors on queries and keys that fall with their distance, and how far they stay finite.

Sun et al., A Length-Extrapolatable Transformer, arXiv:2212.10554, section 3.2. Shapes: ``n``
tokens, ``d`` the head size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import Rule
from .torch_limits.kernels import has_float64
from .torch_limits.memory import written_out

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
            zeta = decay_of(2 * zeta.shape[0])
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


def decay_of(dim: int) -> Tensor:
    """xpos's decay of each pair of channels, fp32 ``(dim / 2,)`` on the CPU."""
    return ((pairs_of(dim) + 0.4 * dim) / (1.4 * dim)).float()


def pairs_of(dim: int) -> Tensor:
    """The first channel of each pair, fp64 ``(dim / 2,)`` on the CPU."""
    return torch.arange(0, dim, 2, dtype=torch.float64, device="cpu")
