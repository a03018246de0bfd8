"""Decoding inside a user's compiled model: one graph before and after the ring closes."""

import decoded
import pytest
import torch
from compilers import needs_compiled_kernels_on_the_cpu
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from flexlocal import LocalCache, LocalMHA, Window, local_attention

W = 8


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_every_step():
    counter = CompileCounterWithBackend("aot_eager")
    mha = LocalMHA(dim=10, window_size=W, dim_head=8, heads=3, causal=True).eval()

    @torch.compile(fullgraph=True, backend=counter)
    def step(x, cache):
        return mha(x, cache=cache)

    text = torch.randn(2, 41, 10)
    with torch.no_grad():
        whole = mha(text)
        cache = LocalCache(mha.attn_fn.window, 2, 3, 8, dtype=torch.float32, device="cpu")
        found = [step(text[:, :3], cache)]
        pieces = counter.frame_count
        found += [step(text[:, i : i + 1], cache) for i in range(3, 41)]
    assert counter.frame_count == pieces + 1
    torch.testing.assert_close(torch.cat(found, dim=1), whole)


@needs_compiled_kernels_on_the_cpu
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_steps_of_the_fused_kernel():
    writes = [("write", (n, n), n) for n in (1, 1, 9, 1)]
    story = decoded.story_of(
        *writes, ("reset", (1,)), writes[0], W=3, exact=False, groups=2, d=32, d_v=32, softcap=0.7
    )
    decoded.tell(story, story.cache(torch.float32), tolerance=1e-5, sums=False, backend="flex")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler", "graphs_without_code", "no_limit_is_hit")
def test_the_fused_path_makes_few_graphs_of_its_own():
    """One for steps, two each for pieces that fit, for others, and for those past the ring."""
    writes = [("write", (n, n), n) for n in (1, 3, 9, 2, 1, 14, 12, 3, 1, 10, 17, 2)]
    story = decoded.story_of(
        *writes, ("reset", (1,)), writes[0], W=7, exact=False, groups=2, d=6, d_v=5, rotary=True,
        rewindable=2,
    )  # fmt: skip
    decoded.tell(story, story.cache(torch.float32), tolerance=1e-5, sums=False, backend="flex")
    assert 5 <= counters["stats"]["unique_graphs"] <= 7


@pytest.mark.usefixtures("fresh_compiler")
def test_tokens_are_taken_back_inside_a_graph():
    window = Window.sliding(W)
    cache = LocalCache(window, 2, 1, 4, dtype=torch.float32, device="cpu", rewindable=3)
    q, k, v = torch.randn(3, 2, 1, 5, 4)

    @torch.compile(fullgraph=True, backend="eager")
    def step(tokens):
        out = local_attention(q, k, v, window, cache=cache)
        cache.rewind(tokens)
        return out

    step(torch.tensor([1, 3]))
    assert cache.lengths.tolist() == [4, 2]
    # A graph that fails leaves gradients off, if nobody turns them on again.
    with torch.no_grad(), pytest.raises(RuntimeError, match="tokens must be at least 0"):
        step(torch.tensor([4, 0]))


def test_windows_of_one_size_share_a_graph():
    """The ring's numbers are in tensors: caches of other batches and texts need no other graph."""
    rules = [
        LocalCache(Window.sliding(W), batch, 1, 4, dtype=torch.float32, device="cpu").rule(
            torch.zeros(batch)
        )
        for batch in (2, 3)
    ]
    assert rules[0] == rules[1] and hash(rules[0]) == hash(rules[1])
