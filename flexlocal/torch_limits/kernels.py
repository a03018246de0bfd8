"""What FlexAttention's kernels take (torch 2.11 to 2.15), and whether one can run here."""

import importlib.util
import os
import shutil
from functools import lru_cache

import torch

from .tracing import seen_as_constant

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels compute."""

LEAST_HEAD, MOST_HEAD = 16, 256
"""Channels of the narrowest and of the widest heads that kernels take on a GPU (torch 2.11)."""

MOST_HEAD_BETWEEN = {torch.float32: 128}
"""Channels above which heads are padded to ``MOST_HEAD``.

torch 2.11 knows no tiles for fp32 heads in between that fit into Hopper's shared memory.
"""

LEAST_HEAD_ON_CPU = 24
"""Channels of the narrowest heads for which the CPU's kernel is right.

Narrower ones may be multiplied by keys past the last one, and the result is written over the
running maxima of the first queries. It happens without AVX-512 where a vector divides head size and
length and 16 does not divide the length (torch 2.11 to 2.15).
"""


def unavailable(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why no compiled kernel can run on ``device`` at ``dtype``; None when one can."""
    if device.type not in ("cpu", "cuda"):
        return f"FlexAttention has no kernel for {device.type} tensors"
    if dtype not in KERNEL_DTYPES:
        return f"FlexAttention has no kernel for {dtype}, only for float32, bfloat16 and float16"
    # A compiler at work has found what it needs, and cannot trace a search for it.
    return None if torch.compiler.is_compiling() else _missing(device.type)


@lru_cache
def _missing(device_type: str) -> str | None:
    from torch._dynamo import config  # takes seconds to import
    from torch._dynamo.eval_frame import is_dynamo_supported

    if not is_dynamo_supported():
        return "torch.compile does not support this Python"
    if config.disable:
        return "torch.compile is switched off (TORCH_COMPILE_DISABLE)"
    if device_type == "cuda":
        if not torch.cuda.is_available():
            if torch.version.cuda:
                return "torch finds no GPU (nvidia-smi says whether its driver does)"
            return "torch is built without CUDA (another: https://pytorch.org/get-started)"
        if importlib.util.find_spec("triton") is None:
            return "triton, which compiles kernels for the GPU, is missing (pip install triton)"
        return None
    if shutil.which(cpp_compiler()) is None:
        return (
            f"the C++ compiler {cpp_compiler()!r}, which torch.compile needs on the CPU, is not "
            "found (Debian, Ubuntu: apt install g++; CXX names another)"
        )
    return None


def cpp_compiler() -> str:
    """The C++ compiler that torch.compile runs for kernels of the CPU."""
    return os.environ.get("CXX", "g++")


@seen_as_constant
def has_float64(device: torch.device) -> bool:
    """Whether ``device`` holds float64: Apple's GPUs do not, nor do some of Intel's."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"
