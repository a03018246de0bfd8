"""cuDNN's attention, which takes a window as two numbers, made differentiable."""

from typing import Any

import torch
from torch import Tensor


class Cudnn:
    """Attention of ``(batch, heads, n, d)`` tensors, one graph for each kind of call.

    Args:
        left, right: keys that a query sees before and after its own.
    """

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
        self._types = {
            torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float16: cudnn.data_type.HALF,
            torch.float32: cudnn.data_type.FLOAT,
        }
        # Built graphs by the kind of call, each with the bytes that it works in.
        self._graphs: dict[object, tuple[Any, int]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled() and q.requires_grad:
            return _Function.apply(q, k, v, self)
        return self.forward(q, k, v, stats=False)[0]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, stats: bool) -> tuple[Tensor, ...]:
        """The output and, with ``stats``, what the backward pass needs beside it."""
        outputs = {"o": torch.empty_like(q)}
        if stats:
            outputs["stats"] = q.new_empty((*q.shape[:-1], 1), dtype=torch.float32)
        return self._run("sdpa", {"q": q, "k": k, "v": v}, outputs, generate_stats=stats)

    def backward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k and v from ``q``, ``k``, ``v``, ``o``, ``dO`` and ``stats``."""
        outputs = {f"d{name.upper()}": torch.empty_like(inputs[name]) for name in "qkv"}
        return self._run("sdpa_backward", inputs, outputs)

    def _run(
        self, what: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor], **flags: bool
    ) -> tuple[Tensor, ...]:
        tensors, device = {**inputs, **outputs}, inputs["q"].device
        stream = torch.cuda.current_stream(device).cuda_stream
        self._cudnn.set_stream(handle=self._handle, stream=stream)
        kind = what, *flags.items(), *((x.dtype, x.shape, x.stride()) for x in tensors.values())
        if kind not in self._graphs:
            self._graphs[kind] = self._built(what, inputs, outputs, flags)
        graph, size = self._graphs[kind]
        workspace = torch.empty(max(1, size), dtype=torch.uint8, device=device)
        # A tensor's number in the graph is its place.
        graph.execute(dict(enumerate(tensors.values(), 1)), workspace, handle=self._handle)
        return tuple(outputs.values())

    def _built(
        self, what: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor], flags: Any
    ) -> tuple[Any, int]:
        cudnn, q = self._cudnn, inputs["q"]
        graph = cudnn.pygraph(
            handle=self._handle,
            io_data_type=self._types[q.dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        given = {}
        for number, (name, x) in enumerate(inputs.items(), 1):
            sizes = {"dim": list(x.shape), "stride": list(x.stride())}
            given[name] = graph.tensor(
                name=name, **sizes, data_type=self._types[x.dtype], uid=number
            )
        made = getattr(graph, what)(**given, attn_scale=q.shape[-1] ** -0.5, **self._band, **flags)
        # Without statistics the operation answers with one tensor and None.
        for number, (one, x) in enumerate(zip(made, outputs.values(), strict=False), 1):
            one.set_uid(len(inputs) + number).set_output(True).set_data_type(self._types[x.dtype])
            one.set_dim(list(x.shape)).set_stride(list(x.stride()))
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return graph, graph.get_workspace_size()


class _Function(torch.autograd.Function):
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
