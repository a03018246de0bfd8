"""What becomes one kernel: a call of FlexAttention, with what lies around it.

Written to be compiled, on its own or as part of a user's model. Rotary, xpos's layout and the
mask are part of the graph, so that they cost no launches of their own, or nearly none.
FlexAttention: arXiv:2412.05496.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from .masks import (
    Rule,
    Segments,
    Window,
    block_mask,
    drop_scores,
    in_turn,
    mask_mod,
    self_token,
    window_bias,
)
from .masks.blocks import from_index_tensors, index_tensors
from .masks.buffer import written_out
from .masks.dropout import key_draws, query_draws
from .masks.keys import without_padding
from .masks.scores import SELF_SCORE, ScoreMod, unit_keys
from .rotary import Xpos, most_windows, rotate
from .tuning import STOCK_BLOCK, Tuning

_LEAST_HEAD = 16
MOST_HEAD = 256
"""Head sizes that kernels take on the GPU; zeros fill smaller ones up."""


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
        """The window, or with xpos the layout of its keys for ``n`` tokens of ``dtype``."""
        if self.xpos_base is None:
            return self.window
        return Segments(self.window, most_windows(self.window, self.xpos_base, dtype), n)


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
        lists: the index tensors of the block mask, where they are ready; see ``block_lists``.
    """
    window, dtype = settings.window, q.dtype
    b, h, n, _ = q.shape
    rule = settings.rule(n, dtype)
    if key_mask is not None:
        key_mask = key_mask.expand(-1, -1, n)  # for a compiler: its length is q's, whatever it is
        v = without_padding(v, key_mask)
        if k.requires_grad or q.requires_grad:  # kernels hide a score before they use it
            k = without_padding(k, key_mask)
    if settings.shared_qk:
        k = unit_keys(k)
    if inv_freq is not None:
        position = torch.arange(n, device=q.device)
        q = rotate(q, position + window.ahead * window.size, inv_freq)
        k = rotate(k, position, inv_freq)
    if isinstance(rule, Segments):
        assert xpos is not None
        q_factor, k_factor = xpos.scales(window, rule.queries, torch.float32)
        q = q * q_factor.repeat(rule.count, 1)[:n]
        k = (rule.lay_out(k) * k_factor).flatten(2, 3)
        v = rule.in_slots(v)
    q, k = q.to(dtype), k.to(dtype)

    scores: list[ScoreMod] = []
    if bias is not None:
        # Where a length divides evenly, kernels look up no query and no key beyond its end.
        even = q.device.type != "cpu" and rule is window and n % STOCK_BLOCK == 0
        scores.append(window_bias(bias, window, rule, h, settings.tuning.block if even else None))
    if settings.shared_qk:
        scores.append(self_token(rule))
    common = {**_mask(settings, rule, lists, q, k, key_mask), "scale": settings.scale}
    d_v = v.shape[-1]
    if q.device.type == "cuda":
        q, k, v = _padded_head(q), _padded_head(k), _padded_head(v)
        if n < STOCK_BLOCK:
            # torch 2.11 asks for the strides of a query before they are settled, in the decoding
            # kernel that few queries go to: one computed from a transposed view was read wrongly.
            q = written_out(q)
    elif lists is None:  # part of a user's graph, perhaps
        q, k, v = _made_anew(q), _made_anew(k), _made_anew(v)
    if settings.dropout == 0:
        out: Tensor = flex_attention(q, k, v, score_mod=in_turn(*scores), **common)
        return _narrowed(out, d_v)

    # Dropout acts after the softmax. With the dropped scores hidden the kernel gives the right
    # mixture of values but the wrong normaliser; a second pass without dropout gives the right one.
    assert seed is not None
    key_draw = key_draws(seed, b * h, n)
    if rule is not window:
        key_draw = written_out(rule.in_slots(key_draw[..., None])[..., 0])
    drop = drop_scores(query_draws(seed, b * h, n), key_draw, h, settings.dropout)
    aux = AuxRequest(lse=True)
    out, kept = flex_attention(q, k, v, score_mod=in_turn(*scores, drop), return_aux=aux, **common)
    thin = v[..., :_LEAST_HEAD]
    rest, every = flex_attention(q, k, thin, score_mod=in_turn(*scores), return_aux=aux, **common)
    blind = every.lse == -torch.inf
    share = torch.where(blind, 0.0, kept.lse - torch.where(blind, 0.0, every.lse)).exp()
    if settings.shared_qk:
        # A token that sees itself alone keeps all or nothing; its log-sum-exp is too far from 0
        # for a difference of two to tell.
        share = torch.where(every.lse < SELF_SCORE / 2, 1.0, share)
    # torch 2.11 fails in the backward pass of a call whose output is not used.
    share = share[..., None] / (1 - settings.dropout) + 0 * rest.sum(-1, keepdim=True)
    return _narrowed((out * share).to(dtype), d_v)


