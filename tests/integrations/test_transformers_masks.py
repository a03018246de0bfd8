"""What layers are told in place of a mask: against Transformers' own masks, and in its edges."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CACHE, LAYERS, WINDOW, largest, tiny, words
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    chunked_causal_mask_function,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from flexlocal import dispatch
from flexlocal.integrations import transformers as integration
from flexlocal.integrations.transformers import (
    attention,
    calls,
    compare_logits,
    mask,
    packing,
    register,
    registry,
    unregister,
)

KINDS = {
    "sliding": lambda size, left: sliding_window_causal_mask_function(size),
    "around": lambda size, left: sliding_window_bidirectional_mask_function(size),
    "chunked": chunked_causal_mask_function,
}


@st.composite
def calls_of_a_layer(draw):
    """Keywords of Transformers' mask interface: a prompt, a piece of one, a step; any cache."""
    kind, size = draw(st.sampled_from(list(KINDS))), draw(st.integers(1, 9))
    batch, n = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5, 13, 19]))
    seen = draw(st.integers(0, 17)) if kind != "around" else 0
    first = draw(st.sampled_from([0, max(0, seen - size + 1)]))  # a cache of all, or of a window
    behind = draw(st.sampled_from([0, 4])) if kind != "around" else 0  # places that are empty yet
    padding = None
    if draw(st.booleans()):
        padding = torch.ones(batch, seen + n, dtype=torch.bool)
        for row in range(batch):
            padding[row, : draw(st.integers(0, seen + n - 1))] = False
            hidden = draw(st.integers(0, seen + n - 1))
            padding[row, hidden : hidden + draw(st.integers(0, 3))] = False
    left = torch.zeros(batch, dtype=torch.long)
    if padding is not None:
        left = (padding.cumsum(-1) == 0).sum(-1)
    static = draw(st.booleans())
    found = dict(
        batch_size=batch,
        q_length=n,
        kv_length=seen + n - first + behind,
        q_offset=torch.tensor(seen) if static else seen,
        kv_offset=first,
        mask_function=KINDS[kind](size, left),
        attention_mask=padding,
        local_size=size,
        config=SimpleNamespace(
            **{"attention_chunk_size" if kind == "chunked" else "sliding_window": size}
        ),
    )
    if kind == "around":
        found["allow_is_bidirectional_skip"] = True
    elif n == 1:
        found["allow_is_causal_skip"] = draw(st.booleans())
    return found


@given(calls_of_a_layer(), st.integers(0, 2**31))
def test_a_layer_sees_what_transformers_own_mask_shows(asked, seed):
    generator = torch.Generator().manual_seed(seed)
    batch, n, m = asked["batch_size"], asked["q_length"], asked["kv_length"]
    q = torch.randn(batch, 6, n, 5, generator=generator)
    k, v = torch.randn(2, batch, 2, m, 5, generator=generator)
    never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    shown = sdpa_mask(**{**asked, **never})
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=shown, enable_gqa=True)
    wanted = wanted.masked_fill(~shown.any(-1, keepdim=True), 0)  # what sees nothing gives zeros
    found, _ = attention.attend(None, q, k, v, mask.local_mask(**asked))
    assert found.is_contiguous()
    torch.testing.assert_close(found.transpose(1, 2), wanted, atol=2e-6, rtol=1e-5)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 5), st.booleans())
def test_packed_rows_are_read_off_transformers_own_mask(lengths, size, chunked):
    n = sum(lengths)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    base = KINDS["chunked" if chunked else "sliding"](size, torch.zeros(2, dtype=torch.long))
    packed = packed_sequence_mask_function(number[None].expand(2, -1))
    asked = dict(
        batch_size=2,
        q_length=n,
        kv_length=n,
        mask_function=lambda *indices: base(*indices) & packed(*indices),
        allow_is_causal_skip=False,
        local_size=size,
        config=SimpleNamespace(sliding_window=None if chunked else size, attention_chunk_size=size),
    )
    if not chunked:
        asked["config"].attention_chunk_size = None
    q, k, v = torch.randn(3, 2, 2, n, 4, generator=torch.Generator().manual_seed(n))
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=sdpa_mask(**asked))
    found, _ = attention.attend(None, q, k, v, mask.local_mask(**asked))
    torch.testing.assert_close(found.transpose(1, 2), wanted, atol=2e-6, rtol=1e-5)


def test_a_mask_holds_no_tensor_however_long_the_sequence():
    model = tiny("Mistral", "flexlocal")
    found = create_sliding_window_causal_mask(
        config=model.config,
        inputs_embeds=torch.empty(1, 131072, 0),
        attention_mask=None,
        **{CACHE: None},
    )
    assert not any(isinstance(value, torch.Tensor) for value in vars(found).values())
    assert str(found.window.words) == "a query sees at most 7 keys: its own and the 6 before it"


