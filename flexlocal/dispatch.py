"""Which path a call takes, and why; what is prepared for calls of one kind is kept.

A further call of a kind skips the checks, which would take longer than launching the kernel.
"""

import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from .autocast import autocast_dtype
from .checks import check_call
from .eager import apart, fused
from .eager import attend as eager
from .flex import compile as flex
from .flex import engines, support, tuning
from .flex.engines import Engine
from .masks import Rule, Window
from .positions import rule_of
from .shapes import shaped
from .spec import Inputs, Result, Spec, numbered, resolved, wants_gradients, with_plain_numbers
from .torch_limits.tracing import is_tracing, is_transformed, refuse_old_onnx, seen_as_constant


@dataclass(frozen=True)
class Choice:
    """The path that a call takes.

    Attributes:
        backend: ``"flex"`` or ``"eager"``.
        reason: why, in a line.
        engine: whose kernels serve on the flex path; None on the eager one.
        fault: what is wrong with an installed FlashAttention 4 that would be faster; None else.
    """

    backend: Literal["flex", "eager"]
    reason: str
    engine: Engine | None = None
    fault: str | None = None

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


_KERNEL = {
    "flex": "",
    "dense": ", scaled_dot_product_attention's: for so few tokens no length has to be compiled",
    "flash": ", FlashAttention 4's, called directly: measured to be faster at this size",
    "flash by flex": ", FlashAttention 4's: measured to be faster at this size",
}


def choose(spec: Spec, inputs: Inputs) -> Choice:
    """The path for a call that is checked and resolved.

    Raises:
        ValueError: ``backend="flex"`` where the fused kernel cannot run; says why.
    """
    if spec.backend == "eager":
        return Choice("eager", "asked for by name")
    device = inputs.q.device.type
    if spec.backend == "auto" and device != "cuda":
        refusal: str | None = f"auto takes the fused kernel on a GPU, and q is on {device}"
    else:
        refusal = support.refusal(spec, inputs)
    if refusal is None:
        engine, fault = engines.preferred(spec, inputs)
        reason = "one fused kernel on the GPU" if spec.backend == "auto" else "asked for by name"
        note = "" if fault is None else f"; FlashAttention 4's would be faster, but {fault}"
        return Choice("flex", reason + _KERNEL[engine] + note, engine, fault)
    if spec.backend == "auto":
        unused = spec.kernel_options is not None
        note = "; kernel_options have no kernel to go to" if unused else ""
        return Choice("eager", refusal + note)
    raise ValueError(
        f"backend 'flex' cannot run this call: {refusal}. backend must be 'auto' or 'eager' here"
    )


def explained(spec: Spec, inputs: Inputs) -> Choice:
    """The path for a call as it is given, and on a processor how its tiles are computed.

    Raises:
        ValueError, TypeError: an argument does not fit, or the fused kernel cannot run.
    """
    spec, inputs = checked(spec, inputs)
    choice, inputs = choose(spec, inputs), numbered(shaped(inputs))
    if choice.backend != "eager":
        return choice
    reasons = [choice.reason]
    pieces = apart.pieces_of(spec, inputs, wants_gradients(inputs))
    if pieces is not None:
        inputs = apart.longest_alone(inputs, pieces)
        reasons.append("documents are calls of their own where that costs less")
    if fused.serves(spec, rule_of(spec, inputs), inputs):
        reasons.append(_BY_TORCH)
    return replace(choice, reason="; ".join(reasons))


_BY_TORCH = "scaled_dot_product_attention computes its tiles: measured to be faster at this size"


Run = Callable[[Inputs], Result]

Prepared = tuple[Run, torch.dtype | None]
"""What all calls of one kind share: the path, and the dtype that autocast wants for q, k and v."""

_PREPARED: dict[object, Prepared] = {}
_MOST_KEPT = 1024

Made = TypeVar("Made")


def attend(spec: Spec, inputs: Inputs) -> Result:
    """Local attention by the path that suits the call.

    Returns:
        ``(*lead, n, d_v)``, and with ``return_lse`` the log-sum-exps, ``(*lead, n)``.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    spec = with_plain_numbers(spec)
    if torch.compiler.is_compiling() or is_tracing():
        refuse_old_onnx()
        run, dtype = _prepare(spec, inputs)
    else:
        run, dtype = kept(_PREPARED, partial(_prepare, spec, inputs), spec, inputs)
    q = inputs.q
    if spec.dropout == 0:
        if inputs.seed is not None:
            inputs = inputs._replace(seed=None)
    elif inputs.seed is None:
        inputs = inputs._replace(seed=torch.randint(2**63 - 1, (), device=q.device))
    found = run(shaped(inputs, dtype))
    if isinstance(found, Tensor):
        return found if q.dim() == 4 else found.reshape(*q.shape[:-1], found.shape[-1])
    out, lse = found
    return out.reshape(*q.shape[:-1], out.shape[-1]), lse.reshape(q.shape[:-1])


def turned(spec: Spec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Queries and keys of a call without xpos, rotated as the path that it takes does it first.

    Returns:
        Both in the shapes that they came in.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    spec = with_plain_numbers(spec)
    make = partial(_prepare_turning, spec, inputs)
    compiling = torch.compiler.is_compiling() or is_tracing()
    run = make() if compiling else kept(_TURNING, make, spec, inputs)
    q, k = run(shaped(inputs))
    return q.reshape(inputs.q.shape), k.reshape(inputs.k.shape)


_TURNING: dict[object, Callable[[Inputs], tuple[Tensor, Tensor]]] = {}


def _prepare_turning(spec: Spec, inputs: Inputs) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    spec, inputs = checked(spec, inputs)
    if choose(spec, inputs).backend == "flex":
        return flex.turning(spec, shaped(inputs))
    return partial(eager.turned, spec)


def checked(spec: Spec, inputs: Inputs) -> tuple[Spec, Inputs]:
    """The call, its arguments checked: resolved, with q, k and v in autocast's dtype."""
    spec = with_plain_numbers(spec)
    if torch.compiler.is_compiling() and spec.rule.is_window:
        # Dynamo may make a window's numbers symbolic. A new Window has plain ints. It would guard
        # sixty details of dataclasses.replace.
        old = spec.rule.window
        new = Window(old.size, old.causal, old.look_backward, old.look_forward, old.exact)
        spec = spec._replace(rule=new)
    check_call(spec, inputs)
    dtype = autocast_dtype(inputs.q.device)
    if dtype is not None and inputs.q.dtype != torch.float64:
        q, k, v = (x.to(dtype) for x in inputs[:3])
        inputs = Inputs(q, k, v, *inputs[3:])
    return resolved(spec, inputs), inputs