def block_lists(rule: Rule, n: int, block: int, device: torch.device) -> tuple[Tensor, ...]:
    """The index tensors of ``rule``'s block mask on ``n`` queries, without a key mask."""
    on_cpu = device.type == "cpu"
    blocks = block_mask(
        rule, n, _slots(rule, n), block_size=block, device=device, full_width=on_cpu
    )
    return index_tensors(blocks)


def _mask(
    settings: Settings,
    rule: Rule,
    lists: tuple[Tensor, ...] | None,
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
) -> dict[str, Any]:
    """The arguments of ``flex_attention`` that say which keys a query sees, and how it works."""
    block, n, n_keys = settings.tuning.block, q.shape[-2], k.shape[-2]
    mod = mask_mod(rule)
    if lists is None:
        blocks = block_mask(
            rule,
            n,
            n_keys,
            block_size=block,
            device=q.device,
            key_mask=key_mask,
            full_width=q.device.type == "cpu",
        )
        lists, mod = index_tensors(blocks), blocks.mask_mod
    options = dict(settings.tuning.options)
    if block != STOCK_BLOCK:
        options |= {"SPARSE_Q_BLOCK_SIZE": block, "SPARSE_KV_BLOCK_SIZE": block}
    # The lowering drops every candidate of the backward pass whose tiles do not divide the blocks
    # of the mask, before it heeds the options: blocks smaller than its own would leave it none.
    # So the mask is labelled with FlexAttention's own size, and the options say the true one.
    return {
        "block_mask": from_index_tensors((n, n_keys), lists, (STOCK_BLOCK, STOCK_BLOCK), mod),
        "enable_gqa": k.shape[1] != q.shape[1],
        "kernel_options": options or None,
    }


def _slots(rule: Rule, n: int) -> int:
    return rule.count * rule.slots if isinstance(rule, Segments) else n


def _padded_head(x: Tensor) -> Tensor:
    """``x`` with zeros up to a head size that kernels take."""
    d = x.shape[-1]
    if d < _LEAST_HEAD:
        return F.pad(x, (0, _LEAST_HEAD - d))
    if x.dtype == torch.float32 and MOST_HEAD // 2 < d < MOST_HEAD:
        # In between, torch 2.11 knows no tiles that fit Hopper's shared memory at fp32.
        return F.pad(x, (0, MOST_HEAD - d))
    return x


def _made_anew(x: Tensor) -> Tensor:
    """``x`` in a buffer of its own.

    Kernels of the CPU read views that the graph makes without their offset (torch 2.13). A copy
    of one is taken for the view itself, but not the result of an operation.
    """
    return x.masked_fill(torch.zeros((), dtype=torch.bool), 0.0)


def _narrowed(x: Tensor, d: int) -> Tensor:
    """``x`` without the zeros past head size ``d``."""
    # Even a slice that takes all is a view, which autograd would make anew outside the graph.
    return x if x.shape[-1] == d else x[..., :d]
