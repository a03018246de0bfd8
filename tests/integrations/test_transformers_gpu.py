"""On a GPU models run on the fused kernel: the same logits, gradients and tokens."""

from functools import wraps
from inspect import signature

import pytest
import torch
from tiny_models import DECODERS, FAMILIES, largest, padded, tiny, words
from transformers import masking_utils

from flexlocal import dispatch
from flexlocal.flex import tuning
from flexlocal.integrations.transformers import compare_logits, register

pytestmark = pytest.mark.gpu


def on_gpu(family, implementation="eager"):
    head = {} if family == "ModernBERT" else {"head_dim": 32}
    return tiny(family, implementation, hidden_size=192, **head).cuda()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_on_a_gpu(family):
    inputs = {"input_ids": words(3, 300).cuda()}
    model = on_gpu(family)
    assert compare_logits(model, inputs).apart < 1e-4
    inputs["attention_mask"] = padded(3, 300).cuda()
    assert compare_logits(model, inputs).apart < 1e-4
    assert not dispatch._SAID  # the eager path would warn


@pytest.mark.parametrize("family", ["Mistral", "ModernBERT", "gpt-oss"])
def test_gradients_on_a_gpu(family):
    register(full_attention="flexlocal")
    model, ids = on_gpu(family).train(), words(2, 200).cuda()
    found = {}
    for implementation in ("eager", "flexlocal"):
        model.zero_grad()
        model.set_attn_implementation(implementation)
        model(input_ids=ids, labels=ids).loss.backward()
        found[implementation] = {
            name: weight.grad.clone()
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }
    for name, grad in found["eager"].items():
        assert largest(grad - found["flexlocal"][name]) < 1e-4, name


# Inductor captures an empty graph before its first one, and means to hide torch's warning of it.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [name for name in DECODERS if name in ("Mistral", "Llama 4")])
def test_tokens_on_a_gpu(family, cache):
    """Transformers compiles a step of a static cache there."""
    chunks = signature(masking_utils.create_chunked_causal_mask).parameters
    if (family, cache) == ("Llama 4", "static") and "block_sequence_ids" not in chunks:
        pytest.skip("this Transformers hands its own mask of chunks an argument that it refuses")
    ids, mask = words(2, 19, seed=7).cuda(), torch.ones(2, 19, dtype=torch.long).cuda()
    mask[0, :9] = 0
    model = on_gpu(family)
    found = []
    # The same tokens, with either cache. Inductor warns of a softmax in a compiled eager step.
    for implementation, kind in (("eager", "dynamic"), ("flexlocal", cache)):
        model.set_attn_implementation(implementation)
        found.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=40,
                min_new_tokens=40,
                do_sample=False,
                pad_token_id=0,
                cache_implementation=kind,
            )
        )
    assert torch.equal(*found)


LENGTHS = [70, 1, 129, 113]
PACKED = {
    "positions": {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]},
    "cumulative lengths": {"cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0).int()},
}


@pytest.mark.filterwarnings("ignore")  # flash-attn-4 compiles with deprecated names of CUTLASS
@pytest.mark.parametrize(
    ("told", "compiled"),
    [("positions", False), ("cumulative lengths", False), ("cumulative lengths", True)],
)
def test_packed_rows_by_flash_attention_4(monkeypatch, fresh_compiler, told, compiled):
    """The logits and gradients are no further off than twice those of eager code in bf16."""
    interface = pytest.importorskip(
        "flash_attn.cute.interface", reason="flash-attn-4 is not installed"
    )
    asked, forward = [], interface._flash_attn_fwd

    @wraps(forward)
    def recorded(*tensors, cu_seqlens_q, **more):
        asked.append(cu_seqlens_q.tolist())
        return forward(*tensors, cu_seqlens_q=cu_seqlens_q, **more)

    monkeypatch.setattr(interface, "_flash_attn_fwd", recorded)
    inputs = {"input_ids": words(1, sum(LENGTHS)), "use_cache": False}
    inputs = {name: x if name == "use_cache" else x.cuda() for name, x in inputs.items()}
    positions = {name: x.cuda() for name, x in PACKED["positions"].items()}
    given = {name: x.cuda() for name, x in PACKED[told].items()}
    model = tiny("Mistral", hidden_size=96, head_dim=64).cuda()

    def found(run, **arguments):
        model.zero_grad()
        logits = run(**inputs, **arguments).logits
        (logits.float() ** 2).mean().backward()
        first = model.model.layers[0].self_attn
        return logits.float(), *(x.weight.grad.float() for x in (first.q_proj, first.v_proj))

    right = [x.double() for x in found(model, **positions)]
    model.bfloat16()
    allowed = [2 * (x - y).norm() for x, y in zip(found(model, **positions), right, strict=True)]
    model.set_attn_implementation("flexlocal")
    run = torch.compile(model, fullgraph=True) if compiled else model
    with tuning.overriding(tuning.FLASH):
        # Rotation goes by positions as well, where a model is told of documents otherwise.
        ours = found(run, **{**positions, **given})
    assert asked == 3 * [[0, *torch.tensor(LENGTHS).cumsum(0).tolist()]]
    for x, y, most in zip(ours, right, allowed, strict=True):
        assert (x - y).norm() < most
