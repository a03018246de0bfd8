"""The eager path inside compilers, in torch.export, and the layer copied and saved."""

import copy
import io
import math
import pickle
from dataclasses import replace

import pytest
import torch
from compilers import MOST_GRAPHS, graphs, quick
from features import feature

from flexlocal import LocalAttention

NAMES = ["rotary, exact both ways", "xpos, mask, bias, shared", "mask by head", "grouped queries"]


def run(layer, case, call):
    out = case.run(layer, call)
    return (out, *torch.autograd.grad((out * call.cotangent).sum(), call.learned().values()))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_training_gives_the_same(name):
    """All tiles at once in the graph, some at a time outside: one result."""
    case = feature(name, n=205, lead=(2, 6))
    layer = LocalAttention(**case.arguments(), backend="eager")
    call = case.tensors(torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(run(compiled, case, call), run(layer, case, call), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "size", "n", "d", "d_v"),
    [
        ("plain", 64, 256, 48, 32),  # whose keys had a wrong gradient
        ("plain", 8, 64, 16, 24),  # whose gradient was written outside of its memory
        pytest.param("both ways", 16, 205, 8, 24, marks=pytest.mark.slow),
        pytest.param("bias over rows", 16, 96, 8, 12, marks=pytest.mark.slow),
    ],
)
def test_inductor_trains_it(name, size, n, d, d_v):
    """On the CPU `auto` takes the eager path inside a compiled model too."""
    rule = replace(feature(name).window, size=size)
    case = feature(name, window=rule, n=n, lead=(1, 2), d=d, d_v=d_v)
    layer = LocalAttention(**case.arguments())
    call = case.tensors(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for ours, plain in zip(run(compiled, case, call), run(layer, case, call), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_a_window_longer_than_the_sequence_costs_the_sequence():
    layer = LocalAttention(4096, causal=True, dropout=0.0, autopad=True, backend="eager")
    q, k, v = (torch.randn(1, 2, 24, size) for size in (8, 8, 6))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
        compiled(q, k, v)
    numels = [math.prod(shape) for event in profile.events() for shape in event.input_shapes]
    assert max(numels) == 2 * 24 * 24  # the scores of both heads


@pytest.mark.slow
def test_head_sizes_that_a_compiler_leaves_open():
    layers = [LocalAttention(8, dim=d, dropout=0.0, backend="eager") for d in (16, 32)]
    torch.compiler.reset()
    for layer in layers:
        q, k, v = (torch.randn(1, 2, 24, size) for size in (layer.dim, layer.dim, 12))
        expected = layer(q, k, v)
        for dynamic in (None, True):
            compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
            torch.testing.assert_close(compiled(q, k, v), expected)


@pytest.mark.parametrize("size", [16, 256], ids=["of some windows", "below one window"])
@pytest.mark.usefixtures("fresh_compiler")
def test_lengths_share_graphs(size):
    """Those of one tile as well: a graph for each would soon meet torch's limit."""
    layer = LocalAttention(size, causal=True, dropout=0.0, autopad=True, backend="eager")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (10, 20, 30, 41, 50, 60):
        q, v = torch.randn(1, 2, n, 8, requires_grad=True), torch.randn(1, 2, n, 6)
        (found,), (expected,) = (
            torch.autograd.grad(attend(q, q, v).square().sum(), q) for attend in (compiled, layer)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert graphs() <= MOST_GRAPHS


@pytest.mark.parametrize("lengths", [(205, 128, 61), (50, 64, 377)], ids=["tiles", "one tile"])
@pytest.mark.parametrize("name", quick(["rotary, exact both ways", "xpos", "mask"], kept=["mask"]))
def test_export_with_dynamic_length(name, lengths):
    """Exported at a ragged length of some windows, it holds for all."""
    n = lengths[0]
    case = feature(name, n=n, autopad=True)
    layer = LocalAttention(**case.arguments()).eval()
    call = case.tensors(torch.float32)
    inputs = tuple(x.detach() for x in (call.q, call.k, call.v))
    length = torch.export.Dim.DYNAMIC
    shapes = [{2: length}] * 3
    if call.mask is not None:
        inputs += (call.mask,)
        shapes += [{1: length}]
    exported = torch.export.export(layer, inputs, dynamic_shapes=tuple(shapes)).module()
    for n in lengths:
        other = feature(name, n=n).tensors(torch.float32)
        tensors = [other.q, other.k, other.v] + ([] if other.mask is None else [other.mask])
        with torch.no_grad():
            torch.testing.assert_close(exported(*tensors), layer(*tensors), rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_compute_the_same():
    layer = LocalAttention(7, dim=6, use_xpos=True, dropout=0.0)
    q, k, v = (torch.randn(2, 3, 35, size) for size in (6, 6, 5))
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(other(q, k, v), layer(q, k, v))


def test_a_cast_keeps_the_frequencies():
    """bf16 frequencies would turn a token at 10**4 by whole radians too much."""
    layer = LocalAttention(7, dim=6, use_xpos=True)
    before = {name: x.clone() for name, x in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert set(layer.state_dict()) == {"rel_pos.inv_freq"}
    for name, x in layer.named_buffers():
        assert x.dtype == torch.float32
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_frequencies_are_float32_whatever_the_default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = LocalAttention(7, dim=6, use_xpos=True)
    finally:
        torch.set_default_dtype(before)
    for (name, x), (_, expected) in zip(
        layer.named_buffers(),
        LocalAttention(7, dim=6, use_xpos=True).named_buffers(),
        strict=True,
    ):
        assert x.dtype == torch.float32, name
        assert torch.equal(x, expected)


def test_shapes_on_the_meta_device():
    q, v = (torch.empty(2, 3, 35, size, device="meta") for size in (6, 5))
    layer = LocalAttention(7, dim=6).to("meta")
    mask = torch.ones(2, 35, dtype=torch.bool, device="meta")
    assert layer(q, q, v, mask=mask).shape == v.shape


def test_the_meta_device_and_back():
    with torch.device("meta"):
        layer = LocalAttention(7, dim=6, use_xpos=True, dropout=0.0)
    layer.to_empty(device="cpu")
    layer.rel_pos.reset_parameters()
    q, k, v = (torch.randn(2, 3, 35, size) for size in (6, 6, 5))
    assert torch.equal(
        layer(q, k, v), LocalAttention(7, dim=6, use_xpos=True, dropout=0.0)(q, k, v)
    )
