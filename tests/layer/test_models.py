"""The layer in a model that trains: compilers, autocast, checkpointing, export and copies.

On the CPU training takes the eager path, and what is compiled goes to `aot_eager`, which traces
and differentiates as inductor does and generates no code. The same tests run the flex path on a
GPU.
"""

import copy
import io
import pickle
import warnings

import oracle
import pytest
import torch
from compilers import graphs, needs_compiled_kernels_on_the_cpu, never_dense, noting_dtypes
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformer import LAYERS, TOKENS, TWELVE_WINDOWS, Transformer, batch, loss_of, seeded

pytestmark = pytest.mark.usefixtures("fresh_compiler")

PLACES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]


def gradients(model, tokens, run=None):
    """name -> gradient of a model's parameter; `run` is the model as it is called."""
    loss = loss_of(model if run is None else run, tokens)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def losses(model, run, batches):
    """The loss of each step of a training, which leaves the model trained; `run` calls it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    curve = []
    for tokens in batches:
        loss = loss_of(run, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def compiled(module, device, **options):
    options = {"backend": "aot_eager"} if device == "cpu" else options
    return torch.compile(module, fullgraph=True, **options)


def assert_same(found, expected, rtol=1e-9, atol=1e-9):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name],
            expected[name],
            rtol=rtol,
            atol=atol,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def assert_as_exact(found, plain, truth, dtype):
    """Each is as near to the truth as plain arithmetic of the same dtype, up to a small factor."""
    for name, exact in truth.items():
        size = exact.norm()
        error, allowed = (x[name].double().sub(exact).norm() / size for x in (found, plain))
        allowed = 3 * allowed + 4 * torch.finfo(dtype).eps
        assert error <= allowed, f"{name} is {error:.3g} off, {allowed:.3g} is allowed"


# Training, compiled as a whole


def test_compiled_training_equals_uncompiled():
    batches = [batch(seed=step) for step in range(3)]
    found = []
    for wrap in (lambda model: compiled(model, "cpu"), lambda model: model):
        model = seeded(dtype=torch.float64, layers=4)
        run = wrap(model)
        first = gradients(model, batches[0], run)
        curve = torch.tensor(losses(model, run, batches))
        found.append({**first, **{f"trained {k}": p for k, p in model.state_dict().items()}})
        found[-1]["losses"] = curve
    assert_same(*found)
    assert graphs() == 1


@pytest.mark.gpu
def test_compiled_training_of_the_fused_path():
    tokens = batch("cuda")
    model = seeded("cuda")
    run = compiled(model, "cuda")
    assert str(
        model.blocks[0].attention.explain(torch.ones(1, 1, 1, 16, device="cuda"))
    ).startswith("flex")
    eager = seeded("cuda", backend="eager")
    truth = gradients(seeded("cuda", torch.float64, backend="eager"), tokens)
    assert_as_exact(gradients(model, tokens, run), gradients(eager, tokens), truth, torch.float32)

    batches = [batch("cuda", seed=step) for step in range(6)]
    # Steps of Adam divide small gradients by their size, and enlarge their roundings with it.
    curve = losses(model, run, batches)
    assert curve == pytest.approx(losses(eager, eager, batches), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch makes one first
def test_cuda_graphs_give_the_same_with_other_data():
    """A graph replays on the memory of its first call, where each step's data must arrive."""
    batches = [batch("cuda", seed=step) for step in range(8)]
    model, plain = seeded("cuda"), seeded("cuda", backend="eager")
    curve = losses(model, compiled(model, "cuda", mode="reduce-overhead"), batches)
    assert curve == pytest.approx(losses(plain, plain, batches), rel=1e-4)
    assert len(set(curve)) == len(curve)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("device", PLACES)
