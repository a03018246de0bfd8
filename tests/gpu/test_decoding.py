"""Decoding on a GPU: the kernel over a ring, compiled steps, CUDA graphs; nothing is waited for."""

import decoded
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flexlocal import LocalAttention, LocalCache, Rotary, Window, local_attention

pytestmark = pytest.mark.gpu

WRITES = [("write", (n, n), n) for n in (1, 2, 150, 1, 1, 9)]
RAGGED = [("write", (3, 0), 5), ("reset", (1,)), ("rewind", (2, 0)), ("write", (1, 1), 1)]
STORIES = {
    "plain": {},
    "grouped, rotary": {"groups": 4, "rotary": True},
    "standing, several windows back": {"exact": False, "look_backward": 2, "W": 13},
    "softcap, sinks": {"softcap": 1.5, "sinks": True},
    "bias, shared": {"bias": True, "shared_qk": True, "groups": 2},
    "xpos": {"rotary": True, "xpos": True, "W": 32},
}


@pytest.mark.parametrize("name", STORIES)
def test_every_token_has_the_output_of_the_whole_text(name):
    more = {"W": 37, "d": 32, "d_v": 48, "rewindable": 2, **STORIES[name]}
    story = decoded.story_of(*WRITES, *RAGGED, **more)
    decoded.tell(story, story.cache(torch.float32, "cuda"), tolerance=1e-4, backend="flex")


def layer_and_text(n, window=64, dtype=torch.float32, batch=2):
    layer = LocalAttention(
        window, causal=True, exact_windowsize=True, autopad=True, dim=64, dropout=0.0
    ).cuda()
    q, k, v = (torch.randn(batch, h, n, 64, device="cuda", dtype=dtype) for h in (8, 2, 2))
    cache = LocalCache(layer.window, batch, 2, 64, dtype=dtype, device="cuda")
    return layer.eval(), (q, k, v), cache


def check_that_steps_never_wait(step, layer, text, cache):
    """Once two of them have warmed up; and that they are the layer's call on all of ``text``."""
    found = []
    with torch.no_grad():
        whole = layer(*text)
        for token in range(whole.shape[2]):
            new = [x[:, :, token : token + 1] for x in text]
            if token == 2:
                torch.cuda.set_sync_debug_mode("error")
            found.append(step(*new, cache=cache))
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(torch.cat(found, dim=2), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_one_graph_and_no_synchronisation():
    layer, *others = layer_and_text(200)
    counter = CompileCounterWithBackend("inductor")
    check_that_steps_never_wait(
        torch.compile(layer, fullgraph=True, backend=counter), layer, *others
    )
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_synchronisation_outside_a_compiled_model():
    layer, *others = layer_and_text(150)
    check_that_steps_never_wait(layer, layer, *others)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_replays_a_thousand_steps(compiled):
    layer, text, cache = layer_and_text(1003, dtype=torch.bfloat16)
    new = [torch.empty_like(x[:, :, :1]) for x in text]

    def feed(token):
        for x, whole in zip(new, text, strict=True):
            x.copy_(whole[:, :, token : token + 1])

    found = []
    with torch.no_grad():
        whole = layer(*text)
        step = torch.compile(layer, fullgraph=True) if compiled else layer
        for token in range(3):
            feed(token)
            found.append(step(*new, cache=cache).clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # which runs nothing
            out = step(*new, cache=cache)
        for token in range(3, 1003):
            feed(token)
            graph.replay()
            found.append(out.clone())
    torch.testing.assert_close(torch.cat(found, dim=2), whole, rtol=2e-2, atol=2e-2)
    assert cache.lengths.tolist() == [1003, 1003]


def test_a_long_prompt_in_pieces():
    window, rotary = Window.sliding(300), Rotary(64).cuda()
    q, k, v = (torch.randn(1, h, 1500, 64, device="cuda") for h in (4, 2, 2))
    cache = LocalCache(window, 1, 2, 64, dtype=q.dtype, device="cuda")
    whole = local_attention(q, k, v, window, rotary=rotary)
    with torch.no_grad():
        pieces = zip(*(x.split(700, dim=2) for x in (q, k, v)), strict=True)
        found = [local_attention(*piece, window, rotary=rotary, cache=cache) for piece in pieces]
    torch.testing.assert_close(torch.cat(found, dim=2), whole, rtol=1e-4, atol=1e-4)
