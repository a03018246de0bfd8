"""Who computes local attention: flexlocal's paths and what else there is, by name.

All of them take and give ``(batch, heads, n, d)``.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from flexlocal import LocalAttention, Rotary, explain
from flexlocal.masks import block_mask
from flexlocal.rotation import rotate, tables_of

from .check import visible
from .cudnn_attention import Cudnn
from .problems import Problem
from .timing import Run

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k and v to the output, all ``(batch, heads, n, d)``."""


@dataclass(frozen=True)
class Peer:
    """An implementation: what tables call it, and what makes it for a problem on a device.

    ``obstacle`` says why it cannot compute a problem, ``module`` is what it imports, of
    ``package``; empty for torch itself. ``ours`` apply rotary embeddings themselves.
    """

    name: str
    make: Callable[[Problem, torch.device], Attend]
    obstacle: Callable[[Problem, torch.dtype, torch.device], str | None] = lambda *_: None
    module: str = ""
    package: str = ""
    no_training_on_cpu: str | None = None
    ours: bool = False

    def missing(self) -> str | None:
        """Which package it lacks here."""
        try:
            here = not self.module or importlib.util.find_spec(self.module)
        except ModuleNotFoundError:  # of the package around the module
            here = False
        return None if here else f"the package {self.package} is not installed"

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

    @torch.compile(fullgraph=True)
    def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        position = torch.arange(q.shape[-2], device=q.device)
        shift = problem.window.after
        of_queries, of_keys = tables_of(position, position, shift, inv_freq, q.dtype)
        return rotate(q, of_queries).to(q.dtype), rotate(k, of_keys).to(k.dtype)

    return rotated


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


def _dense_mask(problem: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    large = problem.n**2 > 2**26
    return f"its mask would have {problem.n} x {problem.n} entries" if large else None


def _ours(backend: str, problem: Problem, device: torch.device) -> Attend:
    dim = problem.d if problem.rotary else None
    return LocalAttention(**problem.arguments, dim=dim, backend=backend).to(device)


def _upstream(
    wrap: Callable[[torch.nn.Module], Attend], problem: Problem, device: torch.device
) -> Attend:
    from local_attention import LocalAttention

    layer = wrap(LocalAttention(**problem.arguments, use_rotary_pos_emb=False))
    if problem.window.causal or problem.n % problem.window.size == 0:
        return layer
    # Queries near the end would see its padding where only a mask hides it.
    keep = torch.ones(problem.batch, problem.n, dtype=torch.bool, device=device)
    return lambda q, k, v: layer(q, k, v, mask=keep)


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


def _cudnn(problem: Problem, device: torch.device) -> Attend:
    return Cudnn(problem.window.before, problem.window.after)


def _flash_4(problem: Problem, device: torch.device) -> Attend:
    from flash_attn.cute import flash_attn_func

    sides = problem.window.before, problem.window.after

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), window_size=sides)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def _stock(problem: Problem, device: torch.device) -> Attend:
    wide = device.type == "cpu"
    blocks = block_mask(problem.window, problem.n, problem.n, device=device, full_width=wide)
    compiled = torch.compile(flex_attention, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # kernels of the CPU refuse what could want a gradient
            q, k, v = q.detach(), k.detach(), v.detach()
        return compiled(q, k, v, block_mask=blocks)

    return attend


def _dense(problem: Problem, device: torch.device) -> Attend:
    seen = visible(problem.window, torch.arange(problem.n, device=device), problem.n)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


OURS = Peer("flexlocal", partial(_ours, "auto"), ours=True)
REFERENCE = Peer("flexlocal eager", partial(_ours, "eager"), ours=True)

_NO_BACKWARD = {"no_training_on_cpu": "FlexAttention has no backward pass on the CPU"}
_UPSTREAM = {"module": "local_attention", "package": "local-attention"}
# It ends the process, so that it cannot be tried.
_CORRUPTS = "torch 2.13's compiled backward pass corrupts memory on several threads"
_COMPILED = {"no_training_on_cpu": _CORRUPTS, **_UPSTREAM}
_CUDNN = {"module": "cudnn", "package": "nvidia-cudnn-frontend"}
_FLASH_4 = {"module": "flash_attn.cute", "package": "flash-attn-4"}

_ALL = (
    OURS,
    REFERENCE,
    Peer("flexlocal flex", partial(_ours, "flex"), fused_path, **_NO_BACKWARD, ours=True),
    Peer("local-attention", partial(_upstream, lambda layer: layer), **_UPSTREAM),
    Peer("local-attention compiled", partial(_upstream, torch.compile), **_COMPILED),
    Peer("FlashAttention 2", _flash_2, windowed_kernels),
    Peer("cuDNN", _cudnn, windowed_kernels, **_CUDNN),
    Peer("FlashAttention 4", _flash_4, windowed_kernels, **_FLASH_4),
    Peer("FlexAttention, stock", _stock, fused_path, **_NO_BACKWARD),
    Peer("dense SDPA", _dense, _dense_mask),
)
PEERS = {peer.name: peer for peer in _ALL}
"""By name, in the order of the tables."""


def forward_of(attend: Attend, tensors: Sequence[Tensor]) -> Run:
    """A call of the forward pass."""
    return torch.no_grad()(lambda: attend(*tensors[:-1]))


def training_of(attend: Attend, tensors: Sequence[Tensor]) -> Run:
    """A call of both passes; the last of the tensors is the output's gradient."""
    *leaves, grad = tensors
    return lambda: torch.autograd.grad(attend(*leaves), leaves, grad)
