"""Texts that are written piece by piece with a cache, row by row, against each whole text at once.

A `Story` says what happens to a cache: pieces of other lengths for each row, padded anywhere; rows
that begin anew; tokens that are taken back. What each token must give is the oracle's output for
the row's whole text so far, at that token.
"""

import math
from dataclasses import dataclass

import oracle
import torch
from hypothesis import strategies as st

from flexlocal import LocalCache, Rotary, Window, local_attention


@dataclass(frozen=True)
class Story:
    """What happens to a cache.

    Attributes:
        events: ("write", tokens of each row, room), ("reset", rows) or ("rewind", tokens by row).
    """

    W: int
    look_backward: int
    exact: bool
    kv_heads: int
    groups: int
    d: int
    d_v: int
    rewindable: int
    rotary: bool
    xpos: bool
    softcap: float | None
    sinks: bool
    bias: bool
    shared_qk: bool
    events: tuple
    seed: int

    @property
    def batch(self):
        return len(self.events[0][1])

    @property
    def window(self):
        return Window(self.W, True, self.look_backward, 0, self.exact)

    def cache(self, dtype=torch.float64, device="cpu"):
        return LocalCache(
            self.window,
            self.batch,
            self.kv_heads,
            self.d,
            v_head_size=self.d_v,
            dtype=dtype,
            device=device,
            rewindable=self.rewindable,
        )


def tell(story, cache, write=local_attention, tolerance=1e-9, sums=True, **more):
    """Lets it happen, and compares every token's output and log-sum-exp with the oracle's.

    write: `local_attention`, or a compiled function that calls it. sums: whether log-sum-exps are
    asked for; kernels for the CPU give none.
    """
    device, dtype = cache.keys.device, cache.keys.dtype
    draw = torch.Generator().manual_seed(story.seed)
    heads = story.kv_heads * story.groups
    span = (1 + story.look_backward) * story.W
    sinks = torch.randn(heads, generator=draw).to(dtype) if story.sinks else None
    bias = torch.randn(heads, story.W, span, generator=draw).to(dtype) if story.bias else None
    rotary = base = None
    if story.rotary:
        base = max(2.0, story.W / 2) if story.xpos else None
        rotary = Rotary(story.d, story.xpos, base)
    arguments = {
        "softcap": story.softcap,
        "shared_qk": story.shared_qk,
        "sinks": None if sinks is None else sinks.to(device),
        "attn_bias": None if bias is None else bias.to(device),
        "rotary": None if rotary is None else rotary.to(device),
    }
    sizes = (heads, story.d), (story.kv_heads, story.d), (story.kv_heads, story.d_v)
    rows = [[torch.zeros(h, 0, d, dtype=dtype) for h, d in sizes] for _ in range(story.batch)]

    def truth(row):
        """Output and log-sum-exp of every token of a row."""
        q, k, v = (x.double()[None] for x in rows[row])
        exact = {}
        if rotary is not None:  # the buffers' own fp32 numbers
            exact = {"frequencies": rotary.inv_freq.cpu(), "decay": rotary.scale.cpu()}
        return oracle.attend(
            q, k, v, story.W, causal=True, look_backward=story.look_backward, exact=story.exact,
            softcap=story.softcap, shared_qk=story.shared_qk, rotary=story.rotary, xpos=story.xpos,
            base=base, sinks=None if sinks is None else sinks.double(),
            bias=None if bias is None else bias.double(), lse=True, **exact,
        )  # fmt: skip

    nbytes = cache.nbytes
    for kind, told, *room in story.events:
        if kind == "reset":
            cache.reset(list(told))
            for row in told:
                rows[row] = [x[:, :0] for x in rows[row]]
            continue
        if kind == "rewind":
            cache.rewind(torch.tensor(told, device=device))
            rows = [
                [x[:, : x.shape[1] - taken] for x in row]
                for row, taken in zip(rows, told, strict=True)
            ]
            continue
        (n,) = room
        new = [torch.randn(story.batch, h, n, d, generator=draw).to(dtype) for h, d in sizes]
        kept = torch.stack([torch.randperm(n, generator=draw) < count for count in told])
        for row in range(story.batch):
            rows[row] = [
                torch.cat((old, x[row][:, kept[row]]), dim=1)
                for old, x in zip(rows[row], new, strict=True)
            ]
        mask = None if kept.all() else kept.to(device)
        with torch.no_grad():
            q, k, v = (x.to(device) for x in new)
            found = write(
                q, k, v, story.window, cache=cache, mask=mask, return_lse=sums, **arguments, **more
            )
        out, lse = (x.cpu().double() for x in (found if sums else (found, found[..., 0])))
        assert out.shape == (story.batch, heads, n, story.d_v)
        for row, count in enumerate(told):
            true_out, true_lse = (x[0, :, x.shape[2] - count :] for x in truth(row))
            assert not out[row][:, ~kept[row]].any()
            torch.testing.assert_close(
                out[row][:, kept[row]], true_out, rtol=tolerance, atol=tolerance
            )
            if not sums:
                continue
            assert (lse[row][:, ~kept[row]] == -math.inf).all()
            torch.testing.assert_close(
                lse[row][:, kept[row]], true_lse, rtol=tolerance, atol=tolerance
            )
        assert cache.lengths.tolist() == [row[0].shape[1] for row in rows]
    assert cache.nbytes == nbytes