def test_a_mask_of_padding_is_as_long_as_the_keys():
    found = mask.local_mask(
        batch_size=2, q_length=3, kv_length=9, q_offset=40, kv_offset=34, local_size=7,
        mask_function=None, config=None,
        attention_mask=torch.arange(2 * 43).view(2, 43).remainder(2).bool(),
    )  # fmt: skip
    assert found.keys.shape == (2, 9) and found.lead == 6 and found.first == 0


@st.composite
def positions_and_padding(draw):
    """Rows of some documents with padding anywhere, and each token's document by hand."""
    positions, kept, documents = [], [], []
    for document in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, 3)) + 100 * document  # never the position that would follow
        for position in range(first, first + draw(st.integers(1, 5))):
            for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
                positions.append(draw(st.integers(0, 5)))  # of padding: it means nothing
                kept.append(False)
                documents.append(None)
            positions.append(position)
            kept.append(True)
            documents.append(document)
    return positions, kept, documents


@given(positions_and_padding())
def test_documents_are_told_by_the_positions_of_what_is_no_padding(row):
    positions, kept, documents = row
    found = packing.documents_of_positions(torch.tensor([positions]), torch.tensor([kept]))
    found = found[0].tolist()
    assert [one for one, keep in zip(found, kept, strict=True) if keep] == [
        document for document in documents if document is not None
    ]
    assert found == sorted(found)  # padding belongs to the run that it is in


def test_a_hole_in_a_document_begins_none():
    """Positions count what is no padding, as ``generate`` makes them."""
    hidden = torch.arange(20) != 9
    inputs = {"input_ids": words(1, 20), "attention_mask": hidden[None]}
    inputs["position_ids"] = (hidden.cumsum(0) - 1)[None]
    assert compare_logits(tiny("Mistral"), inputs).apart < 1e-5


def test_documents_are_found_once_for_all_layers_and_anew_for_other_positions():
    made = mask.LocalMask(None, 1, 6, 6)
    one, other = torch.tensor([[0, 1, 2, 0, 1, 0]]), torch.tensor([[0, 1, 0, 1, 2, 3]])
    first = made.documents_with(one, None)
    assert made.documents_with(one, None) is first
    assert first.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert made.documents_with(other, None).tolist() == [[0, 0, 1, 1, 1, 1]]
    assert made.documents_with(torch.arange(6)[None], None) is None
    # Of what is no row of positions, as Qwen 2 VL's three numbers for each token.
    assert made.documents_with(one[None], None) is None and made.documents_with(4, None) is None


@pytest.mark.parametrize("size", ["sliding_window", "attention_chunk_size"])
def test_a_step_of_a_static_cache_is_all_tensors(size):
    """Numbers would be parts of a compiled graph, and there would be one for each token."""
    asked = dict(
        batch_size=2, q_length=1, kv_length=7, q_offset=40, kv_offset=34, local_size=7,
        mask_function=None, config=SimpleNamespace(**{size: 7}),
        attention_mask=torch.ones(2, 41, dtype=torch.bool),
    )  # fmt: skip
    step = mask.local_mask(**asked, allow_is_causal_skip=False)
    assert step.lead.tolist() == [6] and step.keys.all()
    other = mask.local_mask(**asked)
    assert other.lead == 6
    if size == "attention_chunk_size":
        assert step.first.tolist() == other.first.tolist() == [34, 34]


def test_dropout_is_the_layers():
    q, k, v = torch.randn(3, 1, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    made = mask.local_mask(
        batch_size=1, q_length=9, kv_length=9, local_size=9, mask_function=None, config=None
    )
    whole, _ = attention.attend(None, q, k, v.abs(), made)
    dropped = [attention.attend(None, q, k, v.abs(), made, dropout=0.5)[0] for _ in range(60)]
    assert not torch.equal(dropped[0], dropped[1])
    assert 0.85 < (torch.stack(dropped).mean() / whole.mean()).item() < 1.15


# What is warned of.

PACKED = {"input_ids": words(1, 20), "position_ids": torch.arange(20).remainder(9)[None]}


def test_a_leak_in_layers_that_see_everything_is_warned_of_once():
    model = tiny("Gemma 3", "flexlocal")
    with pytest.warns(UserWarning, match="see across packed documents.*use_cache=False") as said:
        model(**PACKED, use_cache=False)
        assert not said
        model(**PACKED, use_cache=True)  # the same positions, and another mask
        model(**PACKED, use_cache=True)
    assert len(said) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": False},
        {"position_ids": torch.arange(20)[None]},
        # Where padding begins on the right, positions begin anew as well.
        {
            "attention_mask": torch.arange(20)[None] < 18,
            "position_ids": torch.arange(20)[None].remainder(18),
        },
    ],
)
def test_no_leak_is_warned_of_where_there_is_none(changes):
    tiny("Gemma 3", "flexlocal")(**{**PACKED, "use_cache": True, **changes})
    assert not dispatch._SAID


