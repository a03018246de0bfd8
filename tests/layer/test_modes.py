"""Modes that hold for a whole program: default devices and dtypes, function modes, and others."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from budget import assert_within_budget
from torch.overrides import TorchFunctionMode

from flexlocal import LocalAttention, Rotary, Window, local_attention
from flexlocal.masks import KeyLayout
from flexlocal.masks.block_intervals import kept_blocks

HEADS, N, D, W = 4, 64, 16, 8


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Passes(TorchFunctionMode):
    """Sees every function of torch and changes none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


MODES = {
    "default device": lambda: default_device("meta"),
    "device as a context": lambda: torch.device("meta"),
    "function mode": Passes,
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "inference": torch.inference_mode,
}
ROTARY, XPOS = Rotary(D), Rotary(D, True, 4.0)
KEEP = torch.rand(2, N, generator=torch.Generator().manual_seed(1)) < 0.7
CALLS = {
    "xpos, dropout, mask": lambda: {
        "window": Window(W, causal=True), "rotary": XPOS, "mask": KEEP, "dropout": 0.3,
        "dropout_seed": torch.tensor(3, device="cpu"),
    },
    "documents, offsets": lambda: {
        "window": Window(W), "rotary": ROTARY, "shared_qk": True,
        "documents": torch.arange(N, device="cpu") // 9, "q_offset": 2, "kv_offset": 2,
    },
    "bias, sinks, cap": lambda: {
        "window": Window(W, causal=True, exact=True), "softcap": 4.0,
        "attn_bias": torch.full((HEADS, W, 2 * W), 0.5, dtype=torch.float32, device="cpu"),
        "sinks": torch.zeros(HEADS, dtype=torch.float32, device="cpu"),
    },
}  # fmt: skip


def results(name, wrap=None, learn=True):
    """Made with explicit devices and dtypes, as the call's own tensors must be."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, HEADS, N, D, generator=generator, device="cpu", dtype=torch.float32)
        for _ in range(3)
    )
    leaves = [x.requires_grad_(learn) for x in (q, k, v)]
    backend, more = "eager" if wrap is None else "flex", CALLS[name]()
    run = partial(local_attention, backend=backend, **more)
    out = (run if wrap is None else wrap(run))(*leaves)
    return [out.clone(), *(torch.autograd.grad(out.square().sum(), leaves) if learn else ())]


@pytest.mark.usefixtures("fresh_compiler")
def test_what_a_key_mask_and_xpos_add_to_a_graph_compiles_in_a_function_mode():
    """Dynamo traces no Tensor.unflatten there."""

    def made(mask, keys):
        layout = KeyLayout(Window(W), 2, N)
        return *kept_blocks(mask, 32), layout.from_slots(layout.in_slots(keys))

    keys = torch.randn(2, N, D)
    run = torch.compile(made, fullgraph=True, backend="eager")
    with Passes():
        found = run(KEEP, keys)
    for ours, true in zip(found, made(KEEP, keys), strict=True):
        assert torch.equal(ours, true)


def fused(run):
    return torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)


def check(mode, name, **more):
    learn = mode != "inference"
    expected = results(name, learn=learn)  # of the eager path, without the mode
    with MODES[mode]():
        found = results(name, learn=learn, **more)
    for ours, true in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_the_eager_path(name, mode):
    check(mode, name)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.usefixtures("dense_on_the_cpu", "fresh_compiler")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("xpos, dropout, mask", "default device"),
                ("documents, offsets", "function mode"),
                ("bias, sinks, cap", "default bfloat16"),
            )
        ),
    ],
)
def test_the_fused_path_inside_a_model(name, mode):
    check(mode, name, wrap=fused)


@pytest.mark.parametrize("mode", ["default device", "inference", "function mode"])
def test_a_layer_that_was_made_before_the_mode(mode):
    layer = LocalAttention(W, dim=D, use_xpos=True, dropout=0.0)
    q = torch.randn(1, 2, N, D)
    expected = layer(q, q, q)
    with MODES[mode]():
        assert torch.equal(layer(q, q, q), expected)
    assert torch.equal(layer(q, q, q), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("context", [lambda: default_device("cuda"), nullcontext, Passes])
@pytest.mark.parametrize("compiled", [False, True], ids=["outside", "inside"])
def test_a_default_device_on_a_gpu(context, compiled):
    """Training with xpos, dropout and a key mask, made and called under the mode."""
    torch.manual_seed(0)
    with context():
        layer = LocalAttention(64, causal=True, dim=32, use_xpos=True, dropout=0.2).cuda()
        run = torch.compile(layer, fullgraph=True) if compiled else layer
        q, k, v = (
            torch.randn(2, 3, 256, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        mask = torch.arange(256, device="cuda") < torch.tensor([[200], [256]], device="cuda")
        assert layer.explain(q, k, v, mask=mask).backend == "flex"
        out = run(q, k, v, mask=mask, dropout_seed=torch.tensor(3, device="cuda"))
        found = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    layer.backend = "eager"

    def by_eager(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = layer(*leaves, mask=mask, dropout_seed=torch.tensor(3, device="cuda"))
        wide = out.to(torch.promote_types(dtype, torch.float32))
        return out, *torch.autograd.grad(wide.square().sum(), leaves)

    names = "the output", "the gradient of q", "the gradient of k", "the gradient of v"
    plain, truth = by_eager(torch.bfloat16), by_eager(torch.float64)
    for ours, rough, true, what in zip((out, *found), plain, truth, names, strict=True):
        assert_within_budget(ours, rough, true, torch.bfloat16, what)
