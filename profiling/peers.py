"""Who computes local attention: flexlocal's paths and what else there is, by name.

All of them take and give ``(batch, heads, n, d)``.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from flexlocal import LocalAttention, Rotary, explain
from flexlocal.masks import block_mask
from flexlocal.rotary import rotate

from .check import visible
from .cudnn_attention import Cudnn
from .problems import Problem

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k and v to the output, all ``(batch, heads, n, d)``."""

Make = Callable[[Problem, torch.device], Attend]

Obstacle = Callable[[Problem, torch.dtype, torch.device], str | None]
"""Why a peer cannot compute a problem; None where it can."""

MOST_PAIRS = 2**26
"""Entries of the largest dense mask."""


@dataclass(frozen=True)
class Peer:
    """An implementation: what tables call it, and what makes it for a problem on a device.

    Attributes:
        obstacle: why it cannot compute a problem.
        module, package: what it imports, and the package that brings it; empty for torch itself.
        no_training_on_cpu: why it cannot train there, None where it can.
        ours: whether it is flexlocal; then it applies rotary embeddings itself.
    """

    name: str
    make: Make
    obstacle: Obstacle = lambda problem, dtype, device: None
    module: str = ""
    package: str = ""
    no_training_on_cpu: str | None = None
    ours: bool = False

    def missing(self) -> str | None:
        """Which package it lacks here."""
        if not self.module:
            return None
        try:
            found = importlib.util.find_spec(self.module)
        except ModuleNotFoundError:  # of the package around the module
            found = None
        return None if found else f"the package {self.package} is not installed"

    def inference_only(self, device: torch.device) -> str | None:
        """Why it cannot train on the device."""
        return self.no_training_on_cpu if device.type == "cpu" else None

    def attend(self, problem: Problem, device: torch.device) -> Attend:
        """The implementation, after compiled rotary embeddings where it has none of its own."""
        made = self.make(problem, device)
        if self.ours or not problem.rotary:
            return made
        rotated = _rotation(problem, device)
        return lambda q, k, v: made(*rotated(q, k), v)


@lru_cache(maxsize=1)
def _rotation(problem: Problem, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """One for all peers of a problem: torch limits how often one function is compiled."""
    inv_freq = Rotary(problem.d).to(device).inv_freq
    shift = problem.window.after

    @torch.compile(fullgraph=True)
    def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        position = torch.arange(q.shape[-2], device=q.device)
        q_turned = rotate(q, position + shift, inv_freq)
        return q_turned.to(q.dtype), rotate(k, position, inv_freq).to(k.dtype)

    return rotated


PEERS: dict[str, Peer] = {}
"""By name, in the order of the tables."""


def _peer(name: str, **fields: Any) -> Callable[[Make], Make]:
    """Registers what makes a peer."""

    def register(make: Make) -> Make:
        PEERS[name] = Peer(name, make, **fields)
        return make

    return register


# What may be in a peer's way.


def windowed_kernels(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    """Of kernels that take a window as two numbers."""
    if device.type != "cuda":
        return "runs on NVIDIA GPUs only"
    if not problem.window.exact:
        return "takes windows that slide with the query only"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes 16-bit tensors only, not {str(dtype).removeprefix('torch.')}"
    if problem.d % 8 or problem.d > 256:
        return f"takes heads up to 256 wide and a multiple of 8, not {problem.d}"
    return None


def fused_path(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    """Of FlexAttention's kernels in an inference, as flexlocal knows it."""
    x = torch.empty(1, 1, problem.n, problem.d, dtype=dtype, device=device)
    try:
        explain(x, x, x, problem.window, backend="flex")
    except ValueError as reason:
        return str(reason)
    return None


def _by_name_only(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type == "cuda":
        return "flexlocal takes this path by itself on a GPU"
    return fused_path(problem, dtype, device)


def _stock_kernels(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type == "cuda" and problem.d < 16:
        return f"takes heads of 16 or wider on a GPU, not {problem.d}"
    return fused_path(problem, dtype, device)


def _dense_mask(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    if problem.n**2 <= MOST_PAIRS:
        return None
    return f"its mask would have {problem.n} x {problem.n} entries"


_NO_BACKWARD = "FlexAttention has no backward pass on the CPU"


# flexlocal.


def _ours(backend: Literal["auto", "flex", "eager"]) -> Make:
    def make(problem: Problem, device: torch.device) -> Attend:
        dim = problem.d if problem.rotary else None
        return LocalAttention(**problem.arguments, dim=dim, backend=backend).to(device)

    return make


_peer("flexlocal", ours=True)(_ours("auto"))
_peer("flexlocal eager", ours=True)(_ours("eager"))
_peer("flexlocal flex", obstacle=_by_name_only, no_training_on_cpu=_NO_BACKWARD, ours=True)(
    _ours("flex")
)
OURS, REFERENCE = PEERS["flexlocal"], PEERS["flexlocal eager"]


# The others.

_UPSTREAM = {"module": "local_attention", "package": "local-attention"}


@_peer("local-attention", **_UPSTREAM)
def _upstream(problem: Problem, device: torch.device) -> Attend:
    return _with_padding_hidden(_upstream_layer(problem), problem, device)


@_peer(
    "local-attention compiled",
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


@_peer("FlashAttention 2", obstacle=windowed_kernels)
def _flash_2(problem: Problem, device: torch.device) -> Attend:
    batch, n = problem.batch, problem.n
    starts = torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=device)
    sides = problem.window.before, problem.window.after

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Sequences one after the other: no copy where a projection's tensors are seen as views.
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = varlen_attn(q, k, v, starts, starts, n, n, window_size=sides)
        return out.unflatten(0, (batch, n)).transpose(1, 2)

    return attend


@_peer("cuDNN", obstacle=windowed_kernels, module="cudnn", package="nvidia-cudnn-frontend")
def _cudnn(problem: Problem, device: torch.device) -> Attend:
    return Cudnn(problem.window.before, problem.window.after)


@_peer(
    "FlashAttention 4", obstacle=windowed_kernels, module="flash_attn.cute", package="flash-attn-4"
)
def _flash_4(problem: Problem, device: torch.device) -> Attend:
    from flash_attn.cute import flash_attn_func

    sides = problem.window.before, problem.window.after

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), window_size=sides)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


@_peer("FlexAttention, stock", obstacle=_stock_kernels, no_training_on_cpu=_NO_BACKWARD)
def _stock(problem: Problem, device: torch.device) -> Attend:
    blocks = block_mask(
        problem.window, problem.n, problem.n, device=device, full_width=device.type == "cpu"
    )
    compiled = torch.compile(flex_attention, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # kernels of the CPU refuse what could want a gradient
            q, k, v = q.detach(), k.detach(), v.detach()
        return compiled(q, k, v, block_mask=blocks)

    return attend


@_peer("dense SDPA", obstacle=_dense_mask)
def _dense(problem: Problem, device: torch.device) -> Attend:
    seen = visible(problem.window, torch.arange(problem.n, device=device), problem.n)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
