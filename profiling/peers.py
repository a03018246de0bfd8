"""Who computes local attention: flexlocal's paths and what else there is, by name.

All of them take and give ``(batch, heads, n, d)``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from flexlocal import LocalAttention, Window
from flexlocal.call import BackendName
from flexlocal.masks import block_mask

from .check import visible
from .conditions import (
    exact_window,
    fused_path,
    half_precision,
    head_of_16,
    head_of_eighths,
    needs_gpu,
    not_by_itself,
    small_mask,
)
from .peer import Attend, Condition, Make, Peer, asking_nothing
from .problems import Problem
from .windowed import Cudnn, FlashAttention2

PEERS: dict[str, Peer] = {}
"""By name, in the order of the tables."""


def _peer(name: str, words: str, *conditions: Condition, **fields: Any) -> Callable[[Make], Make]:
    """Registers what makes a peer."""

    def register(make: Make) -> Make:
        PEERS[name] = Peer(name, words, make, conditions=conditions, **fields)
        return make

    return register


def _sides(window: Window) -> tuple[int, int]:
    """Keys before and after its own that a query of an exact window sees."""
    return window.before, window.after


_NO_BACKWARD = "FlexAttention has no backward pass on the CPU"


# flexlocal.


def _ours(backend: BackendName) -> Make:
    def make(problem: Problem, device: torch.device) -> Attend:
        dim = problem.d if problem.rotary else None
        return LocalAttention(**problem.arguments, dim=dim, backend=backend).to(device)

    return make


_peer("flexlocal", "backend='auto'", ours=True)(_ours("auto"))
_peer("flexlocal eager", "its path in plain operations", ours=True)(_ours("eager"))
_peer(
    "flexlocal flex",
    "its fused path, asked for by name",
    not_by_itself,
    fused_path,
    no_training_on_cpu=_NO_BACKWARD,
    ours=True,
)(_ours("flex"))
OURS, REFERENCE = PEERS["flexlocal"], PEERS["flexlocal eager"]


# The others.

_UPSTREAM = {"module": "local_attention", "package": "local-attention"}


@_peer("local-attention", "lucidrains' layer", **_UPSTREAM)
def _upstream(problem: Problem, device: torch.device) -> Attend:
    return _with_padding_hidden(_upstream_layer(problem), problem, device)


@_peer(
    "local-attention compiled",
    "the same under torch.compile",
    # It ends the process, so that it cannot be tried.
    no_training_on_cpu="torch 2.13's compiled backward pass corrupts memory on several threads",
    **_UPSTREAM,
)
def _upstream_compiled(problem: Problem, device: torch.device) -> Attend:
    return _with_padding_hidden(torch.compile(_upstream_layer(problem)), problem, device)


def _upstream_layer(problem: Problem) -> torch.nn.Module:
    import local_attention

    return local_attention.LocalAttention(**problem.arguments, use_rotary_pos_emb=False)


def _with_padding_hidden(layer: Attend, problem: Problem, device: torch.device) -> Attend:
    """Queries near the end would see its padding where only a mask hides it."""
    if problem.window.causal or problem.n % problem.window.size == 0:
        return layer
    keep = torch.ones(problem.batch, problem.n, dtype=torch.bool, device=device)
    return lambda q, k, v: layer(q, k, v, mask=keep)


@_peer(
    "FlashAttention 2",
    "torch's own operator",
    needs_gpu,
    exact_window,
    half_precision,
    head_of_eighths,
)
def _flash_2(problem: Problem, device: torch.device) -> Attend:
    sides = _sides(problem.window)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return FlashAttention2.apply(q, k, v, *sides).transpose(1, 2)

    return attend


@_peer(
    "cuDNN",
    "its attention, through nvidia-cudnn-frontend",
    needs_gpu,
    exact_window,
    half_precision,
    head_of_eighths,
    module="cudnn",
    package="nvidia-cudnn-frontend",
)
def _cudnn(problem: Problem, device: torch.device) -> Attend:
    return Cudnn(*_sides(problem.window))


@_peer(
    "FlashAttention 4",
    "flash_attn.cute",
    needs_gpu,
    exact_window,
    half_precision,
    head_of_eighths,
    module="flash_attn.cute",
    package="flash-attn-4",
)
def _flash_4(problem: Problem, device: torch.device) -> Attend:
    from flash_attn.cute import flash_attn_func

    sides = _sides(problem.window)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), window_size=sides)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


@_peer(
    "FlexAttention, stock",
    "torch's default options, a ready block mask",
    fused_path,
    head_of_16,
    no_training_on_cpu=_NO_BACKWARD,
)
def _stock(problem: Problem, device: torch.device) -> Attend:
    blocks = block_mask(
        problem.window, problem.n, problem.n, device=device, full_width=device.type == "cpu"
    )
    compiled = torch.compile(flex_attention, fullgraph=True)
    return asking_nothing(lambda q, k, v: compiled(q, k, v, block_mask=blocks))


@_peer("dense SDPA", "scaled_dot_product_attention under a dense mask", small_mask)
def _dense(problem: Problem, device: torch.device) -> Attend:
    seen = visible(problem.window, torch.arange(problem.n, device=device), problem.n)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
