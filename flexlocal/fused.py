"""What becomes one kernel: a call of FlexAttention, with what lies around it.

Written to be compiled, on its own or as part of a user's model. Rotary, xpos's layout and the
mask are part of the graph: a few small kernels around that of attention, and fewer where a user's
graph already passes over the tensors. FlexAttention: arXiv:2412.05496.
"""

from dataclasses import dataclass
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from .dropped import attend_dropped
from .kernel import LEAST_HEAD, Blocks, Kernel, MaskReads
from .masks import Rule, Segments, Window
from .masks.buffer import copied, written_out
from .masks.dropout import key_draws, query_draws
from .masks.itself import ends_alone
from .masks.keys import without_padding
from .masks.scores import unit_keys, with_margin
from .rotary import Xpos, most_windows, rotate
from .tuning import STOCK_BLOCK, Tuning

MOST_HEAD = 256
"""Channels of the widest heads that kernels take on the GPU."""

_LEAST_ON_CPU = 24
"""Below, the CPU's kernel may multiply by keys past the last one and write what comes of it over
the running maxima of the first queries: where a vector divides head size and length, and 16 does
not divide the length (torch 2.11 to 2.14 without AVX-512)."""


@dataclass(frozen=True)
class Settings:
    """What a kernel is made for, beside the shapes of its tensors."""

    window: Window
    scale: float
    shared_qk: bool
    dropout: float
    xpos_base: float | None
    tuning: Tuning

    def rule(self, n: int, dtype: torch.dtype) -> Rule:
        """The window, or for xpos on a long sequence the layout of its keys."""
        if self.xpos_base is None:
            return self.window
        windows = most_windows(self.window, self.xpos_base, dtype)
        if n <= windows * self.window.size:
            return self.window  # one origin serves all
        return Segments(self.window, windows, n)

    def blocks(self, n: int, dtype: torch.dtype, masked: bool) -> Blocks:
        """The sparse blocks for ``n`` tokens of ``dtype``."""
        rule = self.rule(n, dtype)
        return Blocks(self.window, rule, n, masked, self.shared_qk, self.tuning)


def fused(
    settings: Settings,
    lists: tuple[Tensor, ...] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    inv_freq: Tensor | None,
    xpos: Xpos | None,
) -> Tensor:
    """Local attention; tensors and result as ``eager.attend``.

    Args:
        lists: the index tensors of the block mask, where they are ready; see ``Blocks.lists``.
    """
    window, dtype = settings.window, q.dtype
    b, h, n, _ = q.shape
    h = index(h)  # for a compiler: a number, before functions of a score capture it as a size
    rule = settings.rule(n, dtype)
    if key_mask is not None:
        # For a compiler: the mask's sizes are those of q, however they were computed.
        key_mask = key_mask.expand(-1, 1 if key_mask.shape[1] == 1 else h, n)
        v = without_padding(v, key_mask)
        # Kernels hide a score before they use it, but multiply by a hidden key for a gradient.
        if torch.is_grad_enabled() and (k.requires_grad or q.requires_grad):
            k = without_padding(k, key_mask)
    if settings.shared_qk:
        k = unit_keys(k)
    v = rule.in_slots(v)
    if inv_freq is not None:
        q, k = _positioned(q, k, window, rule, inv_freq, xpos)

    blocks = settings.blocks(n, dtype, key_mask is not None)
    kept = None if key_mask is None else _by_slot(rule, key_mask)
    on_gpu, d_v, grouped = q.device.type == "cuda", v.shape[-1], k.shape[1] != h
    decodes, alone = settings.tuning.decodes(n), lists is not None
    q, k, v = _as_kernels_read(q, k, v, decodes, alone)
    if lists is None:
        lists = blocks.lists(q.device, kept)
    bias_heads = margin = None
    if bias is not None:
        bias_heads = index(bias.shape[0])  # as h
        bias, margin = _bias_table(bias, bias_heads, blocks, on_gpu)
    by_mask = settings.shared_qk and kept is None and bias is None
    ends = ends_alone(window, n) if by_mask else None
    kernel = Kernel(blocks, h, grouped, settings.scale, bias_heads, margin, on_gpu, ends)
    reads = MaskReads(kept, _looked_up(n, q.device) if kernel.asks_length else None)
    if settings.dropout == 0:
        out: Tensor = flex_attention(
            q, k, v, score_mod=kernel.score_mod(bias), **kernel.arguments(lists, reads)
        )
        # A compiler would fuse what follows in a user's graph, which the CPU's kernel refuses.
        return _narrowed(out, d_v) if on_gpu or alone else copied(out)
    assert seed is not None
    draws = query_draws(seed, b * h, n), _by_slot(rule, key_draws(seed, b * h, n))
    out = attend_dropped(kernel, settings.dropout, q, k, v, bias, draws, lists, reads)
    return _narrowed(out, d_v)


