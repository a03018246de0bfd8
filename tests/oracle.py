"""Local attention by brute force: the specification, one token pair at a time.

Slow, dense and in float64 on purpose. It shares no code with the package and has none of its
ideas (no key intervals, no windows cut out of the sequence, no segments for xpos), so that a
mistake has to be made twice to go unseen. Gradients come from autograd.

Letters: n tokens, d head size, D value size, W window, b and f windows looked back and forward,
R rows (all leading dimensions of q, flattened), h heads of the bias.
"""

import math
from functools import lru_cache

import torch

SELF_SCORE = -5e4  # shared_qk: a token's own score
THETA = 10_000.0


def visible(i, j, n, W, *, causal, b, f, exact):
    """Whether query i sees key j of n: the list of the specification, in plain ints."""
    w = i // W
    return (
        0 <= j < n
        and w - b <= j // W <= w + f
        and (not causal or j <= i)
        and (not exact or j >= i - b * W)
        and (not exact or causal or j <= i + f * W)
    )


@lru_cache(maxsize=512)
def _dense(n_queries, n_keys, W, causal, b, f, exact):
    rows = [
        [visible(i, j, n_keys, W, causal=causal, b=b, f=f, exact=exact) for j in range(n_keys)]
        for i in range(n_queries)
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(n_queries, n_keys)


def dense_mask(n_queries, W, *, n_keys=None, causal=False, b=1, f=None, exact=False):
    """(n_queries, n_keys) booleans, True where the query sees the key."""
    f = (0 if causal else 1) if f is None else f
    n_keys = n_queries if n_keys is None else n_keys
    return _dense(n_queries, n_keys, W, causal, b, f, exact).clone()


def block_states(mask, query_block, key_block):
    """The three states of every block of a dense token mask: 0 empty, 1 partial, 2 full.

    A block that sticks out past the last query or key is never full.
    """
    n_queries, n_keys = mask.shape
    grid = torch.zeros(-(-n_queries // query_block), -(-n_keys // key_block), dtype=torch.long)
    for r in range(grid.shape[0]):
        for c in range(grid.shape[1]):
            block = mask[
                r * query_block : (r + 1) * query_block, c * key_block : (c + 1) * key_block
            ]
            seen = int(block.sum())
            grid[r, c] = 0 if seen == 0 else 2 if seen == query_block * key_block else 1
    return grid


def rotate(x, positions, frequencies=None):
    """x (R, n, d) turned by position * theta ** (-2c/d), first half of d against the second."""
    d = x.shape[-1]
    if frequencies is None:
        frequencies = THETA ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    angles = positions.double()[:, None] * frequencies.double()
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _scores(q, k, seen, W, scale, f, rotary, xpos, base, frequencies, decay):
    """(R, n, n) scaled dot products, in q's dtype; `seen` is the mask of the window."""
    n, d = q.shape[-2:]
    dtype = q.dtype
    if not rotary:
        return scale * torch.einsum("rid,rjd->rij", q, k)
    wide = torch.promote_types(dtype, torch.float32)
    index = torch.arange(n)
    q = rotate(q.to(wide), index + f * W, frequencies).to(dtype)
    k = rotate(k.to(wide), index, frequencies).to(dtype)
    if not xpos:
        return scale * torch.einsum("rid,rjd->rij", q, k)
    if decay is None:
        c = torch.arange(d // 2, dtype=torch.float64)
        decay = (2 * c + 0.4 * d) / (1.4 * d)
    distance = index[:, None] + f * W - index[None, :]
    distance = distance.masked_fill(~seen, 0)  # far pairs would overflow, and count for nothing
    factor = (decay.double() ** (distance.double()[..., None] / base)).to(wide)
    q, k = q.to(wide), k.to(wide)
    pairs = sum(
        q[:, :, None, half] * k[:, None, :, half]
        for half in (slice(0, d // 2), slice(d // 2, None))
    )
    return (scale * (pairs * factor).sum(-1)).to(dtype)


def weights(
    q,
    k,
    window_size,
    *,
    causal=False,
    look_backward=1,
    look_forward=None,
    exact=False,
    scale=None,
    shared_qk=False,
    rotary=False,
    xpos=False,
    base=None,
    frequencies=None,
    decay=None,
    bias=None,
    mask=None,
    override=None,
    dtype=torch.float64,
):
    """(*lead, n, n) attention weights; rows of queries that see nothing are zero.

    `mask` (batch, n) keeps keys, `bias` is (h, W, (1 + b + f) * W), `override` takes the place of
    the window size everywhere but in the default `base`. `frequencies` and `decay`, (d / 2,) each,
    stand in for the formulas of rotary's angles and of xpos's z. In a lower `dtype` every product
    is rounded to it and the softmax is float32: plain arithmetic to take error budgets from.
    """
    lead, (n, d) = q.shape[:-2], q.shape[-2:]
    W = window_size if override is None else override
    base = window_size // 2 if base is None else base
    b, f = look_backward, look_forward
    if f is None:
        f = 0 if causal else 1
    scale = d**-0.5 if scale is None else scale
    rows = math.prod(lead)

    if k.shape[:-2] != lead:  # grouped queries: H/G neighbouring heads share one
        k = k.repeat_interleave(lead[1] // k.shape[1], dim=1)
    q, k = q.to(dtype).reshape(rows, n, d), k.to(dtype).reshape(rows, n, d)
    wide = torch.promote_types(dtype, torch.float32)
    if shared_qk:
        length = k.to(wide).pow(2).sum(-1, keepdim=True).sqrt()
        k = (k.to(wide) / length.clamp_min(1e-12)).to(dtype)

    seen = dense_mask(n, W, causal=causal, b=b, f=f, exact=exact)
    scores = _scores(q, k, seen, W, scale, f, rotary, xpos, base, frequencies, decay)

    if bias is not None:
        i = torch.arange(n)[:, None].expand(n, n)
        j = torch.arange(n)[None, :].expand(n, n)
        slot = (j - (i // W - b) * W).masked_fill(~seen, 0)
        by_head = bias.to(dtype)[:, i % W, slot]  # (h, n, n)
        scores = scores + by_head[torch.arange(rows) % bias.shape[0]]
    if shared_qk:
        scores = scores.masked_fill(torch.eye(n, dtype=torch.bool), SELF_SCORE)

    seen = seen.expand(rows, n, n)
    if mask is not None:
        batch = torch.arange(rows) // (rows // mask.shape[0])
        seen = seen & mask[batch][:, None, :]
    scores = scores.to(wide).masked_fill(~seen, -math.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    e = (scores - top).exp()
    total = e.sum(-1, keepdim=True)
    result = e / total.masked_fill(total == 0, 1)
    return result.reshape(*lead, n, n)


def attend(q, k, v, window_size, *, keep=None, dropout=0.0, **options):
    """(*lead, n, D): the layer's output; the options are those of `weights`.

    keep: booleans that broadcast to (*lead, n, n), the weights that dropout leaves.
    """
    dtype = options.get("dtype", torch.float64)
    w = weights(q, k, window_size, **options)
    if keep is not None:
        w = w * keep / (1 - dropout)
    if v.shape[:-2] != q.shape[:-2]:
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return w.to(dtype) @ v.to(dtype)