def test_one_compiled_model_over_many_lengths(device):
    dtype, tolerance = (torch.float64, 1e-9) if device == "cpu" else (torch.float32, 1e-4)
    model = seeded(device, dtype, layers=2)
    plain = seeded(device, dtype, layers=2, backend="eager")
    run = compiled(model, device)
    for n in (130, 200, 131, 97, 256, 333):
        tokens = batch(device, seed=n, n=n)
        found, expected = gradients(model, tokens, run), gradients(plain, tokens)
        assert_same(found, expected, tolerance, tolerance)
    print(f"{graphs()} graphs for 6 lengths")
    assert graphs() <= 3


# Layers compiled one by one: torch allows a piece of code eight graphs, and each window is one.
# On the CPU it allows three here, to save the time.


# torch's compiler looks at the .grad of every input, and warns itself of those that are no leaves.
LOOKS_AT_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.mark.slow
@LOOKS_AT_GRAD
@pytest.mark.parametrize("device", PLACES)
def test_blocks_compiled_one_by_one(device):
    check_compiled_one_by_one(device, lambda block: block)


@LOOKS_AT_GRAD
@pytest.mark.gpu
def test_attention_layers_compiled_one_by_one():
    check_compiled_one_by_one("cuda", lambda block: block.attention)


def check_compiled_one_by_one(device, part):
    """Past the limit a layer runs as if it had not been compiled: right, and on its own kernel."""
    tokens = batch(device)
    model = seeded(device, windows=TWELVE_WINDOWS)
    plain = seeded(device, windows=TWELVE_WINDOWS, backend="eager")
    truth = gradients(
        seeded(device, torch.float64, windows=TWELVE_WINDOWS, backend="eager"), tokens
    )
    config = torch._dynamo.config
    limit, options = config.recompile_limit, {}
    if device == "cpu":
        limit, options = 3, {"backend": "aot_eager"}
    for block in model.blocks:
        part(block).compile(**options)
    expected = gradients(plain, tokens)
    with config.patch(recompile_limit=limit):
        assert_as_exact(gradients(model, tokens), expected, truth, torch.float32)
        with never_dense(TOKENS):
            gradients(model, tokens)
    print(f"{graphs()} graphs for {LAYERS} layers, {limit} of one code")
    assert graphs() >= limit


def test_dense_attention_would_be_seen():
    q = torch.ones(1, 1, TOKENS, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once in a process that this is slow
        with pytest.raises(AssertionError, match="all pairs"), never_dense(TOKENS):
            flex_attention(q, q, q)


# Autocast


@pytest.mark.parametrize("device", PLACES)
def test_autocast_calls_the_kernel_in_its_dtype(device):
    """Rotary works in fp32; the kernel must not, or it takes several times as long."""
    model = seeded(device, layers=3, backend="flex")
    kernels = []
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        torch.compile(model, fullgraph=True, backend=noting_dtypes(kernels))(batch(device))
    assert kernels == [{torch.bfloat16}] * 3


@pytest.mark.parametrize("device", PLACES)
def test_training_under_autocast(device):
    """bf16 attention trains as bf16 attention computed from all pairs does."""
    tokens = batch(device)
    truth = gradients(seeded(device, torch.float64, layers=2, backend="eager"), tokens)
    model, plain = seeded(device, layers=2), seeded(device, layers=2)
    for block in plain.blocks:
        block.attention = AllPairs(block.attention)
    outputs = []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda *call: outputs.append(call[-1].dtype))
    with torch.autocast(device, dtype=torch.bfloat16):
        found, expected = gradients(model, tokens), gradients(plain, tokens)
        in_a_graph = gradients(model, tokens, compiled(model, device))
    assert outputs[:2] == [torch.bfloat16] * 2
    assert_as_exact(found, expected, truth, torch.bfloat16)
    assert_as_exact(in_a_graph, expected, truth, torch.bfloat16)


class AllPairs(nn.Module):
    """The attention of a causal layer with rotary embeddings, by the oracle's plain arithmetic."""

    def __init__(self, layer):
        super().__init__()
        self.options = {
            "window_size": layer.window_size,
            "causal": True,
            "look_backward": layer.look_backward,
            "exact": layer.exact_windowsize,
            "rotary": True,
        }

    def forward(self, q, k, v):
        with torch.autocast(q.device.type, enabled=False):
            dtype, device = q.dtype, q.device
            q, k, v = (x.cpu() for x in (q, k, v))
            return oracle.attend(q, k, v, dtype=dtype, **self.options).to(device)


