"""The eager path as one operator, which compilers keep whole: what they make of it, and where."""

import pytest
import rules
import torch
from compilers import graphs, quick
from features import feature
from torch.utils.checkpoint import checkpoint

from flexlocal import LocalAttention, Rotary, Window, local_attention
from flexlocal.eager import apart, operator
from flexlocal.eager import call as arguments
from flexlocal.eager.apart import Costs

HEADS, KV_HEADS, N, D, D_V = 6, 3, 205, 8, 5
WINDOW = Window(7, causal=True)
CALLS = {
    "plain": {"window": WINDOW},
    "rotary, dropout": {
        "window": Window(5, exact=True),
        "rotary": Rotary(D),
        "dropout": 0.3,
        "dropout_seed": torch.tensor(3),
    },
    "xpos, capped": {"window": WINDOW, "rotary": Rotary(D, True, 8.0), "softcap": 3.0},
    "bias, mask, sinks, log-sum-exps": {
        "window": Window(7),
        "attn_bias": torch.randn(2, 7, 21),
        "mask": torch.rand(2, N) < 0.7,
        "sinks": torch.randn(HEADS),
        "return_lse": True,
    },
    "shared": {"window": Window(3), "shared_qk": True},
    "documents, mask": {
        "window": Window(9),
        "documents": torch.arange(2 * N).view(2, N) // 31,
        "mask": torch.rand(2, N) < 0.7,
    },
    "offsets": {"window": WINDOW, "q_offset": torch.tensor([4, -9]), "return_lse": True},
    "one offset": {"window": WINDOW, "q_offset": 11, "kv_offset": 5},
    "a rule by entry": {"window": rules.WindowOfEachEntry(torch.tensor([4, 90]), 90)},
    "a rule by head": {"window": rules.WiderByHead(3, HEADS)},
    "longer than all": {"window": Window(512, causal=True)},
}

KEPT = ["bias, mask, sinks, log-sum-exps", "a rule by entry"]


def tensors(n=N):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, HEADS, n, D), (2, KV_HEADS, n, D), (2, KV_HEADS, n, D_V)
    return [torch.randn(x, generator=generator).requires_grad_() for x in shapes]


def called(call):
    """The call as a function of q, k, v and what else is learned, and these."""
    fixed = {name: x for name, x in call.items() if name not in ("attn_bias", "sinks")}
    learned = {name: x.detach().requires_grad_() for name, x in call.items() if name not in fixed}

    def run(q, k, v, *more):
        return local_attention(q, k, v, **fixed, **dict(zip(learned, more, strict=True)))

    return run, list(learned.values())


def results(run, given):
    """The outputs and the gradients of a sum that treats all their elements differently."""
    found = run(*given)
    found = found if isinstance(found, tuple) else (found,)
    finite = [x.masked_fill(x == -torch.inf, 0.0) for x in found]
    total = sum((x * torch.linspace(-1, 2, x.numel()).view_as(x)).sum() for x in finite)
    return [*found, *torch.autograd.grad(total, given)]


def noting_operators(found):
    """A backend that runs a graph as it is, and notes the package's operators in it."""

    def backend(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        found.extend(x for x in targets if "in_tiles" in x or "matmul" in x)
        return graph.forward

    return backend


@pytest.mark.parametrize("name", quick(CALLS, KEPT))
def test_inside_a_compiler_the_same_code_runs(name):
    """To the last bit, gradients included, by one operator in the graph."""
    run, learned = called(CALLS[name])
    given, found = [*tensors(), *learned], []
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=noting_operators(found))
    for ours, plain in zip(results(compiled, given), results(run, given), strict=True):
        assert torch.equal(ours, plain)
    assert len(found) == 1
    assert "attend_in_tiles" in found[0]


