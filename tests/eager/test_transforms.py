"""`torch.func`'s transforms, forward-mode derivatives and batches of gradients, against loops."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

from flexlocal import LocalAttention, Rotary, Window, local_attention

B, N, D, W = 3, 13, 4, 3
BOTH_WAYS, BACK = Window(W), Window(W, causal=True, look_backward=2, exact=True)
CALLS = {
    "plain": {"window": BACK},
    "rotary and mask": {"window": BOTH_WAYS, "rotary": Rotary(D), "mask": "mask"},
    "xpos": {"window": BACK, "rotary": Rotary(D, True, 2.0)},
    "shared and capped": {"window": BACK, "shared_qk": True, "softcap": 3.0},
    "bias and sinks": {"window": BOTH_WAYS, "attn_bias": "bias", "sinks": "sinks"},
    "dropout": {"window": BOTH_WAYS, "dropout": 0.4, "dropout_seed": torch.tensor(5)},
    "documents": {"window": BOTH_WAYS, "documents": torch.arange(N) // 5, "mask": "mask"},
    "offsets": {"window": BACK, "q_offset": torch.tensor([4]), "kv_offset": torch.tensor([2])},
}
each_call = pytest.mark.parametrize("name", CALLS)


def samples(batch=B):
    """q, k, v, and all that a sample may have of its own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, 2, N, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(batch, 2, W, 3 * W, generator=generator, dtype=torch.float64)
    sinks = torch.randn(batch, 2, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, 1, N, generator=generator) < 0.7
    return q, k, v, bias, sinks, mask


def attend(name, q, k, v, bias, sinks, mask):
    given = {"bias": bias, "sinks": sinks, "mask": mask}
    call = {
        key: given[value] if isinstance(value, str) else value for key, value in CALLS[name].items()
    }
    out, lse = local_attention(q, k, v, backend="eager", return_lse=True, **call)
    return torch.cat((out, lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), dim=-1)


def loss(name, *sample):
    return attend(name, *sample).square().sum()


def looped(function, *tensors):
    found = [function(*each) for each in zip(*tensors, strict=True)]
    return [torch.stack(x) for x in zip(*found, strict=True)]


def close(found, expected):
    for ours, true in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9)


def plain_gradients(name, *sample, learned=5):
    leaves = [x.detach().requires_grad_() for x in sample[:learned]]
    total = loss(name, *leaves, *sample[learned:])
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@each_call
def test_vmap_and_gradients_by_sample(name):
    data = samples()
    close([vmap(partial(attend, name))(*data)], looped(lambda *x: [attend(name, *x)], *data))
    by_sample = vmap(grad(partial(loss, name), argnums=tuple(range(5))))(*data)
    close(by_sample, looped(partial(plain_gradients, name), *data))


@pytest.mark.parametrize("which", range(5))
def test_vmap_over_one_tensor(which):
    """The others are shared, as a model's bias is."""
    data = samples()
    for name in ("bias and sinks", "rotary and mask", "shared and capped"):
        given = [x if i == which else x[0] for i, x in enumerate(data)]
        places = tuple(0 if i == which else None for i in range(6))
        found = vmap(partial(attend, name), in_dims=places)(*given)
        close(
            [found],
            looped(
                lambda x, given=given, name=name: [
                    attend(name, *given[:which], x, *given[which + 1 :])
                ],
                data[which],
            ),
        )


# torch's own derivatives in forward mode
pushes_forward = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


@pushes_forward
@each_call
def test_vjp_and_jvp(name):
    """<J t, c> = <t, J' c>, with the gradient of the usual way for the right side."""
    sample = [x[0] for x in samples()]
    run = partial(attend, name, **{"mask": sample[5]})
    tangents = [torch.randn_like(x) for x in sample[:5]]
    out, pull = vjp(run, *sample[:5])
    cotangent = torch.randn_like(out)
    leaves = [x.detach().requires_grad_() for x in sample[:5]]
    true = torch.autograd.grad(run(*leaves), leaves, cotangent, allow_unused=True)
    true = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, true, strict=True)]
    close(pull(cotangent), true)
    same, pushed = jvp(run, tuple(sample[:5]), tuple(tangents))
    close([out], [same])
    expected = sum((x * t).sum() for x, t in zip(true, tangents, strict=True))
    close([(pushed * cotangent).sum()], [expected])
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(sample[:5], tangents, strict=True)]
        close([forward_ad.unpack_dual(run(*duals)).tangent], [pushed])


