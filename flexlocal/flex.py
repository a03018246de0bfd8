"""The fused path: who can take it, and the compiled callables and block lists that it keeps.

Inside a user's ``torch.compile`` a call becomes part of the user's graph; outside, it goes through
a callable compiled here. The one file that knows private torch names; ``dropped`` knows operators
that torch does not document.
"""

import importlib.util
import os
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .call import Call
from .dropped import let_through
from .fused import MOST_HEAD, Settings, fused
from .kernel import Blocks
from .rotary import xpos_fits
from .tuning import capability, flash_installed, tuning_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_Lists = tuple[Tensor, ...]
"""The index tensors of a block mask."""


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


def refusal(call: Call) -> str | None:
    """Why this call cannot run fused; None when it can."""
    q, k, v, xpos = call.q, call.k, call.v, call.xpos
    reason = unavailable(q.device, q.dtype)
    if reason is not None:
        return reason
    if _exporting():
        return "torch.export cannot hold FlexAttention's kernel"
    if q.numel() == 0 or v.numel() == 0:
        return "there is nothing to compute: a tensor is empty"
    if xpos is not None and not xpos_fits(call.window, xpos.base, q.dtype):
        return f"xpos's factors of windows that reach so far overflow {q.dtype}"
    if q.device.type == "cuda" and max(q.shape[-1], v.shape[-1]) > MOST_HEAD:
        return f"kernels take heads up to {MOST_HEAD} wide"
    if q.device.type == "cpu":
        tensors = [x for x in (q, k, v, call.attn_bias) if x is not None]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return "FlexAttention has no backward pass on the CPU; torch.no_grad() would do"
        if call.dropout > 0:
            return "FlexAttention gives no log-sum-exp on the CPU, which dropout needs"
    return None


def prepared(call: Call, flash: bool) -> Callable[..., Tensor]:
    """Local attention in one fused kernel, for calls like this one: q, k and v of 4 dimensions.

    Args:
        flash: take FlashAttention 4's kernel.

    Returns:
        A function of ``eager.attend``'s tensors, with its result.
    """
    q, k, v, masked = call.q, call.k, call.v, call.mask is not None
    xpos_base = None if call.xpos is None else call.xpos.base
    tuned = tuning_of(call, flash)
    settings = Settings(call.window, call.factor, call.shared_qk, call.dropout, xpos_base, tuned)
    if torch.compiler.is_compiling():
        return partial(fused, settings, None)
    # What makes another kernel makes another callable: each has torch's recompile limit to itself.
    kind = [(x.dtype, x.device, x.shape[-1], x.requires_grad) for x in (q, k, v)]
    bias = call.attn_bias
    given = masked, None if bias is None else bias.shape[0], call.rotary is not None
    compiled = _compiled(settings, *kind, q.shape[1], k.shape[1], *given, torch.is_grad_enabled())
    device, blocks = q.device, settings.blocks(q.shape[-2], q.dtype, masked)

    def run(*tensors: Any) -> Tensor:
        if device.type == "cpu":  # its kernels refuse tensors that could require a gradient
            tensors = tuple(map(_detached, tensors))
        lists = None if masked else _lists(blocks, device)
        return compiled(lists, *tensors)

    return run


def warn_once(reason: str) -> None:
    """Says that a call on the GPU is not fused and why, the first time for that reason."""
    if reason not in _SAID:
        _SAID.add(reason)
        words = "local attention takes its eager path, which is slower"
        level = _level_outside()
        warnings.warn(f"{words}: {reason}. backend='eager' asks for it by name", stacklevel=level)


_SAID: set[str] = set()