def test_cumulative_lengths_leak_in_layers_on_sdpa_too():
    model = tiny("ModernBERT", "flexlocal")
    sums = torch.tensor([0, 9, 20], dtype=torch.int32)
    with pytest.warns(UserWarning, match="see across packed documents"):
        model(input_ids=words(1, 20), cu_seq_lens_q=sums)
    register(full_attention="flexlocal")
    dispatch._SAID.clear()
    model(input_ids=words(1, 20), cu_seq_lens_q=sums)
    assert not dispatch._SAID


# What is handed over, and counted.


def test_a_users_own_mask_is_handed_over_and_counted():
    model, before = tiny("Mistral"), calls()
    shown = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    additive = torch.where(shown, 0.0, torch.finfo(torch.float32).min)
    wanted = model(input_ids=words(1, 20), attention_mask=additive).logits
    model.set_attn_implementation("flexlocal")
    found = model(input_ids=words(1, 20), attention_mask=shown).logits
    assert largest(found - wanted) < 1e-5
    assert [now - then for now, then in zip(calls(), before, strict=True)] == [0, 0, 3]


def test_a_comparison_shows_a_wrong_window_and_leaves_the_model_as_it_was(monkeypatch):
    model = tiny("Gemma 3", "eager")
    inputs = {"input_ids": words(2, 20)}
    right = compare_logits(model, inputs)
    assert right.apart < 1e-5 and right.agreement == 1
    assert str(right).startswith("flexlocal and eager: at most ")
    real = mask._window
    monkeypatch.setattr(
        mask, "_window", lambda config, size, causal: real(config, size and size + 1, causal)
    )
    wrong = compare_logits(model, inputs, other="sdpa")
    assert wrong.apart > 0.1 and wrong.agreement < 1 and wrong.other == "sdpa"
    assert model.config._attn_implementation == "eager"


def test_a_comparison_leaves_padding_out():
    model = tiny("Mistral")
    hidden = torch.arange(20)[None] >= 15
    found = compare_logits(model, {"input_ids": words(1, 20), "attention_mask": hidden})
    assert found.apart < 1e-5  # eager code gives padding an average, flexlocal zeros
    model.set_attn_implementation("flexlocal")


def test_a_comparison_of_two_shapes_is_refused(monkeypatch):
    compare = integration.compare
    shapes = iter([torch.zeros(1, 2, 3), torch.zeros(1, 3, 3)])
    monkeypatch.setattr(compare, "_run", lambda *_: next(shapes))
    with pytest.raises(ValueError, match=r"must give one shape, got \(1, 2, 3\) and \(1, 3, 3\)"):
        compare_logits(tiny("Mistral"), {})


def test_the_name_is_taken_back():
    unregister()
    with pytest.raises(ValueError, match="flexlocal"):
        tiny("Mistral", "flexlocal")
    unregister()
    register()
    tiny("Mistral", "flexlocal")


# What is refused.


@pytest.mark.parametrize("name", ["flash_attention_2", "nothing", None])
def test_an_implementation_that_cannot_be_named_is_refused(name):
    with pytest.raises(ValueError, match="full_attention must be one of .*sdpa.*flexlocal, got"):
        register(full_attention=name)


def test_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(registry.transformers, "__version__", "5.16.2")
    with pytest.raises(ImportError, match="needs transformers 5.17 or later, got 5.16.2"):
        register()


def test_a_mask_of_the_models_own_making_is_refused():
    model = tiny("Gemma 3", "flexlocal", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="Gemma3TextConfig adds a mask function of its own"):
        model(input_ids=words(1, 20))


def test_images_whose_tokens_see_each_other_are_refused():
    model = tiny("Gemma 2", "flexlocal")
    with pytest.raises(ValueError, match="see each other both ways"):
        create_sliding_window_causal_mask(
            config=model.config,
            inputs_embeds=torch.empty(1, 9, 0),
            attention_mask=None,
            block_sequence_ids=torch.tensor([[-1, -1, 0, 0, 0, -1, -1, -1, -1]]),
            **{CACHE: None},
        )


@pytest.mark.slow
def test_they_are_refused_when_a_compiled_model_runs():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def made(follows, ahead):
        def shown(entry, head, query, key):
            return torch.where(key < query, follows, ahead)[None].expand(1, query.shape[0])

        return packing.documents_of_mask(shown, 1, 4, "cpu")

    yes, no = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    assert made(yes, no).tolist() == [[0, 0, 0, 0]]
    with pytest.raises(RuntimeError, match="see each other both ways"):
        made(yes, yes)