# Activation checkpointing and gradient accumulation


@pytest.mark.parametrize("device", PLACES)
def test_checkpointing_drops_the_same_weights_again(device):
    model, tokens = seeded(device, layers=3, dropout=0.5), batch(device)
    found = []
    for model.checkpointed in (True, False):
        torch.manual_seed(5)
        found.append(gradients(model, tokens))
    assert_same(*found, rtol=1e-5, atol=1e-6)
    torch.manual_seed(6)
    other = gradients(model, tokens)
    assert not torch.allclose(other["embedding.weight"], found[0]["embedding.weight"], rtol=1e-2)


@pytest.mark.parametrize("device", PLACES)
def test_checkpointing_in_a_compiled_model(device):
    """Gradients are those of the loss: of the weights that the forward pass dropped.

    Checked along one direction by a difference of losses, since a compiled model draws its own
    seeds: a gradient for other dropped weights is another number.
    """
    dtype, step, tolerance = (torch.float64, 1e-6, 1e-6)
    if device == "cuda":  # the kernel takes no float64
        dtype, step, tolerance = (torch.float32, 2e-3, 5e-3)
    model, tokens = seeded(device, dtype, layers=2, dropout=0.5), batch(device)
    model.checkpointed = True
    run = compiled(model, device)

    def loss():
        torch.manual_seed(5)
        return loss_of(run, tokens)

    weights = [block.inputs.weight for block in model.blocks]
    slopes = torch.autograd.grad(loss(), weights)
    length = torch.stack([slope.norm() for slope in slopes]).norm()

    def loss_after(step):
        with torch.no_grad():
            for weight, slope in zip(weights, slopes, strict=True):
                weight += step * slope / length
        return loss().item()

    difference = (loss_after(step) - loss_after(-2 * step)) / (2 * step)
    assert difference == pytest.approx(length.item(), rel=tolerance)


@pytest.mark.parametrize("device", PLACES)
def test_two_half_batches_add_up_to_a_whole_one(device):
    model, tokens = seeded(device), batch(device, sequences=6)
    whole = gradients(model, tokens)
    for half in tokens.chunk(2):
        (loss_of(model, half) / 2).backward()
    halves = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same(halves, whole, rtol=1e-4, atol=1e-6)


# Inference, export, copies


@pytest.mark.slow
@needs_compiled_kernels_on_the_cpu
def test_compiled_inference_on_the_fused_path():
    model, plain = seeded(layers=1, backend="flex"), seeded(layers=1, backend="eager")
    tokens = batch()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True)(tokens)
        torch.testing.assert_close(found, plain(tokens), rtol=1e-4, atol=1e-5)


def test_export_with_dynamic_length():
    """Exported at a length that fills no tile, it holds for others."""
    model = seeded(layers=3).eval()
    shapes = {"tokens": {1: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (batch(),), dynamic_shapes=shapes).module()
    for n in (TOKENS, 97, 333):
        tokens = batch(seed=n, n=n)
        torch.testing.assert_close(exported(tokens), model(tokens), rtol=1e-5, atol=1e-6)


def through_torch_save(model):
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=False)


def through_the_state_dict(model):
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    other = Transformer(layers=3)
    other.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    return other


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        through_torch_save,
        through_the_state_dict,
    ],
    ids=["deepcopy", "pickle", "torch.save", "state dict"],
)
def test_copies_of_a_model_train_the_same(copied):
    model = seeded(layers=3)
    gradients(model, batch())  # a layer that has run holds nothing that cannot be copied
    other = copied(model)
    assert_same(other.state_dict(), model.state_dict(), 0, 0)
    batches = [batch(seed=step) for step in range(2)]
    assert losses(other, other, batches) == losses(model, model, batches)
    assert_same(other.state_dict(), model.state_dict(), 0, 0)
