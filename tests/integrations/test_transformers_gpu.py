"""On a GPU models run on the fused kernel: the same logits, gradients and tokens."""

from inspect import signature

import pytest
import torch
from tiny_models import DECODERS, FAMILIES, largest, padded, tiny, words
from transformers import masking_utils

from flexlocal import dispatch
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
