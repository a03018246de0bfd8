"""What torch's compiler and FlexAttention's kernels cannot do, and the ways around it.

A workaround says which versions of torch need it and what goes wrong without it; one that a single
line of a path needs stands at that line. ``tests/package/test_workarounds.py`` lists them all, with
the tests that make a fault again and fail when torch has mended it. This is also the one file that
knows private names of torch. It imports torch only, so that any other may use it.
"""

import importlib.util
import math
import operator
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Index = TypeVar("Index", int, Tensor)
Function = TypeVar("Function", bound=Callable[..., Any])

# Limits of FlexAttention's kernels, torch 2.11 to 2.15.

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


def seen_as_constant(function: Function) -> Function:
    """Has a compiler call ``function`` while it traces, and take the result for a constant.

    As ``torch.compiler.assume_constant_result``, which would import the compiler here. torch 2.11
    takes ``is_exporting()`` for True wherever it traces it, so that it must not be traced.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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


# Sizes and bounds.


@seen_as_constant
def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` is at work."""
    return torch._C._get_tracing_state() is not None


def has_values(x: Tensor) -> bool:
    """Whether numbers of ``x`` and of what is made of it can be looked at.

    Not those of stand-ins, such as fake tensors, nor in a mode that records or fakes operators.
    """
    return has_address(x) and not torch._C._len_torch_dispatch_stack()


def has_address(x: Tensor) -> bool:
    """Whether ``x`` is a place in memory, and neither a stand-in nor made of other tensors."""
    return type(x) in (Tensor, torch.nn.Parameter)


def raw_stream(device: torch.device) -> int:
    """The address of a GPU's current stream; ``current_stream`` takes ten times as long to tell."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def state_of(x: Tensor) -> tuple[int, int] | None:
    """What is another once ``x`` has changed, unless it was through ``x.data``.

    None where nothing tells: of a stand-in, and of a tensor of inference mode.
    """
    return (x._version, x.data_ptr()) if has_values(x) and not x.is_inference() else None


def plain_int(size: int) -> int:
    """``size`` as a number, where a compiler made it symbolic.

    Kernels cannot be built for a symbolic number of heads, nor a mask_mod from a symbolic window;
    Dynamo makes both symbolic once it has met several (torch 2.11 to 2.15). Inside a compiler this
    guards on the number, and each one is a graph.
    """
    return operator.index(size)


def plain_float(x: float) -> float:
    """``x`` as a number, where a compiler made it symbolic; as ``plain_int``.

    ``dynamic=True`` makes settings of a layer symbolic, and Dynamo one that has changed. A kernel
    can capture none of them (torch 2.11 to 2.15).
    """
    if not torch.compiler.is_compiling():
        return x
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # a third of a second

    number: float = guard_scalar(x)
    return number


def is_symbolic(size: int) -> bool:
    """Whether a compiler is to make one graph for many sizes: to compare it would guard on it."""
    if is_tracing():  # sizes are 0-d tensors
        return True
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a third of a second

    return not has_static_value(size)


def at_least(value: Index, low: Index | int) -> Index:
    """``value``, or ``low`` where that is more.

    By ``torch.where`` and not ``clamp``: torch 2.13's Inductor fails on ``max(0, position)`` when
    it folds the positions of a block mask into index arithmetic ("vr must not be None").
    """
    if isinstance(value, Tensor):
        return torch.where(value > low, value, low)
    return max(value, low)


def at_most(value: Index, high: Index | int) -> Index:
    """``value``, or ``high`` where that is less; not by ``clamp``, as ``at_least``."""
    if isinstance(value, Tensor):
        return torch.where(value < high, value, high)
    return min(value, high)


# Transforms.


@seen_as_constant
def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, forward-mode differentiation, or a tracer.

    They take plain operators only: an ``autograd.Function`` that writes in place has no rule for
    ``vmap``, nor a derivative in forward mode, and ``torch.jit.trace`` cannot look inside (torch
    2.11 to 2.15).
    """
    stack = torch._C._functorch.peek_interpreter_stack()
    return is_tracing() or stack is not None or torch.autograd.forward_ad._current_level >= 0


def added_in_place(x: Tensor, y: Tensor) -> Tensor:
    """``x.add_(y)``; a new tensor for ``vmap``, which cannot write a batch into what is none.

    torch 2.11 to 2.15.
    """
    return x + y if is_transformed() else x.add_(y)