def _level_outside() -> int:
    """The ``stacklevel`` with which the caller warns where the user's own code is."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours_or_torchs(frame):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours_or_torchs(frame: types.FrameType) -> bool:
    package, _, _ = frame.f_globals.get("__name__", "").partition(".")
    return package in (__package__, "torch")


def _exporting() -> bool:
    return torch.compiler.is_exporting()


# What torch.compiler.assume_constant_result does; calling it would import the compiler here. It
# has a compiler call these: torch 2.11's takes is_exporting() for true wherever it finds it.
_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
flash_installed._dynamo_marked_constant = True  # type: ignore[attr-defined]
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
let_through._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _compiled(settings: Settings, *kind: object) -> Callable[..., Tensor]:
    def call(lists: tuple[Tensor, ...] | None, *tensors: Any) -> Tensor:
        if not torch.compiler.is_compiling():  # FlexAttention would compute every score
            raise RuntimeError(
                "torch.compile left the fused kernel uncompiled (torch.compiler.set_stance?): "
                "backend must be 'eager' here"
            )
        return fused(settings, lists, *tensors)

    # The recompile limit counts per code object, so that each callable needs one of its own. In its
    # closure `settings` has the name that `_on_arguments_and_modes` knows.
    name = f"fused_{settings.window.label}_{abs(hash((settings, kind))):x}"
    own = types.FunctionType(
        call.__code__.replace(co_name=name), globals(), name, closure=call.__closure__
    )
    compiled: Callable[..., Tensor] = torch.compile(
        own,
        fullgraph=True,
        backend=_inductor,
        options={"guard_filter_fn": _on_arguments_and_modes},
    )
    return compiled


def _on_arguments_and_modes(guards: Sequence[Any]) -> list[bool]:
    """Which guards a callable keeps: not those that look after settings, modules and globals.

    Its key has settled these, and asking hundreds of them would cost more than the launch.
    """
    return [
        not guard.is_global and "settings" not in guard.name and "__import__" not in guard.name
        for guard in guards
    ]


def _inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """torch's compiler, told how gradients lie and that ``retain_graph=True`` may come.

    torch 2.11 takes the gradients of transposed views for contiguous, and copies them. And it has a
    backward pass write over what was saved for it, which a user who compiled nothing cannot expect.
    """
    from torch._functorch import config
    from torch._guards import TracingContext
    from torch._inductor.compile_fx import compile_fx

    with config.patch(
        guess_tangent_strides_as_outputs=True,
        donated_buffer=False,
        enable_autograd_cache=False,  # what it keeps is not mended; kernels have another cache
    ):
        compiled = compile_fx(graph, inputs)
    context = TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        # Mended: torch leaves None there, but refuses to retain a graph unless the list is empty.
        context.fw_metadata.bw_donated_idxs = []
    return compiled  # type: ignore[return-value]


def _lists(blocks: Blocks, device: torch.device) -> _Lists:
    """The lists of the block mask, kept from call to call."""
    made, stream = _made_lists(blocks, device), None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _lists_of_a_graph(blocks, device, made)
        # Another stream would have to wait for these, and for their memory to be free again.
        stream = torch.cuda.current_stream(device).cuda_stream
    if stream not in made:
        with torch.inference_mode(False), torch.no_grad():
            lists = blocks.lists(device)
        for x in lists:
            # Lengths share kernels from the second one on, whether or not their blocks are as many.
            torch._dynamo.maybe_mark_dynamic(x, 2)
        made[stream] = lists
    return made[stream]


@lru_cache(maxsize=256)
def _made_lists(blocks: Blocks, device: torch.device) -> dict[int | None, _Lists]:
    """Those that are kept, by stream."""
    return {}


def _lists_of_a_graph(
    blocks: Blocks, device: torch.device, made: dict[int | None, _Lists]
) -> _Lists:
    """Lists for a graph that is being captured, which reads them as long as it lives."""
    if made:  # by the calls before the capture, which ends their streams' work first
        return _CAPTURED.setdefault((blocks, device), tuple(made.values())[0])
    return blocks.lists(device)  # a part of the graph, and made again whenever it replays


_CAPTURED: dict[tuple[Blocks, torch.device], _Lists] = {}
"""What captured graphs read: kept for good, since nothing says when a graph is gone."""


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
