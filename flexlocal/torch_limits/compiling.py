"""torch's compiler, told what it gets wrong."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .passes import passes_of


def mark_length_dynamic(x: Tensor, dim: int) -> None:
    """Has lengths share a graph from the second one on, however many blocks they have."""
    torch._dynamo.maybe_mark_dynamic(x, dim)


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

    What a graph of ours is compiled to is called without torch's wrappers (``passes.py``).
    """
    from torch._functorch import config
    from torch._guards import TracingContext
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    passes: dict[bool, Any] = {}

    def compile_pass(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        found: Any = compile_fx_inner(graph, inputs, **options)
        passes[options.get("is_backward", False)] = found
        return found

    settings = config.patch(
        guess_tangent_strides_as_outputs=True,
        donated_buffer=False,
        force_non_lazy_backward_lowering=True,
        enable_autograd_cache=False,  # which has neither passes nor the list that is mended below
    )
    with settings, sizes_told_apart():
        compiled = compile_fx(graph, inputs, inner_compile=compile_pass)
    context = TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        # torch leaves None here, but refuses to retain a graph unless the list is empty.
        context.fw_metadata.bw_donated_idxs = []
        step = passes_of(passes, context.fw_metadata)
        if step is not None:
            return step
    return compiled  # type: ignore[return-value]