def for_each_gradient(
    function: Callable[..., Sequence[Tensor | None]], *grads: Tensor | None
) -> list[Tensor | None]:
    """``function`` of gradients, called for one at a time where they come in a batch.

    ``is_grads_batched`` and ``jacobian(vectorize=True)`` make such batches by an older ``vmap``,
    which knows few operators and cannot write a batch into what is none (torch 2.11 to 2.15).
    """
    is_batch = torch._C._functorch.is_legacy_batchedtensor
    batches = [x for x in grads if x is not None and is_batch(x)]
    if not batches:
        return list(function(*grads))
    level = torch._C._vmapmode_increment_nesting() - 1  # nothing else tells the level
    torch._C._vmapmode_decrement_nesting()
    count = len(torch._remove_batch_dim(batches[0], level, 0, 0))
    apart = [None if x is None else torch._remove_batch_dim(x, level, count, 0) for x in grads]
    found = [function(*(None if x is None else x[i] for x in apart)) for i in range(count)]
    return [
        None if each[0] is None else torch._add_batch_dim(torch.stack(each), 0, level)
        for each in zip(*found, strict=True)
    ]


# The kernel of scaled_dot_product_attention.

flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""The one for processors, by its own name.

It returns the log-sum-exps that its backward pass takes, which are not to be had of the public
function, nor does that take them (torch 2.11 to 2.15).
"""

flash_backward_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
"""Its backward pass."""

efficient_on_gpu = torch.ops.aten._scaled_dot_product_efficient_attention.default
"""The one for GPUs that takes a mask and any dtype, by its own name.

On Hopper the public function takes cuDNN's, which makes a plan for each size that it meets: 55 ms
forward and 60 backward (H200, torch 2.11).
"""

flash_on_gpu = torch.ops.aten._scaled_dot_product_flash_attention.default
"""The one for GPUs and 16 bits that takes no mask, likewise."""


@lru_cache
def multiplies_float16() -> bool:
    """Whether this processor multiplies fp16 numbers, as that kernel asks."""
    return not torch.backends.mkldnn.is_available() or bool(
        torch.ops.mkldnn._is_mkldnn_fp16_supported()
    )


# Memory.


def written_out(x: Tensor) -> Tensor:
    """``x``; inside ``torch.compile`` a contiguous buffer of its own.

    Inductor computes a small table anew for every element that reads it, and the CPU's kernel can
    look up nothing that the graph computes (torch 2.11 to 2.15: a C++ error). It may also transpose
    block lists and captured tensors, whose strides a GPU's kernels take for granted (torch 2.11:
    illegal memory access). ``as_strided`` prevents all three.
    """
    return settled(x) if torch.compiler.is_compiling() else x


def settled(x: Tensor) -> Tensor:
    """``written_out`` for code that is traced while ``is_compiling()`` is False.

    Not for tensors whose elements are all equal: Inductor makes a constant of them, and may leave
    gaps between its rows (torch 2.11).
    """
    # Inductor may know the strides only as quotients of symbolic sizes. These are products.
    strides = [math.prod(x.shape[dim + 1 :]) for dim in range(x.dim())]
    return x.contiguous().as_strided(x.shape, strides)


@torch.library.custom_op("flexlocal::copied", mutates_args=())
def copied(x: Tensor) -> Tensor:
    """``x`` in contiguous memory of its own, by an operator that Inductor fuses with no other.

    The CPU's FlexAttention kernel refuses neighbours that Inductor fused with it, and reads a view
    that the graph makes without its offset (torch 2.13).
    """
    return x.clone(memory_format=torch.contiguous_format)


@copied.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


copied.register_autograd(lambda ctx, grad: grad)


# Triton's tanh takes some thirty instructions, more than all else that is done to a score.


@torch.library.custom_op("flexlocal::fast_tanh", mutates_args=())
def fast_tanh(x: Tensor) -> Tensor:
    """``tanh`` of fp32 by the GPU's own instruction, whose relative error is 2**-11.

    For kernels alone, after ``lower_fast_tanh``; it has no gradient.
    """
    return x.tanh()


@torch.library.custom_op("flexlocal::fast_capped", mutates_args=())
def fast_capped(x: Tensor, bound: float) -> Tensor:
    """``bound * fast_tanh(x)``, with a gradient."""
    return x.tanh() * bound


@fast_tanh.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@fast_capped.register_fake
def _(x: Tensor, bound: float) -> Tensor:
    return torch.empty_like(x)


def _keep_both(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    x, ctx.bound = inputs
    ctx.save_for_backward(x, output)


def _gradient_of_capped(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    x, output = ctx.saved_tensors
    return grad * (ctx.bound - output * fast_tanh(x)), None


fast_capped.register_autograd(_gradient_of_capped, setup_context=_keep_both)


@seen_as_constant
def lower_fast_tanh() -> None:
    """Tells Inductor what the GPU's instruction is."""
    _lower_fast_tanh()