def kept(
    made: dict[object, Made], make: Callable[[], Made], spec: Spec, inputs: Inputs, *more: object
) -> Made:
    """``make()``, called once for all calls of one kind.

    Args:
        made: what was made for other kinds, and is kept.
        more: what it depends on beside the call; hashable.
    """
    try:
        kind = _kind(spec, inputs), *more
        found = made.get(kind)
    except (AttributeError, TypeError, RuntimeError):  # an argument of a wrong type
        return make()
    if found is None:
        found = make()
        if len(made) >= _MOST_KEPT:
            made.clear()
        made[kind] = found
    return found


def _kind(spec: Spec, inputs: Inputs) -> object:
    """All that the checks and the preparation of a call depend on."""
    if spec.kernel_options is not None:
        spec = spec._replace(kernel_options=tuple(sorted(spec.kernel_options.items())))
    q, k, v, mask, bias, seed, inv_freq, zeta, rule_tensors, *others, cu_seqlens = inputs
    device = q.device.type
    reach = None
    if rule_tensors:  # which what is kept may not hold
        reach, spec = spec.rule.reach, spec._replace(rule=cast(Rule, type(spec.rule)))
    return (
        spec,
        reach,
        # 1 == 1.0 == True, but only one of them is a valid argument.
        type(spec.scale),
        type(spec.shared_qk),
        type(spec.dropout),
        type(spec.softcap),
        type(spec.return_lse),
        _kind_of(q),
        _kind_of(k),
        _kind_of(v),
        None if mask is None else _kind_of(mask),
        None if bias is None else _kind_of(bias),
        None if seed is None else _kind_of(seed),
        None if inv_freq is None else _kind_of(inv_freq),
        zeta is None,
        tuple([_kind_of(x) for x in rule_tensors]) if rule_tensors else None,
        None if others == _NO_OTHERS else tuple([_kind_of(x) for x in others]),
        None if cu_seqlens is None else _kind_of_sums(cu_seqlens),
        torch.is_grad_enabled(),
        is_transformed(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        tuning.overridden(),
    )


_NO_OTHERS = [None] * 6
"""``Inputs`` from ``sinks`` to ``seeing``, where none is given."""


def _kind_of(x: object) -> object:
    if not isinstance(x, Tensor):
        return type(x)
    near = x.is_contiguous() or x.stride()
    return type(x), x.shape, x.dtype, x.device, x.requires_grad, near


def _kind_of_sums(x: Tensor) -> object:
    """Without their count, which differs from packing to packing."""
    return type(x), x.dim(), x.numel() > 0, x.dtype, x.device, x.is_contiguous()


def _prepare(spec: Spec, inputs: Inputs) -> Prepared:
    """Checks the arguments and picks the path."""
    given = inputs
    spec, inputs = checked(spec, inputs)
    choice = choose(spec, inputs)
    by_number = inputs.cu_seqlens is not None and choice.engine != "flash"
    if choice.engine is not None:
        if choice.fault is not None:
            warn_once(f"local attention goes on without FlashAttention 4's kernel: {choice.fault}")
        like = shaped(inputs)
        run = flex.prepared(spec, numbered(like) if by_number else like, choice.engine)
    else:
        on_gpu = inputs.q.device.type == "cuda" and inputs.q.numel() and inputs.v.numel()
        if spec.backend == "auto" and on_gpu:
            words = "local attention takes its eager path, which is slower"
            warn_once(f"{words}: {choice.reason}. backend='eager' asks for it by name")
        run = partial(eager.attend, spec)
    if by_number:
        run = partial(_of_numbered, run)
    cast = any(x.dtype != inputs.q.dtype for x in given[:3])
    return run, inputs.q.dtype if cast else None


def _of_numbered(run: Run, inputs: Inputs) -> Result:
    return run(numbered(inputs))


@seen_as_constant
def warn_once(message: str) -> None:
    """Warns of what ``auto`` goes without on a GPU, once for each message."""
    if message not in _SAID:
        _SAID.add(message)
        warnings.warn(message, stacklevel=_level_outside())


_SAID: set[str] = set()


def _level_outside() -> int:
    """The ``stacklevel`` with which a warning of the caller names the user's own line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours_or_torchs(frame):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours_or_torchs(frame: types.FrameType) -> bool:
    package, _, _ = frame.f_globals.get("__name__", "").partition(".")
    return package in (__package__, "torch")