def _positioned(
    q: Tensor, k: Tensor, window: Window, rule: Rule, inv_freq: Tensor, xpos: Xpos | None
) -> tuple[Tensor, Tensor]:
    """Queries rotated, and keys in their slots, in the dtypes that they came in."""
    n, shift = q.shape[-2], window.after
    q_factor, k_factor = (None, None) if xpos is None else _xpos_factors(xpos, rule, window, n)
    position = torch.arange(n, device=q.device)
    # Nothing is added where it is 0, so that a compiler makes one table for both.
    turned_q = _rotated(q, position + shift if shift else position, inv_freq, q_factor)
    if isinstance(rule, Segments):
        turned_k = rotate(k, rule.slot_positions(k.device), inv_freq, k_factor, rule)
    else:
        turned_k = _rotated(k, position, inv_freq, k_factor)
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def _looked_up(n: int, device: torch.device) -> Tensor:
    """``n`` where kernels look it up."""
    # Not torch.full: a compiler would make a constant of it, and no buffer.
    return written_out(torch.arange(n, n + 1, dtype=torch.int32, device=device).view(()))


def _bias_table(
    bias: Tensor, heads: int, blocks: Blocks, on_gpu: bool
) -> tuple[Tensor, int | None]:
    """``bias`` as kernels look it up, and its margin, if it has one."""
    # Its sizes in numbers, where a compiler leaves them open: biases of other windows came before.
    sized = bias.reshape(heads, blocks.window.size, blocks.window.span)
    if bias.dtype == torch.float64:
        bias = sized = written_out(sized.to(torch.float32))  # kernels read no float64
    if not on_gpu:
        # Kernels of the CPU, which give no gradients, read no bias that the graph computes.
        learned = torch.is_grad_enabled() and bias.requires_grad
        return bias if learned else written_out(sized), None
    # Where a length divides evenly, kernels look up no query and no key beyond its end.
    if blocks.rule is not blocks.window or blocks.n % STOCK_BLOCK:
        return bias, None
    margin = blocks.window.block_margin(blocks.tuning.block)
    return with_margin(sized, margin), margin


def _as_kernels_read(
    q: Tensor, k: Tensor, v: Tensor, decodes: bool, alone: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Head sizes that kernels take, and memory that they read rightly.

    Args:
        decodes: a decoding kernel may be taken.
        alone: this is a graph of its own, and no part of a user's.
    """
    if q.device.type != "cuda":
        q, k = _at_least(q, _LEAST_ON_CPU), _at_least(k, _LEAST_ON_CPU)
        # The kernel reads a view that the graph makes without its offset (torch 2.13).
        return (q, k, v) if alone else (copied(q), copied(k), copied(v))
    q, k, v = _padded_head(q), _padded_head(k), _padded_head(v)
    # torch 2.11 asks decoding kernels' query for its strides before they are settled: one
    # computed from a transposed view was read wrongly.
    return written_out(q) if decodes else q, k, v


def _rotated(x: Tensor, position: Tensor, inv_freq: Tensor, factor: Tensor | None) -> Tensor:
    """As ``rotate``, in memory as ``x`` lies: else the output would not, and be copied."""
    if x.stride(1) >= x.stride(2):
        return rotate(x, position, inv_freq, factor)
    by_token, position = x.transpose(1, 2), position[:, None]
    factor = None if factor is None else factor[:, None]
    return rotate(by_token, position, inv_freq, factor).transpose(1, 2)


def _by_slot(rule: Rule, x: Tensor) -> Tensor:
    """``x`` ``(..., n)``, a number for each key, as ``(..., slots)``, where kernels find it."""
    return written_out(rule.in_slots(x[..., None])[..., 0])


def _xpos_factors(xpos: Xpos, rule: Rule, window: Window, n: int) -> tuple[Tensor, Tensor]:
    """What queries and key slots are multiplied by, ``(n, d / 2)`` and ``(slots, d / 2)``."""
    shift, dtype = window.after, torch.float32
    if isinstance(rule, Segments):
        query, slot = xpos.scales(rule.queries_each, window.before, window.after, shift, dtype)
        return query.repeat(rule.count, 1)[:n], slot.repeat(rule.count, 1)
    return xpos.scales(n, 0, 0, shift, dtype)


def _padded_head(x: Tensor) -> Tensor:
    """``x`` with zeros up to a head size that kernels take on the GPU."""
    # In between, torch 2.11 knows no tiles that fit Hopper's shared memory at fp32.
    wide = x.dtype == torch.float32 and x.shape[-1] > MOST_HEAD // 2
    return _at_least(x, MOST_HEAD if wide else LEAST_HEAD)


def _at_least(x: Tensor, d: int) -> Tensor:
    """``x`` with zeros up to head size ``d``."""
    return x if x.shape[-1] >= d else F.pad(x, (0, d - x.shape[-1]))


def _narrowed(x: Tensor, d: int) -> Tensor:
    """``x`` without the zeros past head size ``d``."""
    # Even a slice that takes all is a view, which autograd would make anew outside the graph.
    return x if x.shape[-1] == d else x[..., :d]