@lru_cache
def _lower_fast_tanh() -> None:
    from torch._inductor.lowering import make_pointwise, register_lowering
    from torch._inductor.virtualized import ops

    def tanh(x: Any) -> Any:
        asm = "tanh.approx.f32 $0, $1;"
        return ops.inline_asm_elementwise(x, asm=asm, constraints="=f,f", dtype=torch.float32)

    def capped(x: Any, bound: float) -> Any:
        return make_pointwise(lambda x: ops.mul(tanh(x), ops.constant(bound, torch.float32)))(x)

    operators = torch.ops.flexlocal
    register_lowering(operators.fast_tanh, type_promotion_kind=None)(make_pointwise(tanh))
    register_lowering(operators.fast_capped, type_promotion_kind=None)(capped)


def number_in_memory(n: int, device: torch.device) -> Tensor:
    """``n`` as a 0-d int32 buffer, so that kernels load it instead of specialising on it.

    Dropout's backward pass cannot capture a symbolic int (torch 2.11 to 2.15), nor a GPU's kernel
    arithmetic on one (torch 2.11).
    """
    # Not torch.full: Inductor would make a constant of it, and no buffer (torch 2.11 to 2.15).
    return written_out(torch.arange(n, n + 1, dtype=torch.int32, device=device).view(()))


# Values.


def stop_unless(true: Tensor, message: str, *, waits: bool = False) -> None:
    """Raises ``ValueError`` unless the 0-d ``true`` is; a GPU stops the program some time later.

    Compiled, it is asked when the program runs, and raises a ``RuntimeError``.

    Args:
        waits: wait for a GPU, and raise at once.
    """
    if torch.compiler.is_compiling() or not waits and true.device.type != "cpu":
        torch._assert_async(true, message)
    elif not true:
        raise ValueError(message)


# Compiling.


@seen_as_constant
def is_exporting() -> bool:
    """Whether ``torch.export`` is at work, or ``torch.jit.trace``."""
    return torch.compiler.is_exporting() or is_tracing()


def mark_length_dynamic(x: Tensor, dim: int) -> None:
    """Has lengths share a graph from the second one on, however many blocks they have."""
    torch._dynamo.maybe_mark_dynamic(x, dim)


def refuse_old_onnx() -> None:
    """torch's older ONNX exporter can neither unfold a tensor of any length nor pad it.

    torch 2.11 to 2.15.

    Raises:
        RuntimeError: it is at work.
    """
    if is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "torch's older ONNX exporter cannot hold local attention: "
            "torch.onnx.export(..., dynamo=True) does, for every length"
        )


def keep_guard(guard: Any, settled_names: Sequence[str]) -> bool:
    """Whether a compiled callable needs the guard: not on globals, nor on what its key settles."""
    return not guard.is_global and not any(name in guard.name for name in settled_names)


@contextmanager
def sizes_told_apart() -> Iterator[None]:
    """Has Inductor tell the sizes in a FlexAttention kernel of the CPU apart.

    It puts the sizes of a block in place of names such as ``ks2``, and does so inside ``ks20`` as
    well: a C++ error for masks that capture a tensor of some length (torch 2.11 to 2.15). Here
    those names are ``ku0`` and ``ku1``, since sizes that a template is given keep their own.
    """
    from torch._inductor.codegen.cpp_flex_attention_template import CppFlexAttentionTemplate

    template: Any = CppFlexAttentionTemplate
    generate = template.modification

    def modification(self: Any, *arguments: Any) -> Any:
        given = self.extra_sizevars
        self.extra_sizevars = [*given, *self.block_vars]
        try:
            return generate(self, *arguments)
        finally:
            self.extra_sizevars = given

    template.modification = modification
    try:
        yield
    finally:
        template.modification = generate


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """torch's compiler, told how gradients lie and that ``retain_graph=True`` may come.

    torch 2.11 takes the gradients of transposed views for contiguous, and copies them. Torch 2.11
    to 2.15 let a backward pass write over what was saved for it, and then refuse to retain a graph:
    a user who compiled nothing cannot expect it. They compile a backward pass at its own first
    call, while other threads may run (``flex/threads.py``); here it is with the forward pass.
    """
    from torch._functorch import config
    from torch._guards import TracingContext
    from torch._inductor.compile_fx import compile_fx

    settings = config.patch(
        guess_tangent_strides_as_outputs=True,
        donated_buffer=False,
        force_non_lazy_backward_lowering=True,
        enable_autograd_cache=False,  # it would keep graphs without the list that is mended below
    )
    with settings, sizes_told_apart():
        compiled = compile_fx(graph, inputs)
    context = TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        # torch leaves None here, but refuses to retain a graph unless the list is empty.
        context.fw_metadata.bw_donated_idxs = []
    return compiled  # type: ignore[return-value]
