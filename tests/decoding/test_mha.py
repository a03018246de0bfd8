"""`LocalMHA` and `DynamicPositionBias` against those of local-attention, and with a cache."""

import pytest
import torch
from local_attention import transformer as upstream

from flexlocal import DynamicPositionBias, LocalCache, LocalMHA

W = 6
KINDS = {
    "rotary": {},
    "xpos": {"use_xpos": True, "xpos_scale_base": 4},
    "dynamic bias": {"use_dynamic_pos_bias": True},
    "standing windows": {"exact_windowsize": False},
    "normalised, gated": {"qk_rmsnorm": True, "qk_scale": 4, "gate_values_per_head": True},
    "two windows back": {"look_backward": 2},
}


def transformer(monkeypatch, mha, kind):
    """Upstream's language model with `mha` in the place of its own, sharp enough to have moods."""
    monkeypatch.setattr(upstream, "LocalMHA", mha)
    torch.manual_seed(3)
    model = upstream.LocalTransformer(
        num_tokens=19, max_seq_len=64, dim=16, depth=2, local_attn_window_size=W, dim_head=8,
        heads=3, **KINDS[kind],
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_a_cache_gives_the_tokens_without(monkeypatch, kind):
    ours = transformer(monkeypatch, LocalMHA, kind)
    theirs = transformer(monkeypatch, upstream.LocalMHA, kind)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    prompt = torch.randint(19, (2, 9))
    written = ours.generate(prompt, 25, temperature=0.0)
    assert torch.equal(written, ours.generate(prompt, 25, temperature=0.0, use_kv_cache=False))
    if kind == "rotary":
        assert len(written.unique()) > 3
    if kind != "standing windows":  # where upstream lets autopad's padding in
        again = theirs.generate(prompt, 25, temperature=0.0, use_kv_cache=False)
        assert torch.equal(written, again)


@pytest.mark.parametrize("kind", ["rotary", "xpos", "normalised, gated", "standing windows"])
def test_a_local_cache_gives_the_output_of_the_whole_text(kind):
    torch.manual_seed(0)
    mha = LocalMHA(dim=10, window_size=W, dim_head=8, heads=3, causal=True, **KINDS[kind]).eval()
    x = torch.randn(2, 29, 10)
    cache = LocalCache(mha.attn_fn.window, 2, 3, 8, dtype=x.dtype, device="cpu")
    with torch.no_grad():
        whole = mha(x)
        first, again = mha(x[:, :11], cache=cache, return_cache=True)
        assert again is cache
        rest = [mha(x[:, i : i + 1], cache=cache) for i in range(11, 29)]
    torch.testing.assert_close(torch.cat((first, *rest), dim=1), whole)


@pytest.mark.parametrize("kind", ["rotary", "xpos", "normalised, gated"])
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients_are_upstreams(kind, causal):
    torch.manual_seed(1)
    arguments = {"dim": 10, "window_size": W, "dim_head": 8, "heads": 3, "causal": causal}
    arguments |= {"prenorm": True, **KINDS[kind]}
    theirs, ours = upstream.LocalMHA(**arguments), LocalMHA(**arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 5 * W, 10)
    mask = torch.ones(2, 5 * W, dtype=torch.bool)
    mask[1, 15:18] = False  # each query sees other keys
    found = []
    for mha in (ours, theirs):
        out = mha(x, mask=mask)
        out.square().mean().backward()
        found.append((out, *[parameter.grad for parameter in mha.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training():
    mha = LocalMHA(dim=10, window_size=W, dropout=0.5)
    x = torch.randn(1, W, 10)
    assert not torch.equal(mha(x), mha(x))
    mha.eval()
    assert torch.equal(mha(x), mha(x))


def test_the_bias_is_upstreams():
    theirs, ours = upstream.DynamicPositionBias(7, 3), DynamicPositionBias(7, 3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for i, j in ((1, 1), (4, 8), (5, 13)):
        assert torch.equal(ours(i, j), theirs(i, j))
        assert ours(i, j).shape == (3, i, j)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: LocalMHA(dim=0, window_size=W), ValueError, "dim must be at least 1, got 0"),
        (lambda: LocalMHA(dim=8, window_size=W, heads=2.0), TypeError, "heads must be an int"),
        (lambda: LocalMHA(dim=8, window_size=W, prenorm=1), TypeError, "prenorm must be"),
        (lambda: DynamicPositionBias(0, 2), ValueError, "dim must be at least 1"),
        (lambda: DynamicPositionBias(4, 2)(5, 4), ValueError, "j must be at least i, 5, got 4"),
        (
            lambda: LocalMHA(dim=8, window_size=W, causal=True)(
                torch.zeros(1, 1, 8),
                mask=torch.ones(1, 1, dtype=torch.bool),
                cache=torch.zeros(2, 1, 8, 3, 64),
            ),
            ValueError,
            "mask must be None beside keys and values",
        ),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