@each_call
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_batch_of_gradients(name, create_graph):
    sample = [x[0] for x in samples()]
    leaves = [x.detach().requires_grad_() for x in sample[:5]]
    out = attend(name, *leaves, sample[5])
    cotangents = torch.randn(4, *out.shape, dtype=torch.float64)
    take = partial(torch.autograd.grad, out, leaves, retain_graph=True, allow_unused=True)
    found = take(cotangents, is_grads_batched=True, create_graph=create_graph)
    one_by_one = [take(x) for x in cotangents]
    for index, ours in enumerate(found):
        if ours is None:
            assert all(x[index] is None for x in one_by_one)
        else:
            close([ours], [torch.stack([x[index] for x in one_by_one])])
            assert ours.requires_grad == create_graph


@pushes_forward
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_a_vectorized_jacobian(strategy):
    q, k, v = (x[0, :1] for x in samples()[:3])
    run = lambda q, k, v: local_attention(q, k, v, BOTH_WAYS, rotary=Rotary(D))  # noqa: E731
    found = torch.autograd.functional.jacobian(run, (q, k, v), vectorize=True, strategy=strategy)
    close(found, torch.autograd.functional.jacobian(run, (q, k, v)))


@pushes_forward
def test_a_hessian():
    q, k, v = (x[0, :1, :5] for x in samples()[:3])
    run = lambda q: local_attention(q, k, v, BACK).square().sum()  # noqa: E731
    close([hessian(run)(q)], [torch.autograd.functional.hessian(run, q)])


def test_a_vmap_of_the_usual_gradient():
    """The transform begins after the forward pass."""
    q, k, v = (x[0].requires_grad_() for x in samples()[:3])
    out = local_attention(q, k, v, BACK)
    cotangents = torch.randn(4, *out.shape, dtype=torch.float64)
    take = partial(torch.autograd.grad, out, (q, k, v), retain_graph=True)
    close(vmap(take)(cotangents), looped(take, cotangents))


def test_a_call_after_a_transform_is_prepared_anew():
    q = torch.randn(2, 2, 12, D, requires_grad=True, dtype=torch.float64)
    run = lambda q: local_attention(q, q, q, BACK).sum()  # noqa: E731
    before, transformed = run(q), vmap(run)(torch.stack((q, q)))
    close(transformed, [before, before])
    close([run(q)], [before])


def test_the_layer_by_its_parameters():
    """An ensemble: a batch of weights around one layer."""
    model = torch.nn.Sequential(torch.nn.Linear(D, D), SelfAttention()).double()
    stacked = {name: torch.stack((x, 2 * x)) for name, x in model.state_dict().items()}
    x = samples()[0][0]
    found = vmap(lambda state: functional_call(model, state, (x,)))(stacked)
    each = [{name: x[i] for name, x in stacked.items()} for i in range(2)]
    close(found, [functional_call(model, state, (x,)) for state in each])


class SelfAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = LocalAttention(W, causal=True, autopad=True, dropout=0.0)

    def forward(self, x):
        return self.attention(x, x, x)


def test_vmap_over_documents_and_offsets_alone():
    q, k, v = (x[0] for x in samples()[:3])
    documents, offsets = torch.arange(4 * N).view(4, N) // 6, torch.tensor([[0], [5], [-2], [3]])
    for shared in (False, True):
        run = lambda documents, offset, shared=shared: local_attention(  # noqa: E731
            q, k, v, BOTH_WAYS, shared_qk=shared, documents=documents, q_offset=offset
        )
        close(
            [vmap(run)(documents, offsets)],
            looped(lambda *x, run=run: [run(*x)], documents, offsets),
        )


@pytest.mark.gpu
def test_auto_leaves_the_kernel_for_a_transform_on_a_gpu():
    q, k, v = torch.randn(3, 2, 2, 256, 32, device="cuda")
    window = Window(32, causal=True)
    run = lambda q: local_attention(q, k, v, window).square().sum()  # noqa: E731
    with pytest.warns(UserWarning, match="torch.func's transforms"):
        found = grad(run)(q)
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(run(leaf), leaf)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'flex' cannot run.*torch.func's transforms"):
        grad(lambda q: local_attention(q, k, v, window, backend="flex").sum())(q)
