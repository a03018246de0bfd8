"""cuDNN's attention, which takes a window as two numbers, made differentiable."""

from typing import Any

import torch
from torch import Tensor


class Cudnn:
    """Attention of ``(batch, heads, n, d)`` tensors to ``left`` and ``right`` keys around each."""

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
        # Built graphs by the kind of call, each with the bytes that it works in.
        self._graphs: dict[object, tuple[Any, int]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled() and q.requires_grad:
            return _Function.apply(q, k, v, self)
        out = torch.empty_like(q)
        self.run("sdpa", {"q": q, "k": k, "v": v}, {"o": out}, generate_stats=False)
        return out

    def run(
        self, what: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor], **flags: bool
    ) -> None:
        """Writes ``outputs``, in their order, by the operation ``what`` of a graph."""
        tensors, device = {**inputs, **outputs}, inputs["q"].device
        stream = torch.cuda.current_stream(device).cuda_stream
        self._cudnn.set_stream(handle=self._handle, stream=stream)
        kind = what, *flags.items(), *((x.dtype, x.shape, x.stride()) for x in tensors.values())
        if kind not in self._graphs:
            self._graphs[kind] = self._built(what, inputs, outputs, flags)
        graph, size = self._graphs[kind]
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        # A tensor's number in the graph is its place.
        graph.execute(dict(enumerate(tensors.values(), 1)), workspace, handle=self._handle)

    def _built(
        self, what: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor], flags: Any
    ) -> tuple[Any, int]:
        cudnn, q = self._cudnn, inputs["q"]
        kinds = cudnn.data_type
        types = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}
        types[torch.float32] = kinds.FLOAT
        graph = cudnn.pygraph(
            handle=self._handle,
            io_data_type=types[q.dtype],
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
        )
        given = {}
        for number, (name, x) in enumerate(inputs.items(), 1):
            sizes = {"dim": list(x.shape), "stride": list(x.stride())}
            given[name] = graph.tensor(name=name, **sizes, data_type=types[x.dtype], uid=number)
        made = getattr(graph, what)(**given, attn_scale=q.shape[-1] ** -0.5, **self._band, **flags)
        # Without statistics the operation answers with one tensor and None.
        for number, (one, x) in enumerate(zip(made, outputs.values(), strict=False), 1):
            one.set_uid(len(inputs) + number).set_output(True).set_data_type(types[x.dtype])
            one.set_dim(list(x.shape)).set_stride(list(x.stride()))
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return graph, max(1, graph.get_workspace_size())


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: Cudnn) -> Tensor:
        out, stats = torch.empty_like(q), q.new_empty((*q.shape[:-1], 1), dtype=torch.float32)
        given = {"q": q, "k": k, "v": v}
        attention.run("sdpa", given, {"o": out, "stats": stats}, generate_stats=True)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.attention = attention
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats = ctx.saved_tensors
        if grad.stride() != out.stride():
            grad = torch.empty_like(out).copy_(grad)
        inputs = {"q": q, "k": k, "v": v, "o": out, "dO": grad, "stats": stats}
        outputs = {name: torch.empty_like(x) for name, x in (("dQ", q), ("dK", k), ("dV", v))}
        ctx.attention.run("sdpa_backward", inputs, outputs)
        return *outputs.values(), None