LENGTHS = [[120, 30, 55], [20, 105, 80]]
DOCUMENTS = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(x)) for x in LENGTHS])
DOCUMENTS[1, -80:] = -1
CUT = {
    "plain": ({}, [120, 85, 20, 105, 80]),
    "masked": ({"mask": torch.rand(2, N) < 0.7}, [120, 85, 20, 105, 80]),
    "sinks": (
        {"sinks": torch.randn(HEADS), "return_lse": True}, [120, 85, 20, 105, 80]
    ),
    "one row": ({"documents": DOCUMENTS[0]}, [120, 85]),
    "all together": ({"documents": torch.arange(N) // 2}, [N]),
    "dropout": ({"dropout": 0.2, "dropout_seed": torch.tensor(5)}, [N]),
}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_documents_are_cut_inside_as_they_are_outside(name, monkeypatch, fresh_compiler):
    more, lengths = CUT[name]
    run, learned = called({"window": WINDOW, "documents": DOCUMENTS, **more})
    q, k, _ = tensors()
    v = k.detach().flip(-1).requires_grad_()  # as wide, so that torch's kernel may serve
    given, found, as_it_is = [q, k, v, *learned], [], operator._attend
    costs, threads = Costs(100, 0, 1, 0, 1), set()
    monkeypatch.setattr(apart, "costs_of", lambda *call: threads.add(call[3]) or costs)
    outside = results(run, given)
    threads.clear()
    monkeypatch.setattr(arguments, "_threads", lambda: 7)
    monkeypatch.setattr(
        operator, "_attend", lambda call: found.append(call.q.shape[2]) or as_it_is(call)
    )
    inside = results(torch.compile(run, fullgraph=True, backend="aot_eager"), given)
    for ours, plain in zip(inside, outside, strict=True):
        if plain.shape == (HEADS,):  # a sum over the calls, in another order
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(ours, plain)
    assert found == lengths
    assert threads <= {7}  # in the backward pass too, whatever has become of them since


@pytest.mark.parametrize("documents", [None, torch.arange(N) // 2, torch.arange(N) // 100])
@pytest.mark.parametrize("trains", [False, True])
def test_only_training_keeps_log_sum_exps(trains, documents):
    q, k, _ = tensors()
    given, kept = (q, k, k.detach().flip(-1)), []

    def backend(graph, inputs):
        class Noting(torch.fx.Interpreter):
            def call_function(self, target, args, kwargs):
                found = super().call_function(target, args, kwargs)
                if "attend_in_tiles" in str(target):
                    kept.append(found[1].numel())
                return found

        return Noting(graph).run

    run, _ = called({**CALLS["plain"], "documents": documents})
    torch.compiler.reset()
    with torch.set_grad_enabled(trains):
        found = torch.compile(run, fullgraph=True, backend=backend)(*given)
        assert torch.equal(found, run(*given))
    assert kept == [2 * HEADS * N if trains else 0]


def captured(name):
    """The arguments with which a call reaches the operator."""
    run, learned = called(CALLS[name])
    caught = []

    def backend(graph, inputs):
        class Catching(torch.fx.Interpreter):
            def call_function(self, target, args, kwargs):
                if "attend_in_tiles" in str(target):
                    caught.append(args)
                return super().call_function(target, args, kwargs)

        return Catching(graph).run

    torch.compiler.reset()
    torch.compile(run, fullgraph=True, backend=backend)(*tensors(n=70 if learned else N), *learned)
    (arguments,) = caught
    return [
        x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotary, dropout", "one offset"])
def test_the_operator_keeps_its_contract(name):
    """Its schema, its shapes and strides without numbers, its gradients under AOTAutograd."""
    torch.library.opcheck(operator.attend_in_tiles, tuple(captured(name)))


@pytest.mark.slow
def test_a_model_of_all_that_users_wrap_around_it():
    """Inductor, autocast, checkpointing and lengths that change, in one graph each."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(16, 48)
            self.attention = LocalAttention(8, causal=True, dim=8, autopad=True, dropout=0.0)

        def attend(self, x):
            q, k, v = self.inner(x).view(*x.shape[:2], 2, 24).transpose(1, 2).chunk(3, dim=-1)
            return self.attention(q, k, v).transpose(1, 2).flatten(2)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return x + checkpoint(self.attend, x, use_reentrant=False)

    torch.manual_seed(0)
    block = Block()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, fullgraph=True)
    for n in (40, 99):
        x = torch.randn(2, n, 16, requires_grad=True)
        ours, plain = (
            torch.autograd.grad(run(x).square().sum(), [x, *block.parameters()])
            for run in (compiled, block)
        )
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())
    assert graphs() <= 2


def test_exported_graphs_hold_operators_of_torch_alone():
    """They run without flexlocal, and other formats know them."""
    layer = LocalAttention(7, causal=True, autopad=True, dropout=0.0).eval()
    inputs = tuple(x.detach() for x in tensors())
    for strict in (False, True):
        program = torch.export.export(layer, inputs, strict=strict)
        parts = [x for x in program.graph_module.modules() if isinstance(x, torch.fx.GraphModule)]
        names = {str(node.target) for part in parts for node in part.graph.nodes}
        assert "aten.matmul.default" in names
        assert not {name for name in names if "flexlocal" in name}
        torch.testing.assert_close(program.module()(*inputs), layer(*inputs))


def test_a_transform_inside_a_compiler_is_shown_the_tiles():
    case = feature("plain", n=61, d=8, d_v=8)
    call, layer = case.tensors(torch.float64), LocalAttention(**case.arguments())
    run = torch.func.grad(lambda q: layer(q, call.k.detach(), call.v.detach()).square().sum())
    q = call.q.detach()
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(q), run(q))
