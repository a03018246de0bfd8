"""Models of Transformers on flexlocal compute what they compute on Transformers' eager code."""

import pytest
import torch
import transformers
from compilers import never_dense, quick
from tiny_models import (
    CACHE,
    DECODERS,
    FAMILIES,
    WINDOW,
    largest,
    only_where_newest,
    padded,
    tiny,
    words,
)

from flexlocal.integrations.transformers import calls, compare_logits, register

CLOSE = 1e-5
"""Of logits whose size is about 4."""

QUICK = ["Mistral", "Gemma 2", "ModernBERT", "Llama 4", "gpt-oss", "Cohere 2"]


def switched(model, implementation):
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("mask", [None, padded(3, 41)], ids=["whole", "padded"])
@pytest.mark.parametrize("family", quick(FAMILIES, kept=QUICK))
def test_logits_are_those_of_eager_code(family, mask):
    model, before = tiny(family), calls()
    inputs = {"input_ids": words(3, 41), **({} if mask is None else {"attention_mask": mask})}
    found = compare_logits(model, inputs)
    assert found.apart < CLOSE < 0.1 < found.size and found.agreement == 1
    served = [now - then for now, then in zip(calls(), before, strict=True)]
    full = 0 if family in ("Mistral", "Phi-3", "Gemma 2", "gpt-oss") else 1
    assert served == [3 - full, full, 0]


@pytest.mark.parametrize("family", quick(FAMILIES, kept=["Mistral", "ModernBERT"]))
def test_gradients_are_those_of_eager_code(family):
    mask, ids = padded(3, 29), words(3, 29)
    # The token before is to say which it is: padding, whose output means nothing, is not asked.
    labels = ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    model, found = tiny(family).train(), {}
    for implementation in ("eager", "flexlocal"):
        model.zero_grad()
        switched(model, implementation)(
            input_ids=ids, attention_mask=mask, labels=labels
        ).loss.backward()
        found[implementation] = {
            name: weight.grad.clone()
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }
    assert found["eager"].keys() == found["flexlocal"].keys()
    for name, grad in found["eager"].items():
        assert largest(grad - found["flexlocal"][name]) < CLOSE, name
    assert max(map(largest, found["eager"].values())) > 1e-3


LENGTHS = [13, 17, 11]


def packed_and_alone(family, **arguments):
    """Logits of three documents in one row, and of each by itself on eager code."""
    ids = words(1, sum(LENGTHS), seed=4)
    model = tiny(family)
    with torch.no_grad():
        alone = [model(input_ids=one).logits for one in ids.split(LENGTHS, 1)]
        packed = switched(model, "flexlocal")(input_ids=ids, **arguments).logits
    return packed, torch.cat(alone, 1)


POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
SUMS = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("family", quick(DECODERS, kept=["Mistral", "gpt-oss"]))
def test_packed_rows_are_each_document_alone(family):
    if family == "Llama 4" and CACHE != "cache":
        pytest.skip("Transformers 5.17 counts chunks from the row's first token")
    packed, alone = packed_and_alone(family, position_ids=POSITIONS, use_cache=False)
    assert largest(packed - alone) < CLOSE


@pytest.mark.parametrize("mask", [None, torch.ones(1, sum(LENGTHS), dtype=torch.long)])
@pytest.mark.parametrize(
    "family", quick([name for name in DECODERS if name != "Llama 4"], kept=["Gemma 3"])
)
def test_packed_rows_are_right_with_a_cache_and_with_a_mask(family, mask):
    """Transformers itself leaks there; Llama 4 hands its positions to no layer."""
    register(full_attention="flexlocal")
    packed, alone = packed_and_alone(family, position_ids=POSITIONS, attention_mask=mask)
    assert largest(packed - alone) < CLOSE


