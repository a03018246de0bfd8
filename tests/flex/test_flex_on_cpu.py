"""The flex path where CI can run it: compiled on the CPU, inference only.

Each call compiles a kernel for some seconds, so there are few of them. The GPU's tests take every
feature and every gradient.
"""

import os
import subprocess
import sys

import oracle
import pytest
import torch
from budget import assert_within_budget
from compilers import MOST_GRAPHS, graphs, needs_compiled_kernels_on_the_cpu, quick
from features import feature

from flexlocal import LocalAttention, Rotary, Window, explain, local_attention
from flexlocal.flex import compile as compiling
from flexlocal.flex.kernel import Blocks
from flexlocal.flex.tuning import STOCK
from flexlocal.torch_limits.compiling import inductor

pytestmark = needs_compiled_kernels_on_the_cpu


def run(case, call):
    with torch.no_grad():
        return case.run(LocalAttention(**case.arguments(), backend="flex"), call)


NAMES = [
    "xpos, mask, bias, shared",
    "bias over rows",
    "shared both ways",
    "grouped queries",
]
FEATURES = {name: feature(name) for name in NAMES}
FEATURES["views, narrow values"] = feature("views", d_v=5)


@pytest.mark.parametrize("name", quick(FEATURES, kept=["grouped queries"]))
def test_features_against_the_oracle(name):
    case = FEATURES[name]
    call = case.tensors(torch.float32)
    truth, rough = case.truth(call.to(torch.float64)), case.truth(call, torch.float32)
    assert_within_budget(run(case, call), rough, truth, torch.float32, "the output")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_lengths_share_kernels_and_give_the_right_result():
    """At most three compiles for a layer, whatever lengths it meets."""
    layer = LocalAttention(29, causal=True, dropout=0.0, autopad=True, backend="flex")
    for n in (301, 499, 130, 257, 640, 1025):
        q, k, v = (torch.randn(1, 2, n, size) for size in (16, 16, 24))
        with torch.no_grad():
            fused = layer(q, k, v).double()
        truth = oracle.attend(q, k, v, 29, causal=True)
        torch.testing.assert_close(fused, truth, rtol=1e-5, atol=1e-5)
    assert graphs() <= MOST_GRAPHS


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_lengths_with_a_last_token_that_sees_only_itself():
    flags = {"look_backward": 0, "exact_windowsize": True, "shared_qk": True, "autopad": True}
    layer = LocalAttention(20, dropout=0.0, **flags, backend="flex")
    for n in (150, 333, 161):
        q, k, v = (torch.randn(1, 2, n, size) for size in (16, 16, 24))
        with torch.no_grad():
            found = layer(q, k, v).double()
        truth = oracle.attend(q, k, v, 20, look_backward=0, exact=True, shared_qk=True)
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    assert graphs() <= MOST_GRAPHS