@st.composite
def stories(draw):
    batch = draw(st.integers(1, 3))
    W = draw(st.sampled_from([1, 2, 3, 5, 7]))
    rewindable = draw(st.sampled_from([0, 0, 1, 4]))
    lengths, longest, events = [0] * batch, [0] * batch, []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["write"] * 4 + ["reset", "rewind"])) if events else "write"
        if kind == "reset":
            told = tuple(draw(st.sets(st.integers(0, batch - 1), min_size=1)))
            for row in told:
                lengths[row] = longest[row] = 0
            events.append((kind, told))
            continue
        if kind == "rewind":
            most = [
                min(now, now - max(0, ever - rewindable))
                for now, ever in zip(lengths, longest, strict=True)
            ]
            told = tuple(draw(st.integers(0, x)) for x in most)
            lengths = [now - x for now, x in zip(lengths, told, strict=True)]
            events.append((kind, told))
            continue
        room = draw(st.sampled_from([1, 1, 1, 2, 3, 11]))
        whole = draw(st.booleans())
        told = tuple(room if whole else draw(st.integers(0, room)) for _ in range(batch))
        lengths = [now + x for now, x in zip(lengths, told, strict=True)]
        longest = [max(pair) for pair in zip(longest, lengths, strict=True)]
        events.append((kind, told, room))
    rotary = draw(st.booleans())
    return Story(
        W=W,
        look_backward=draw(st.integers(0, 3)),
        exact=draw(st.booleans()),
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.sampled_from([1, 3])),
        d=draw(st.sampled_from([4, 6])),
        d_v=draw(st.sampled_from([3, 8])),
        rewindable=rewindable,
        rotary=rotary,
        xpos=rotary and draw(st.booleans()),
        softcap=draw(st.sampled_from([None, None, 0.7])),
        sinks=draw(st.booleans()),
        bias=draw(st.booleans()),
        shared_qk=draw(st.sampled_from([False, False, True])),
        events=tuple(events),
        seed=draw(st.integers(0, 99)),
    )


def story_of(*events, **more):
    """A story with settings of its own; by default of a plain window."""
    settings = {
        "W": 5, "look_backward": 1, "exact": True, "kv_heads": 2, "groups": 1, "d": 6, "d_v": 8,
        "rewindable": 0, "rotary": False, "xpos": False, "softcap": None, "sinks": False,
        "bias": False, "shared_qk": False, "seed": 0,
    }  # fmt: skip
    return Story(**{**settings, "events": events, **more})
