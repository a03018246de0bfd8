"""Kernels that take a window as two numbers, made differentiable: FlashAttention 2 and cuDNN.

``left`` and ``right`` are the keys that a query sees before and after its own. Peers in ``peers``
call these; docs/comparison.md names the versions that were measured.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# torch's own FlashAttention 2. scaled_dot_product_attention hands it no window, the operator does.
_FLASH_FORWARD = torch.ops.aten._flash_attention_forward
_FLASH_BACKWARD = torch.ops.aten._flash_attention_backward


class FlashAttention2(torch.autograd.Function):
    """``(batch, n, heads, d)`` tensors and the two numbers."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
        n, ctx.window = q.shape[1], {"window_size_left": left, "window_size_right": right}
        no_lengths, dropout, causal, debug = (None, None), 0.0, False, False
        out, lse, *random, _ = _FLASH_FORWARD(
            q, k, v, *no_lengths, n, n, dropout, causal, debug, **ctx.window
        )
        ctx.save_for_backward(q, k, v, out, lse, *random)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *random = ctx.saved_tensors
        n, no_lengths, dropout, causal = q.shape[1], (None, None), 0.0, False
        grads = _FLASH_BACKWARD(
            grad, q, k, v, out, lse, *no_lengths, n, n, dropout, causal, *random, **ctx.window
        )
        return *grads, None, None


class Cudnn:
    """cuDNN's attention for ``(batch, heads, n, d)`` tensors, one graph for each kind of call."""

    def __init__(self, left: int, right: int) -> None:
        import cudnn

        self._cudnn = cudnn
        self._handle = cudnn.create_handle()
        # Its left bound counts the query's own key.
        self._band = {
            "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_left_bound": left + 1,
            "diagonal_band_right_bound": right,
        }
        self._plans: dict[object, _Plan] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled() and q.requires_grad:
            return _CudnnFunction.apply(q, k, v, self)
        return self.forward(q, k, v, stats=False)[0]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, stats: bool) -> tuple[Tensor, ...]:
        """The output and, with ``stats``, what the backward pass needs beside it."""
        inputs, outputs = {"q": q, "k": k, "v": v}, {"o": torch.empty_like(q)}
        if stats:
            outputs["stats"] = q.new_empty((*q.shape[:-1], 1), dtype=torch.float32)

        def operation(graph: Any, tensors: dict[str, Any]) -> Any:
            return graph.sdpa(
                **tensors, generate_stats=stats, attn_scale=q.shape[-1] ** -0.5, **self._band
            )

        self._run(("forward", stats), inputs, outputs, operation)
        return tuple(outputs.values())

    def backward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k and v from ``q``, ``k``, ``v``, ``o``, ``dO`` and ``stats``."""
        outputs = {f"d{name.upper()}": torch.empty_like(inputs[name]) for name in "qkv"}
        scale = inputs["q"].shape[-1] ** -0.5

        def operation(graph: Any, tensors: dict[str, Any]) -> Any:
            return graph.sdpa_backward(**tensors, attn_scale=scale, **self._band)

        self._run("backward", inputs, outputs, operation)
        return tuple(outputs.values())

    def _run(
        self, what: object, inputs: dict[str, Tensor], outputs: dict[str, Tensor], operation: Any
    ) -> None:
        tensors = {**inputs, **outputs}
        self._cudnn.set_stream(
            handle=self._handle, stream=torch.cuda.current_stream(inputs["q"].device).cuda_stream
        )
        kind = (what, *((x.dtype, x.shape, x.stride()) for x in tensors.values()))
        if kind not in self._plans:
            self._plans[kind] = self._plan(inputs, outputs, operation)
        self._plans[kind].run(tensors, self._handle)

    def _plan(
        self, inputs: dict[str, Tensor], outputs: dict[str, Tensor], operation: Any
    ) -> "_Plan":
        cudnn = self._cudnn
        types = {
            torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float16: cudnn.data_type.HALF,
            torch.float32: cudnn.data_type.FLOAT,
        }
        graph = cudnn.pygraph(
            handle=self._handle,
            io_data_type=types[inputs["q"].dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        ids = {name: number for number, name in enumerate((*inputs, *outputs), start=1)}
        given = {
            name: graph.tensor(
                name=name,
                dim=list(x.shape),
                stride=list(x.stride()),
                data_type=types[x.dtype],
                uid=ids[name],
            )
            for name, x in inputs.items()
        }
        # Without statistics the operation answers with one tensor and None.
        for made, (name, x) in zip(operation(graph, given), outputs.items(), strict=False):
            made.set_uid(ids[name]).set_output(True).set_data_type(types[x.dtype])
            made.set_dim(list(x.shape)).set_stride(list(x.stride()))
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return _Plan(graph, ids, graph.get_workspace_size())


@dataclass(frozen=True)
class _Plan:
    """A built graph, the numbers of its tensors and the bytes it works in."""

    graph: Any
    ids: dict[str, int]
    workspace: int

    def run(self, tensors: dict[str, Tensor], handle: Any) -> None:
        some = next(iter(tensors.values()))
        space = some.new_empty(max(1, self.workspace), dtype=torch.uint8)
        pack = {self.ids[name]: x for name, x in tensors.items()}
        self.graph.execute(pack, space, handle=handle)


class _CudnnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: Cudnn) -> Tensor:
        out, stats = attention.forward(q, k, v, stats=True)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.attention = attention
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats = ctx.saved_tensors
        if grad.stride() != out.stride():
            grad = torch.empty_like(out).copy_(grad)
        grads = ctx.attention.backward(q=q, k=k, v=v, o=out, dO=grad, stats=stats)
        return *grads, None
