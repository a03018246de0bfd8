"""Faults of autograd, transforms and exporters, made again without what goes around them.

A test that fails says that this torch has mended the fault (``faults.mended``). Docstrings name the
workaround, and tests that fail when it is taken away.
"""

import io
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compilers import needs_compiled_kernels_on_the_cpu
from faults import TORCH, assert_refused, is_close, mended
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.function import once_differentiable

from flexlocal import LocalAttention, Window, local_attention
from flexlocal.eager.tiles import Sizes
from flexlocal.mods.shared_qk import unit_keys


def test_vmap_writes_no_batch_into_what_is_none():
    """``added_in_place``: test_transforms."""
    x, y = torch.zeros(3), torch.ones(2, 3)
    assert_refused(
        lambda: torch.vmap(lambda x, y: x.add_(y), (None, 0))(x, y), "shape", "added_in_place"
    )


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_later_keys_are_hidden_before_scores_are_scaled(scale):
    """``may_hide_first``: test_fused."""
    q = torch.randn(1, 2, 7, 8)
    found = F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale)
    assert found.isnan().any(), mended("a mask where the scale is 0 or less")


class Cube(torch.autograd.Function):
    """Of which kernels might compute the gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


def test_what_is_differentiable_once_leaves_constants_out():
    """``refuse_to_be_differentiated``: test_passes."""
    x = torch.ones(3, requires_grad=True)
    out = Cube.apply(x).sum()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    (found,) = torch.autograd.grad(out + gradient.sum(), x)
    assert not is_close(found, torch.full((3,), 3.0 + 6.0)), mended("refuse_to_be_differentiated")


class Doubled(torch.autograd.Function):
    """As the eager path's: a gradient is added up in memory that is no part of a batch."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros(5).add_(grad, alpha=2)


def test_an_older_vmap_cannot_add_its_batch_in_place():
    """``for_each_gradient``: test_transforms' tests of gradients that come in batches."""
    x = torch.zeros(5, requires_grad=True)
    batch = torch.ones(2, 5)
    assert_refused(
        lambda: torch.autograd.grad(Doubled.apply(x), x, batch, is_grads_batched=True),
        "out-of-place",
        "for_each_gradient",
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own, in forward mode
def test_a_function_of_autograd_has_no_rules_for_transforms():
    """``is_transformed``: test_transforms."""
    x = torch.zeros(2, 5)
    for run, said in (
        (lambda: torch.vmap(Doubled.apply)(x), "vmap|setup_context"),
        (lambda: torch.func.jvp(Doubled.apply, (x,), (x,)), "jvp|setup_context"),
    ):
        assert_refused(run, said, "is_transformed")


def test_normalize_has_no_second_derivative_at_0():
    """``unit_keys``, which has: test_eager_against_oracle's tests of second derivatives."""
    found = []
    for unit in (partial(F.normalize, dim=-1), unit_keys):
        x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(unit(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.sum(), x)[0])
    assert found[1].isfinite().all()
    assert found[0].isnan().any(), mended("unit_keys")


def test_attention_returns_no_log_sum_exps():
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(TypeError, match="return_lse"):
        F.scaled_dot_product_attention(q, q, q, return_lse=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_sizes_are_tensors_while_torch_jit_traces():
    """``is_tracing`` in ``is_symbolic``: test_exporters."""
    kinds = []

    def look(x):
        kinds.append(type(x.shape[0]))
        return x + 1

    torch.jit.trace(look, torch.zeros(3), check_trace=False)
    assert kinds[0] is torch.Tensor, mended("is_tracing")


class Pieces(torch.nn.Module):
    def forward(self, x):
        return x.unfold(1, 4, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`torch.jit.trace")
def test_the_older_onnx_exporter_cannot_unfold(capfd):
    """``refuse_old_onnx``: test_exporters' ``test_what_cannot_be_served_says_what_can``."""
    length = {"input_names": ["x"], "dynamic_axes": {"x": {1: "length"}}}
    assert_refused(
        lambda: torch.onnx.export(
            Pieces(), (torch.zeros(2, 9),), io.BytesIO(), dynamo=False, **length
        ),
        "unfold",
        "refuse_old_onnx",
    )


@pytest.mark.slow
def test_an_export_guards_on_tiles_that_are_just_enough(monkeypatch):
    """``Sizes.tiles`` of any length: test_exporters' tests of a named range."""
    layer = LocalAttention(8, causal=True, dropout=0.0, autopad=True)
    length = torch.export.Dim("length", min=10, max=4096)
    q = torch.randn(1, 2, 50, 16)

    def export():
        return torch.export.export(layer, (q, q, q), dynamic_shapes=({2: length},) * 3)

    export()
    monkeypatch.setattr(Sizes, "tiles", property(lambda sizes: -(-sizes.n // sizes.tile)))
    assert_refused(export, "constraints", "Sizes.tiles")


def unfolded(k):
    return F.pad(k, (0, 0, 8, 0)).unfold(2, 16, 8)


def products(k, q):
    return (q.view(1, 2, 8, 8, 16) @ unfolded(k)).square().sum()


def attention(k, q):
    """Under a transform, which the eager path's operator does not serve."""
    return local_attention(q, k, k, Window(8, causal=True), backend="eager").square().sum()


@needs_compiled_kernels_on_the_cpu
@pytest.mark.slow
def test_the_gradient_of_an_unfold_is_added_up_in_wrong_places():
    """``Tiles._overlapping`` inside a compiler, by two threads: the test after this one.

    torch 2.11 to 2.13. It may write outside of the gradient's memory and end the process, so that
    it has one of its own, which runs this file.
    """
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    right = done.returncode == 0 and "right" in done.stdout
    assert right or "wrong" in done.stdout or done.returncode < 0, done.stderr
    assert right == (TORCH >= (2, 14)), mended("Tiles._overlapping")


@pytest.mark.slow
def test_compilers_are_given_no_gradient_of_an_unfold():
    found = []

    def operators(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    k, q = torch.randn(2, 1, 2, 64, 16)
    for loss, has in ((products, True), (attention, False)):
        found.clear()
        backend = aot_autograd(fw_compiler=operators)
        torch.compile(torch.func.grad(loss), fullgraph=True, backend=backend)(k, q)
        assert any("unfold_backward" in name for name in found) == has


if __name__ == "__main__":
    torch.manual_seed(0)
    gradient = torch.func.grad(products)
    k, q = torch.randn(2, 1, 2, 64, 16)
    found = torch.compile(gradient, fullgraph=True, dynamic=False)(k, q)
    print("right" if is_close(found, gradient(k, q), 1e-3) else "wrong")