def attended(changes, made=None):
    asked = dict(
        batch_size=1, q_length=9, kv_length=9, local_size=3, mask_function=None, config=None
    )
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    return attention.attend(None, q, k, v, mask.local_mask(**{**asked, **(made or {})}), **changes)


@pytest.mark.parametrize(
    ("changes", "made", "said"),
    [
        ({"position_bias": torch.zeros(1)}, {}, "position_bias must be None"),
        ({"output_attentions": True}, {}, "output_attentions must be False"),
        ({}, {"kv_length": 12}, "made for 9 queries and 12 keys, got 9 and 9"),
        ({}, {"attention_mask": torch.ones(1, 9, 9) > 0}, r"\(batch, tokens\), got \(1, 9, 9\)"),
        (
            {},
            {"config": SimpleNamespace(sliding_window=3, attention_chunk_size=3)},
            "must differ in a model that has both, got 3",
        ),
    ],
)
def test_what_windows_cannot_do_is_refused(changes, made, said):
    attended({})
    with pytest.raises(ValueError, match=said):
        attended(changes, made)


def test_cumulative_lengths_with_a_cache_are_refused():
    model = tiny("Mistral", "flexlocal")
    cache = model(input_ids=words(1, 5), use_cache=True)[CACHE]
    sums = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q must be None where a cache holds keys"):
        model(input_ids=words(1, 4), cu_seq_lens_q=sums, **{CACHE: cache})


@pytest.mark.parametrize(
    ("rows", "n", "given", "told"),
    [
        (1, 23, [0, 5, 6, 23], [0, 5, 6, 23]),
        (1, 23, [0, 5, 6, 21], [0, 5, 6, 21]),
        (2, 23, [0, 5, 23, 46], None),  # of several rows the kernels' functions know nothing
        (1, 23, None, None),
    ],
)
def test_kernels_are_told_cumulative_lengths_beside_documents(monkeypatch, rows, n, given, told):
    seen = []
    attend = dispatch.attend
    monkeypatch.setattr(
        dispatch, "attend", lambda spec, inputs: seen.append(inputs) or attend(spec, inputs)
    )
    sums = None if given is None else torch.tensor(given, dtype=torch.int32)
    tiny("Mistral", "flexlocal")(input_ids=words(rows, n), cu_seq_lens_q=sums)
    assert len(seen) == 3
    for inputs in seen:
        assert (inputs.documents is None) == (given is None)
        assert told == (None if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist())


@pytest.mark.parametrize("chunk", [None, 4])
def test_kernels_that_know_no_chunks_are_told_no_cumulative_lengths(chunk):
    sums = torch.tensor([0, 5, 6, 23], dtype=torch.int32)
    found = mask.local_mask(
        batch_size=1,
        q_length=23,
        kv_length=23,
        mask_function=lambda *_: None,
        local_size=4,
        config=SimpleNamespace(attention_chunk_size=chunk),
    )
    told = found.sums_with(found.documents_with(None, sums), sums)
    assert told is (sums if chunk is None else None)


@given(st.lists(st.integers(1, 9), min_size=1))
def test_documents_have_their_cumulative_lengths(lengths):
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    found = packing.sums_of_documents(numbers.int())
    assert found.dtype == torch.int32
    assert found.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_sdpa_is_not_handed_what_it_would_leave_out(name):
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    module = SimpleNamespace(config=SimpleNamespace(layer_types=LAYERS), layer_idx=1)
    with pytest.raises(ValueError, match=rf"{name} is nothing that full_attention='sdpa'"):
        attention.hand_over("sdpa", module, q, k, v, None, **{name: torch.ones(2)})


@pytest.mark.parametrize("layer", [{"sliding_window": WINDOW}, {}])
def test_a_local_layer_without_a_mask_is_refused(layer):
    """As Transformers' continuous batching leaves it."""
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    module = SimpleNamespace(config=SimpleNamespace(layer_types=LAYERS), layer_idx=0)
    with pytest.raises(ValueError, match="Continuous batching needs attn_implementation="):
        attention.hand_over("sdpa", module, q, k, v, None, **layer)


def test_continuous_batching_is_refused():
    model = tiny("Mistral", "flexlocal")
    with pytest.raises(ValueError, match="flexlocal"):
        model.init_continuous_batching()


def test_a_mask_that_a_model_hands_back_is_taken():
    """Models whose layers are all alike ask of it whether it is a user's mask of padding."""
    made = mask.LocalMask(None, 1, 1, 1)
    assert made.ndim == 4
    assert ALL_MASK_ATTENTION_FUNCTIONS["flexlocal"](
        batch_size=1, q_length=1, kv_length=1, local_size=3, mask_function=None, config=None,
        attention_mask=made,
    ) is made  # fmt: skip
