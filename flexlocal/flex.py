"""The fused path: FlexAttention with our rules. The one file that knows private torch names.

Inside a user's ``torch.compile`` ``flex_attention`` is called as it is; outside, through a
compiled callable of our own. Rotary, xpos's layout and the block mask are part of the compiled
graph, so that a call costs no launches beside them. FlexAttention: arXiv:2412.05496.
"""

import importlib.util
import os
import shutil
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .masks import Rule, Segments, Window, block_mask, drop_scores, in_turn, self_token, window_bias
from .masks.buffer import written_out
from .masks.dropout import key_draws, query_draws
from .masks.keys import without_padding
from .masks.scores import SELF_SCORE, ScoreMod, unit_keys
from .rotary import Xpos, rotate
from .tuning import STOCK, STOCK_BLOCK, Tuning, tuning

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_HEAD, _MOST_HEAD = 16, 256
"""Head sizes that kernels take on the GPU; zeros fill smaller ones up."""


@dataclass(frozen=True)
class Settings:
    """What a compiled kernel is made for, beside the shapes of its tensors."""

    window: Window
    scale: float
    shared_qk: bool
    dropout: float
    xpos_base: float | None
    tuning: Tuning


def unavailable(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why no compiled kernel can run on ``device`` at ``dtype``; None when one can."""
    if device.type not in ("cpu", "cuda"):
        return f"FlexAttention has no kernel for {device.type} tensors"
    if dtype not in _DTYPES:
        return f"FlexAttention has no kernel for {dtype}, only for float32, bfloat16 and float16"
    # A compiler at work has found what it needs, and cannot trace a search for it.
    return None if torch.compiler.is_compiling() else _missing(device.type)


@lru_cache
def _missing(device_type: str) -> str | None:
    from torch._dynamo.eval_frame import is_dynamo_supported  # takes seconds to import

    if not is_dynamo_supported():
        return "torch.compile does not support this Python"
    if device_type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        if importlib.util.find_spec("triton") is None:
            return "the package triton, which compiles kernels for the GPU, is not installed"
        return None
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler!r}, which torch.compile needs on the CPU, is not found"
    return None


def refusal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> str | None:
    """Why this call cannot run fused; None when it can."""
    reason = unavailable(q.device, q.dtype)
    if reason is not None:
        return reason
    if torch.compiler.is_exporting():
        return "torch.export cannot hold FlexAttention's kernel"
    if q.numel() == 0 or v.numel() == 0:
        return "there is nothing to compute: a tensor is empty"
    if q.device.type == "cuda" and max(q.shape[-1], v.shape[-1]) > _MOST_HEAD:
        return f"kernels take heads up to {_MOST_HEAD} wide"
    if q.device.type == "cpu":
        tensors = [q, k, v] if bias is None else [q, k, v, bias]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return "FlexAttention has no backward pass on the CPU; torch.no_grad() would do"
        if dropout > 0:
            return "FlexAttention gives no log-sum-exp on the CPU, which dropout needs"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    shared_qk: bool,
    dropout: float,
    seed: Tensor | None,
    inv_freq: Tensor | None,
    xpos: Xpos | None,
    kernel_options: dict[str, Any] | None,
) -> Tensor:
    """Local attention in one fused kernel; arguments and result as ``eager.attend``."""
    base = None if xpos is None else xpos.base
    how = _tuning(q, v, window, kernel_options)
    settings = Settings(window, scale, shared_qk, dropout, base, how)
    zeta = None if xpos is None else xpos.zeta
    if torch.compiler.is_compiling():
        return _fused(settings, q, k, v, key_mask, bias, seed, inv_freq, zeta)
    tensors: tuple[Tensor | None, ...] = (q, k, v, key_mask, bias, seed, inv_freq, zeta)
    if not torch.is_grad_enabled():
        # On the CPU FlexAttention refuses tensors that could require a gradient.
        tensors = tuple(None if x is None else x.detach() for x in tensors)
    # What makes another kernel makes another callable: each has torch's recompile limit to itself.
    kind = tuple(None if x is None else (x.dtype, x.requires_grad) for x in tensors)
    shape = (q.device, q.shape[1], k.shape[1], q.shape[-1], v.shape[-1])
    return _compiled(settings, kind, shape)(*tensors)


def _tuning(q: Tensor, v: Tensor, window: Window, kernel_options: dict[str, Any] | None) -> Tuning:
    """The caller's options over FlexAttention's own, or the table's."""
    if kernel_options is not None:
        return Tuning(STOCK_BLOCK, tuple(sorted(kernel_options.items())))
    # Few queries go to a decoding kernel, which has options of its own.
    if q.device.type != "cuda" or q.shape[-2] < STOCK_BLOCK:
        return STOCK
    return tuning(_capability(q.device), q.dtype, max(q.shape[-1], v.shape[-1]), window)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# What torch.compiler.assume_constant_result does; calling it would import the compiler here.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _compiled(settings: Settings, *kind: object) -> Callable[..., Tensor]:
    def fused(*tensors: Any) -> Tensor:
        return _fused(settings, *tensors)

    # The recompile limit counts per code object, so that each callable needs one of its own.
    name = f"fused_{settings.window.label}_{abs(hash((settings, kind))):x}"
    own = types.FunctionType(
        fused.__code__.replace(co_name=name), globals(), name, closure=fused.__closure__
    )
    compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=True)
    return compiled


