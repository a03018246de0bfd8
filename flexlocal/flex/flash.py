"""FlashAttention 4's kernel, by way of FlexAttention: whether it is there, and for which calls.

It comes with the package flash-attn-4, which is young: an install may lack its compiler.
"""

import importlib.metadata
import importlib.util
import re
from functools import lru_cache

import torch

from ..spec import Inputs, Spec, is_placed
from ..torch_limits import seen_as_constant
from .tuning import STOCK_BLOCK, capability, nearest

_LEAST_VERSION = (4, 0, 0, 36)
"""4.0.0b36: the backward pass of those before it reads memory that was not written, on Hopper."""


def preferred(spec: Spec, inputs: Inputs) -> tuple[bool, str | None]:
    """Whether the kernel is there, faster, and known to run a call right.

    It gets only calls like those it was tested on: bf16, heads of 128, contiguous tensors, as many
    key heads as query heads, a length of whole blocks, and scores that nothing but the window and
    rotary decides. Callers' ``kernel_options`` are left alone.

    Returns:
        That, and what is wrong with the install where nothing else speaks against it.
    """
    q, k, v, mask, bias, *_ = inputs
    plain = mask is None and bias is None and not spec.shared_qk and spec.dropout == 0
    plain = plain and spec.xpos_base is None and spec.rule.is_window and not is_placed(inputs)
    plain = plain and spec.softcap is None and not spec.return_lse and inputs.sinks is None
    if not plain or spec.kernel_options is not None or q.device.type != "cuda":
        return False, None
    if q.dtype != torch.bfloat16 or q.shape[-1] != 128 or not installed():
        return False, None
    entry = nearest(capability(q.device), q.dtype, q.shape[-1], spec.rule)
    if entry is None or not entry.flash:
        return False, None
    # Asked last, because it guards on the length: one graph for whole blocks, one for the others.
    fits = q.shape == k.shape == v.shape and q.shape[-2] % STOCK_BLOCK == 0
    if not fits or not all(x.is_contiguous() for x in (q, k, v)):
        return False, None
    fault = broken()
    return fault is None, fault


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
    if version is not None and _number(version) < _LEAST_VERSION:
        return f"flash-attn-4 {version} gives wrong gradients, 4.0.0b36 or later would do"
    try:
        importlib.import_module("flash_attn.cute")
    except Exception as error:  # of whatever it is made of
        first = next(iter(str(error).strip().splitlines()), "")
        return f"flash-attn-4 cannot be imported ({type(error).__name__}: {first})"
    return None


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