@pytest.mark.parametrize("family", quick(FAMILIES, kept=["ModernBERT"]))
def test_packed_rows_are_told_by_cumulative_lengths(family):
    register(full_attention="flexlocal")
    arguments = {"position_ids": POSITIONS, "cu_seq_lens_q": SUMS}
    packed, alone = packed_and_alone(family, **arguments)
    assert largest(packed - alone) < CLOSE


def test_packed_rows_may_hold_other_documents_each_and_end_in_padding():
    ids, lengths = words(2, 30, seed=5), [[9, 14], [20, 6]]
    positions, mask = torch.zeros(2, 30, dtype=torch.long), torch.zeros(2, 30, dtype=torch.long)
    for row, parts in enumerate(lengths):
        n = sum(parts)
        positions[row, :n] = torch.cat([torch.arange(part) for part in parts])
        mask[row, :n] = 1
    model = tiny("Mistral")
    with torch.no_grad():
        packed = switched(model, "flexlocal")(
            input_ids=ids, position_ids=positions, attention_mask=mask
        ).logits
        switched(model, "eager")
        for row, parts in enumerate(lengths):
            for one, at in zip(ids[row, : sum(parts)].split(parts), (0, parts[0]), strict=True):
                alone = model(input_ids=one[None]).logits[0]
                assert largest(packed[row, at : at + len(one)] - alone) < CLOSE


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", quick(DECODERS, kept=["Mistral", "Llama 4"]))
def test_a_prompt_in_pieces(family, static):
    ids, model = words(2, 47, seed=6), tiny(family)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        switched(model, "flexlocal")
        cache = (
            transformers.StaticCache(config=model.config, max_cache_len=64)
            if static
            else transformers.DynamicCache(config=model.config)
        )
        pieces = [
            model(input_ids=piece, **{CACHE: cache}).logits
            for piece in ids.split([3, 1, WINDOW - 4, 1, 1, 12, 2, 24], 1)
        ]
    assert largest(torch.cat(pieces, 1) - whole) < CLOSE


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
    "prompt in pieces": {"prefill_chunk_size": 5},
}


def generated(model, implementation, **arguments):
    return switched(model, implementation).generate(
        max_new_tokens=17, min_new_tokens=17, pad_token_id=0, do_sample=False, **arguments
    )


CASES = [
    f"{family}, {way}"
    for family in DECODERS
    for way in GENERATION
    if way == "greedy" or family not in ("OLMo 3", "Phi-3")
]


@pytest.mark.parametrize("case", quick(CASES, kept=["Mistral, greedy", "gpt-oss, static"]))
def test_generated_tokens_are_those_of_eager_code(case):
    family, way = case.split(", ")
    if CACHE != "cache" and family == "Llama 4" and "static" in way:
        pytest.skip("Transformers 5.17 makes no mask of chunks for a static cache")
    ids, mask = words(3, 19, seed=7), torch.ones(3, 19, dtype=torch.long)
    mask[0, :9], mask[1, :2] = 0, 0
    model, before = tiny(family), calls()
    arguments = {"input_ids": ids, "attention_mask": mask, **GENERATION[way]}
    wanted = generated(model, "eager", **arguments)
    assert len(wanted[:, 19:].unique()) > 3
    assert torch.equal(generated(model, "flexlocal", **arguments), wanted)
    assert calls().dense == before.dense and calls().local > before.local


def test_no_layer_with_a_window_is_given_all_pairs_of_tokens():
    ids, model = words(1, 211), tiny("Mistral", "flexlocal")
    with torch.no_grad():
        with never_dense(211):
            model(input_ids=ids)
        with pytest.raises(AssertionError, match="all pairs"), never_dense(211):
            switched(model, "sdpa")(input_ids=ids)


@only_where_newest
def test_a_cache_of_several_kinds_of_layers_is_no_longer_than_a_window():
    model = tiny("Gemma 3", "flexlocal")
    with torch.no_grad():
        cache = model(input_ids=words(1, 40), use_cache=True)[CACHE]
    assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW - 1, 40, WINDOW - 1]