def _fused(
    settings: Settings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    inv_freq: Tensor | None,
    zeta: Tensor | None,
) -> Tensor:
    window, dtype = settings.window, q.dtype
    b, h, n, _ = q.shape
    if key_mask is not None:
        v = without_padding(v, key_mask)
        if k.requires_grad or q.requires_grad:  # kernels hide a score before they use it
            k = without_padding(k, key_mask)
    if settings.shared_qk:
        k = unit_keys(k)
    if inv_freq is not None:
        position = torch.arange(n, device=q.device)
        q = rotate(q, position + window.ahead * window.size, inv_freq)
        k = rotate(k, position, inv_freq)
    rule: Rule = window
    if zeta is not None:
        assert settings.xpos_base is not None
        xpos = Xpos(zeta, settings.xpos_base)
        rule = segments = Segments(window, xpos.most_windows(window, dtype), n)
        q_factor, k_factor = xpos.scales(window, segments.queries, torch.float32)
        q = q * q_factor.repeat(segments.count, 1)[:n]
        k = (segments.lay_out(k) * k_factor).flatten(2, 3)
        v = segments.in_slots(v)
    q, k = q.to(dtype), k.to(dtype)

    block, on_cpu = settings.tuning.block, q.device.type == "cpu"
    scores: list[ScoreMod] = []
    if bias is not None:
        # Where a length divides evenly, kernels look up no query and no key beyond its end.
        even = not on_cpu and rule is window and n % STOCK_BLOCK == 0
        scores.append(window_bias(bias, window, rule, h, block if even else None))
    if settings.shared_qk:
        scores.append(self_token(rule))
    blocks = block_mask(
        rule,
        n,
        k.shape[-2],
        block_size=block,
        device=q.device,
        key_mask=key_mask,
        full_width=on_cpu,
    )
    options = dict(settings.tuning.options)
    if block != STOCK_BLOCK:
        blocks = _under_stock_label(blocks)
        options |= {"SPARSE_Q_BLOCK_SIZE": block, "SPARSE_KV_BLOCK_SIZE": block}
    common: dict[str, Any] = {
        "block_mask": blocks,
        "scale": settings.scale,
        "enable_gqa": k.shape[1] != h,
        "kernel_options": options or None,
    }
    d_v = v.shape[-1]
    if q.device.type == "cuda":
        q, k, v = _padded_head(q), _padded_head(k), _padded_head(v)
    if settings.dropout == 0:
        out: Tensor = flex_attention(q, k, v, score_mod=in_turn(*scores), **common)
        return out[..., :d_v]

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
    result: Tensor = (out * share).to(dtype)[..., :d_v]
    return result


def _under_stock_label(blocks: BlockMask) -> BlockMask:
    """``blocks`` said to be of FlexAttention's own size; the options say the true one.

    The lowering drops every candidate of the backward pass whose tiles do not divide the blocks
    of the mask, before it heeds the options: smaller blocks than its own would leave it none.
    """
    lists = (
        blocks.kv_num_blocks,
        blocks.kv_indices,
        blocks.full_kv_num_blocks,
        blocks.full_kv_indices,
        blocks.q_num_blocks,
        blocks.q_indices,
        blocks.full_q_num_blocks,
        blocks.full_q_indices,
    )
    label = (STOCK_BLOCK, STOCK_BLOCK)
    return BlockMask(blocks.seq_lengths, *lists, label, blocks.mask_mod)


def _padded_head(x: Tensor) -> Tensor:
    """``x`` with zeros up to a head size that kernels take."""
    d = x.shape[-1]
    if d < _LEAST_HEAD:
        return F.pad(x, (0, _LEAST_HEAD - d))
    if x.dtype == torch.float32 and _MOST_HEAD // 2 < d < _MOST_HEAD:
        # In between, torch 2.11 knows no tiles that fit Hopper's shared memory at fp32.
        return F.pad(x, (0, _MOST_HEAD - d))
    return x
