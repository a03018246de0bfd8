"""Documents, offsets, softcap, sinks and log-sum-exps inside a compiler, on the eager path."""

import placed
import pytest
import torch
from compilers import MOST_GRAPHS, graphs, quick

from flexlocal import LocalAttention, Window, local_attention

KEPT = ["documents, xpos both ways, everything"]


@pytest.mark.parametrize("name", quick(placed.CASES, KEPT))
def test_compiled_training_gives_the_same(name):
    case = placed.CASES[name]
    call, rotary = case.tensors(torch.float64), case.rotary()
    torch.compiler.reset()
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    found, expected = (run(call, rotary=rotary, backend="eager") for run in (compiled, case.run))
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain)
    ours, plain = placed.gradients(found, call), placed.gradients(expected, call)
    for tensor in ours:
        torch.testing.assert_close(ours[tensor], plain[tensor])


@pytest.mark.usefixtures("fresh_compiler")
def test_packings_share_a_graph():
    layer = LocalAttention(8, causal=True, dim=8, dropout=0.0, backend="eager")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    q, k, v = (torch.randn(2, 3, 61, size) for size in (8, 8, 5))
    for number in range(20):
        begins = torch.rand(2, 61) < 1 / (1 + number)
        documents = begins.cumsum(1) - (number % 2)
        found = compiled(q, k, v, documents=documents)
        torch.testing.assert_close(found, layer(q, k, v, documents=documents))
    assert graphs() == 1


@pytest.mark.parametrize("as_tensor", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.usefixtures("fresh_compiler")
def test_pieces_of_a_prompt_share_graphs(as_tensor):
    window = Window.sliding(12)
    q, k, v = (torch.randn(1, 2, 400, size) for size in (8, 8, 5))
    whole = local_attention(q, k, v, window)

    def piece(q, k, v, offset):
        return local_attention(q, k, v, window, q_offset=offset, backend="eager")

    compiled = torch.compile(piece, fullgraph=True, backend="aot_eager")
    for start in range(0, 400, 40):
        offset = torch.tensor([start]) if as_tensor else start
        found = compiled(q[:, :, start : start + 40], k, v, offset)
        torch.testing.assert_close(found, whole[:, :, start : start + 40])
    assert graphs() <= (1 if as_tensor else MOST_GRAPHS)


def test_exported_with_documents():
    """For lengths that are longer than a tile and no multiple of one, as the example's."""
    layer = LocalAttention(8, causal=True, dropout=0.0, autopad=True).eval()
    q, k, v = (torch.randn(2, 3, 161, size) for size in (8, 8, 5))
    documents = (torch.rand(2, 161) < 0.1).cumsum(1)
    length = torch.export.Dim.DYNAMIC
    shapes = {"q": {2: length}, "k": {2: length}, "v": {2: length}, "documents": {1: length}}
    program = torch.export.export(
        layer, (q, k, v), {"documents": documents}, dynamic_shapes=shapes
    ).module()
    for n in (161, 147, 230):
        q, k, v = (torch.randn(2, 3, n, size) for size in (8, 8, 5))
        documents = (torch.rand(2, n) < 0.1).cumsum(1)
        found = program(q, k, v, documents=documents)
        torch.testing.assert_close(found, layer(q, k, v, documents=documents))