@pytest.mark.slow
@pytest.mark.usefixtures("graphs_without_code")
def test_calls_of_one_shape_take_the_kernel_of_their_arguments():
    """What is left out of a call or added to it makes another kernel, in whatever order."""
    q, k, v = torch.randn(3, 2, 3, 60, 16)
    keep, bias = torch.rand(2, 60) > 0.3, torch.randn(3, 10, 20)
    arguments = [
        {},
        {"rotary": Rotary(16)},
        {"attn_bias": bias},
        {"rotary": Rotary(16, True, 5)},
        {"mask": keep},
        {"mask": keep, "attn_bias": bias},
        {"shared_qk": True},
        {"mask": keep, "rotary": Rotary(16)},
        {"attn_bias": bias[:1]},
        {"scale": 2.0},
    ]
    for _ in range(2):
        for more in arguments:
            for tensors in ((q, k, v), (q, q, v), (k, v, v), (q, q, q)):
                with torch.no_grad():
                    found, expected = (
                        local_attention(*tensors, Window(10, causal=True), backend=backend, **more)
                        for backend in ("flex", "eager")
                    )
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_transposed_view_is_taken_as_it_lies():
    """As a GPU's callables are compiled; here on a sum, since attention has no gradient there."""
    torch.compiler.reset()
    total = torch.compile(lambda x, y: 2 * x + y, fullgraph=True, backend=inductor)
    x, y, grad = (torch.randn(2, 30, 4, 16).transpose(1, 2) for _ in range(3))
    leaves = [x.requires_grad_(), y.requires_grad_()]
    torch.autograd.grad(total(x, y), leaves, grad)
    out = total(x, y)
    with torch.profiler.profile(acc_events=True) as profile:
        found = torch.autograd.grad(out, leaves, grad)
    assert torch.equal(found[0], 2 * grad)
    assert torch.equal(found[1], grad)
    assert not [event.name for event in profile.events() if "copy" in event.name]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_graph_that_is_retained(dynamic, wrapped, tmp_path, monkeypatch):
    """As a GPU's callables are compiled; torch would have the first pass overwrite what it saved.

    Compiled twice, the second time from what lies on the disk; with lengths that change, both
    passes at once.

    Args:
        wrapped: torch's own wrappers call it, since a result is a view of an input.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def mixed(x, y):
        found = (x @ y).sin()  # the product is saved, and its gradient could be written over it
        return (found, x.view(-1)[3:]) if wrapped else (found,)

    x, y = (torch.randn(50, 50, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(mixed(x, y)[0].sum(), (x, y))
    for _ in range(2):
        torch.compiler.reset()
        compiled = torch.compile(mixed, fullgraph=True, dynamic=dynamic, backend=inductor)
        torch.autograd.grad(compiled(x, y)[0].sum(), (x, y))  # nobody asks to retain this graph
        out = compiled(x, y)[0]
        assert ("Compiled" in out.grad_fn.name()) == wrapped
        out = out.sum()
        for retain in (True, False):
            found = torch.autograd.grad(out, (x, y), retain_graph=retain)
            torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("graphs_without_code")
def test_lengths_with_xpos_and_a_mask():
    """One origin serves the first; the second, whose length is open, lies in segments."""
    layers = [
        LocalAttention(12, dim=16, use_xpos=True, dropout=0.0, autopad=True, backend=backend)
        for backend in ("flex", "eager")
    ]
    for n in (30, 400):
        q, k, v = (torch.randn(3, 2, n, size) for size in (16, 16, 24))
        keep = torch.rand(6, n) > 0.3  # by head
        keep[1] = False  # its queries see nothing
        with torch.no_grad():
            found, expected = (layer(q, k, v, mask=keep) for layer in layers)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_bias_in_float64():
    case = feature("bias")
    call = case.tensors(torch.float32)
    bias = call.bias.double()
    with torch.no_grad():
        layer = LocalAttention(**case.arguments(), backend="flex")
        found, expected = (layer(call.q, call.k, call.v, attn_bias=x) for x in (bias, call.bias))
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_the_default_dtype_is_no_scores():
    """fp32 stays fp32 where two plain numbers would be of another dtype."""
    case = feature("xpos, mask, bias, shared")
    call = case.tensors(torch.float32)
    expected = run(case, call)
    compiling._compiled.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(run(case, call), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_masks_and_biases_that_a_graph_computes():
    """Kernels of the CPU would not find them; nor a view of one mask for several batch entries."""
    q, v, bias = torch.randn(2, 4, 40, 16), torch.randn(2, 4, 40, 12), torch.randn(8, 24, 4)
    lengths, keep = torch.tensor([23, 9]), torch.rand(1, 40) > 0.3

    def computed(layer):
        mask = torch.arange(40) < lengths[:, None]
        out = layer(q, q, v, mask=mask, attn_bias=(2 * bias).permute(2, 0, 1))
        return out, layer(q, q, v, mask=keep)

    eager, fused = (LocalAttention(8, dropout=0.0, backend=name) for name in ("eager", "flex"))
    with torch.no_grad():
        found = torch.compile(computed, fullgraph=True)(fused)
    torch.testing.assert_close(found, computed(eager), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("d", [8, 16])
def test_nothing_behind_the_last_key_is_read(d):
    """Without AVX-512, a kernel for heads so narrow read eight keys more, and wrote with them."""
    n = 40
    k = torch.full((2, 3, n + 8, d), torch.nan)[:, :, :n].normal_()
    q, v = torch.randn(2, 3, n, d), torch.randn(2, 3, n, 24)
    layer = LocalAttention(10, dropout=0.0, backend="flex")
    with torch.no_grad():
        found = layer(q, k, v).double()
    torch.testing.assert_close(found, oracle.attend(q, k, v, 10), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dropout", "sinks", "return_lse"])
def test_what_needs_a_log_sum_exp_is_refused(name):
    q = torch.randn(1, 2, 24, 16)
    given = {"dropout": 0.1, "sinks": torch.zeros(2), "return_lse": True}[name]
    says = f"gives no log-sum-exp on the CPU, which {name} needs. backend must be 'auto'"
    with torch.no_grad(), pytest.raises(ValueError, match=says):
        local_attention(q, q, q, 8, backend="flex", **{name: given})
    assert explain(q, q, q, 8, **{name: given}).backend == "eager"


def test_xpos_that_would_overflow_is_refused():
    layer = LocalAttention(16, True, 8, dim=16, use_xpos=True, dropout=0.0, backend="flex")
    q = torch.randn(1, 2, 64, 16, dtype=torch.float16)
    with torch.no_grad(), pytest.raises(ValueError, match=r"xpos.*overflow torch\.float16"):
        layer(q, q, q)


def test_it_raises_rather_than_compute_every_score():
    q = torch.randn(1, 1, 64, 16)
    layer = LocalAttention(8, dropout=0.0, backend="flex")
    refused = pytest.raises(RuntimeError, match="backend must be 'eager' here")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), refused:
        layer(q, q, q)


def test_a_compiler_that_is_switched_off_is_no_fused_path():
    code = (
        "import torch; from flexlocal.torch_limits.kernels import unavailable;"
        "print(unavailable(torch.device('cpu')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert "switched off" in done.stdout


def test_blocks_that_no_list_names_are_skipped(monkeypatch):
    """The mask alone would show their keys."""
    listed = compiling._lists
    none = lambda *kind: tuple(map(torch.zeros_like, listed(*kind)))  # noqa: E731
    monkeypatch.setattr(compiling, "_lists", none)
    q, k, v = (torch.randn(1, 2, 512, size) for size in (16, 16, 24))
    layer = LocalAttention(64, causal=True, dropout=0.0, backend="flex")
    with torch.no_grad():
        assert torch.equal(layer(q, k, v), torch.zeros_like(v))


def test_blocks_whose_keys_are_all_hidden_are_not_listed():
    kept = torch.ones(1, 1, 512, dtype=torch.bool)
    kept[..., :256] = False
    window = Window(64, causal=True)
    blocks = Blocks(window, 512, 512, (1, 1), masked=True, shared_qk=False, tuning=STOCK)
    lists = blocks.lists(kept.device, kept)
    partial, full, by_key, full_by_key = lists[::2]  # counts, of blocks of 128 tokens
    assert (partial + full).flatten().tolist() == [0, 0, 1, 2]
    assert (by_key + full_by_key).flatten().tolist() == [0, 0, 2, 1]
