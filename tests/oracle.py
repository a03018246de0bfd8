"""Local attention by brute force: the specification, one token pair at a time.

Slow, dense and in float64 on purpose. It shares no code with the package and has none of its
ideas (no key intervals, no windows cut out of the sequence, no segments for xpos), so that a
mistake has to be made twice to go unseen. Gradients come from autograd.

Letters: n queries, m keys (as many unless said otherwise), d head size, D value size, W window, b
and f windows looked back and forward, R rows (all leading dimensions of q, flattened), h heads of
the bias.
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


def places(rows, n, m, documents=None, q_offset=None, kv_offset=None):
    """Where n queries and m keys of each row stand: (place, document) pairs, one at a time.

    `documents` is (batch, m) or (m,), an offset a number or (batch,); a row's batch entry is
    row // (rows / batch). A place counts from the document's first token. A query is of the
    document of the key that is nearest to it, and of that at its position if there is one. The
    document is None for tokens that see nothing and that nothing sees.

    Returns two lists of `rows` lists, of the queries and of the keys.
    """

    def of_row(x, row):
        if x is None:
            return 0
        if not isinstance(x, torch.Tensor):
            return x
        return x[row // (rows // len(x))].tolist()

    queries, keys = [], []
    for row in range(rows):
        first_query, first_key = of_row(q_offset, row), of_row(kv_offset, row)
        if documents is None:
            numbers = [0] * m
        else:
            numbers = of_row(documents[None] if documents.dim() == 1 else documents, row)
        found, began = [], 0
        for j in range(m):
            position = first_key + j
            if j > 0 and numbers[j] != numbers[j - 1]:
                began = max(position, 0)
                document = j
            elif j == 0:
                document = 0
            found.append((began, document))

        def at(position, key, found=found, numbers=numbers):
            began, document = found[key] if m else (0, 0)
            nobody = position < 0 or bool(m) and numbers[key] < 0
            return position - began, None if nobody else document

        keys.append([at(first_key + j, j) for j in range(m)])
        nearest = [min(max(first_query + i - first_key, 0), m - 1) for i in range(n)]
        queries.append([at(first_query + i, nearest[i]) for i in range(n)])
    return queries, keys


def _as_tensors(placed):
    """(R, n) places and (R, n) documents, -1 for None, of one of the lists of `places`."""
    place = [[place for place, _ in row] for row in placed]
    document = [[-1 if name is None else name for _, name in row] for row in placed]
    shape = len(placed), -1
    if not placed or not placed[0]:
        shape = len(placed), 0
    return (
        torch.tensor(place, dtype=torch.long).reshape(shape),
        torch.tensor(document, dtype=torch.long).reshape(shape),
    )


def seen_from(queries, keys, W, *, causal, b, f, exact):
    """(R, n, m) booleans for the places and documents of `places`."""
    (i, of_query), (j, of_key) = _as_tensors(queries), _as_tensors(keys)
    i, j, of_query, of_key = i[:, :, None], j[:, None], of_query[:, :, None], of_key[:, None]
    w = torch.div(i, W, rounding_mode="floor")
    window = torch.div(j, W, rounding_mode="floor")
    seen = (of_query == of_key) & (of_query >= 0) & (w - b <= window) & (window <= w + f)
    if causal:
        seen = seen & (j <= i)
    if exact:
        seen = seen & (j >= i - b * W)
        if not causal:
            seen = seen & (j <= i + f * W)
    return seen


def rotate(x, positions, frequencies=None):
    """x (R, n, d) turned by position * theta ** (-2c/d), first half of d against the second."""
    d = x.shape[-1]
    if frequencies is None:
        frequencies = THETA ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    angles = positions.double()[..., None] * frequencies.double()
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _scores(q, k, i, j, seen, W, scale, f, rotary, xpos, base, frequencies, decay):
    """(R, n, m) scaled dot products, in q's dtype; i and j are places, `seen` the mask."""
    d = q.shape[-1]
    dtype = q.dtype
    if not rotary:
        return scale * torch.einsum("rid,rjd->rij", q, k)
    wide = torch.promote_types(dtype, torch.float32)
    q = rotate(q.to(wide), i + f * W, frequencies).to(dtype)
    k = rotate(k.to(wide), j, frequencies).to(dtype)
    if not xpos:
        return scale * torch.einsum("rid,rjd->rij", q, k)
    if decay is None:
        c = torch.arange(d // 2, dtype=torch.float64)
        decay = (2 * c + 0.4 * d) / (1.4 * d)
    distance = i[..., :, None] + f * W - j[..., None, :]
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
    softcap=None,
    sinks=None,
    shared_qk=False,
    rotary=False,
    xpos=False,
    base=None,
    frequencies=None,
    decay=None,
    bias=None,
    mask=None,
    override=None,
    documents=None,
    q_offset=None,
    kv_offset=None,
    dtype=torch.float64,
    lse=False,
):
    """(*lead, n, m) attention weights; rows of queries that see nothing are zero.

    `mask` (batch, m) keeps keys, `bias` is (h, W, (1 + b + f) * W), `sinks` (h,), `override` takes
    the place of the window size everywhere but in the default `base`. `frequencies` and `decay`,
    (d / 2,) each, stand in for the formulas of rotary's angles and of xpos's z. Documents and
    offsets are those of `places`. In a lower `dtype` every product is rounded to it and the
    softmax is float32: plain arithmetic to take error budgets from.

    With `lse` a pair: the weights, and the logarithms of what they were divided by, (*lead, n).
    """
    lead, (n, d), m = q.shape[:-2], q.shape[-2:], k.shape[-2]
    W = window_size if override is None else override
    base = window_size // 2 if base is None else base
    b, f = look_backward, look_forward
    if f is None:
        f = 0 if causal else 1
    scale = d**-0.5 if scale is None else scale
    rows = math.prod(lead)

    if k.shape[:-2] != lead:  # grouped queries: H/G neighbouring heads share one
        k = k.repeat_interleave(lead[1] // k.shape[1], dim=1)
    q, k = q.to(dtype).reshape(rows, n, d), k.to(dtype).reshape(rows, m, d)
    wide = torch.promote_types(dtype, torch.float32)
    if shared_qk:
        length = k.to(wide).pow(2).sum(-1, keepdim=True).sqrt()
        k = (k.to(wide) / length.clamp_min(1e-12)).to(dtype)

    if documents is None and q_offset is None and kv_offset is None:
        i = j = torch.arange(n)
        seen = dense_mask(n, W, causal=causal, b=b, f=f, exact=exact).expand(rows, n, n)
        own = torch.eye(n, dtype=torch.bool)
    else:
        at = places(rows, n, m, documents, q_offset, kv_offset)
        seen = seen_from(*at, W, causal=causal, b=b, f=f, exact=exact)
        (i, _), (j, _) = map(_as_tensors, at)
        own = (i[:, :, None] == j[:, None]) & seen
    scores = _scores(q, k, i, j, seen, W, scale, f, rotary, xpos, base, frequencies, decay)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    row = torch.arange(rows)
    if bias is not None:
        place, column = i[..., :, None], j[..., None, :]
        slot = (column - (torch.div(place, W, rounding_mode="floor") - b) * W).expand(rows, n, m)
        by_row = bias.to(dtype)[row % bias.shape[0]]
        place = (place % W).expand(rows, n, m)
        scores = scores + by_row[row[:, None, None], place, slot.masked_fill(~seen, 0)]
    if shared_qk:
        scores = scores.masked_fill(own, SELF_SCORE)

    if mask is not None:
        batch = row // (rows // mask.shape[0])
        seen = seen & mask[batch][:, None, :]
    scores = scores.to(wide).masked_fill(~seen, -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    every = scores
    if sinks is not None:
        sink = sinks.to(wide)[row % sinks.shape[0]][:, None, None].expand(rows, n, 1)
        every = torch.cat((scores, sink), dim=-1)
    top = every.detach().amax(-1, keepdim=True) if every.shape[-1] else scores.new_zeros(rows, n, 1)
    top = top.masked_fill(top == -math.inf, 0)
    e = (scores - top).exp()
    total = (every - top).exp().sum(-1, keepdim=True).masked_fill(blind, 1)
    result = (e / total).reshape(*lead, n, m)
    if not lse:
        return result
    return result, (top + total.log()).masked_fill(blind, -math.inf).reshape(*lead, n)


def attend(q, k, v, window_size, *, keep=None, dropout=0.0, **options):
    """(*lead, n, D): the layer's output; the options are those of `weights`.

    keep: booleans that broadcast to (*lead, n, m), the weights that dropout leaves.

    With `lse` a pair, as `weights`.
    """
    dtype = options.get("dtype", torch.float64)
    w = weights(q, k, window_size, **options)
    if options.get("lse"):
        w, lse = w
    if keep is not None:
        w = w * keep / (1 - dropout)
    if v.shape[:-2] != q.shape[:-2]:
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    out = w.to(dtype) @ v.to(dtype)
    return (out, lse) if options.get("lse") else out
