"""FlashAttention 4's kernels: whether they are there, and which calls are theirs.

It comes with the package flash-attn-4, which is young: an install may lack its compiler.
"""

import importlib.metadata
import importlib.util
import re
import warnings
from functools import lru_cache
from typing import Literal

import torch

from ..spec import Inputs, Spec, is_placed, may_hide_first, wants_gradients
from ..torch_limits.tracing import seen_as_constant
from . import flash_attention
from .tuning import FLASH, STOCK_BLOCK, capability, nearest, overridden

Way = Literal["flash", "flash by flex"]
"""How the kernels are called: by ``flash_attention``, or by FlexAttention's backend FLASH."""

_LEAST_VERSION = (4, 0, 0, 36)
"""4.0.0b36: the backward pass of those before it reads memory that was not written, on Hopper."""


def preferred(spec: Spec, inputs: Inputs) -> tuple[Way | None, str | None]:
    """How the kernels are to be called, where they are there and the faster ones; None elsewhere.

    Callers' ``kernel_options`` are left alone.

    Returns:
        That, and what is wrong with the install where nothing else speaks against it.
    """
    q = inputs.q
    if not _takes(spec, inputs) or spec.kernel_options is not None or not installed():
        return None, None
    kinds = _kinds(spec, inputs)
    if overridden() is None:
        entry = nearest(capability(q.device), q.dtype, q.shape[-1], spec.rule)
        if entry is None or entry.head_size != q.shape[-1] or not kinds <= entry.flash:
            return None, None
    elif overridden() != FLASH:
        return None, None
    # Asked last, because it guards on the length: one graph for whole blocks, one for the others.
    standing = "standing" in kinds
    if standing and not _fits_blocks(spec, inputs):
        return None, None
    fault = broken()
    if fault is not None:
        return None, fault
    return "flash by flex" if standing else "flash", None


def _kinds(spec: Spec, inputs: Inputs) -> set[str]:
    """The words of ``Entry.flash`` for a call, each of which has to be there."""
    if not spec.rule.window.exact:
        return {"standing"}
    if inputs.cu_seqlens is not None:
        # Documents cost these kernels more than Triton's: those have to lead in both passes.
        return {"forward", "training"}
    return {"training" if wants_gradients(inputs) else "forward"}


def _takes(spec: Spec, inputs: Inputs) -> bool:
    """Whether the kernels know all that a call asks for, and are known to compute it right."""
    q, k, v, mask, bias, *_ = inputs
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not may_hide_first(spec):
        return False
    if inputs.sinks is not None:
        by_head = q.dim() == 4 and inputs.sinks.shape[0] == q.shape[1]
        if not by_head or inputs.sinks.dtype == torch.float64:
            return False
    if not spec.rule.is_window or mask is not None or bias is not None:
        return False
    if is_placed(inputs) and not _by_sums_alone(spec, inputs):
        return False
    plain = not spec.shared_qk and spec.dropout == 0 and spec.xpos_base is None
    return plain and q.shape[-2:] == k.shape[-2:] == v.shape[-2:]


def _by_sums_alone(spec: Spec, inputs: Inputs) -> bool:
    """Whether documents' cumulative lengths alone place a sliding window."""
    window = spec.rule.window
    return window.exact and inputs.cu_seqlens is not None and inputs.q_offset is None


def _fits_blocks(spec: Spec, inputs: Inputs) -> bool:
    """Whether FlexAttention's FLASH was tried on such a call: bf16, contiguous, in whole blocks."""
    q, k, v = inputs.q, inputs.k, inputs.v
    plain = spec.softcap is None and not spec.return_lse and inputs.sinks is None
    plain = plain and q.dtype == torch.bfloat16 and q.shape == k.shape == v.shape
    return plain and q.shape[-2] % STOCK_BLOCK == 0 and all(x.is_contiguous() for x in (q, k, v))


@seen_as_constant
def installed() -> bool:
    """Whether there is something to import."""
    return _installed()


@seen_as_constant
def broken() -> str | None:
    """Why what is installed cannot be taken; None where it can."""
    return _broken()


@lru_cache
def _installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


@lru_cache
def _broken() -> str | None:
    version = _version()
    name = "flash-attn-4" if version is None else f"flash-attn-4 {version}"
    if version is not None and _number(version) < _LEAST_VERSION:
        return f"{name} gives wrong gradients, 4.0.0b36 or later would do"
    try:
        with warnings.catch_warnings():  # of names that it and its dependencies still use
            warnings.simplefilter("ignore")
            interface = importlib.import_module("flash_attn.cute.interface")
    except Exception as error:  # of whatever it is made of
        first = next(iter(str(error).strip().splitlines()), "")
        return f"flash-attn-4 cannot be imported ({type(error).__name__}: {first})"
    lacking = flash_attention.lacking(interface)
    return None if lacking is None else f"{name} has no {lacking}, which 4.0.0b36 has"


def _version() -> str | None:
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:  # a copy of its source
        return None


def _number(version: str) -> tuple[int, ...]:
    """``4.0.0b36`` as ``(4, 0, 0, 36)``; a release without a beta's number is later than all."""
    release, _, beta = version.partition("b")
    numbers = [int(number) for number in re.findall(r"\d+", release)[:3]]
    found = re.match(r"\d+", beta)
    return (*numbers, int(found[0]) if found else 2**31)
