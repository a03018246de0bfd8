"""Triton's kernel that makes what short sequences' kernels read, in one launch.

Shapes are those of ``spec``. Only what Triton is to know of an argument is annotated.
"""

import triton
import triton.language as tl


# Nothing is assumed of numbers and addresses: each length would have a kernel of its own.
@triton.jit(
    do_not_specialize=[
        "q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "b", "n",
    ],
    do_not_specialize_on_alignment=[
        "q", "k", "v", "q_out", "k_out", "v_out", "q_turns", "k_turns", "mask", "documents",
        "table", "bias", "scores",
    ],
)  # fmt: skip
def prepare(
    q, k, v, q_out, k_out, v_out, q_turns, k_turns, mask, documents, table, bias, scores,
    q_b: tl.int64, q_h: tl.int64, q_n: tl.int64, k_b: tl.int64, k_h: tl.int64, k_n: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_n: tl.int64, b: tl.int64, n: tl.int64,
    H: tl.constexpr, KV: tl.constexpr, MASK_H: tl.constexpr, D: tl.constexpr,
    TRAINS: tl.constexpr, BACK: tl.constexpr, TOKENS: tl.constexpr, TABLE_ROW: tl.constexpr,
    LOW: tl.constexpr, BIAS_H: tl.constexpr, W: tl.constexpr, BEHIND: tl.constexpr,
    SPAN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Rotates, clears padding, and writes what is added to scores.

    Programs are ``(b * H, blocks of TOKENS tokens, 4)``. None stands for what there is not and for
    results that are not wanted. All but ``q``, ``k`` and ``v`` lies in memory in one piece.

    Args:
        q, k, v: of strides ``q_b`` to ``v_n``, each token in one piece.
        q_turns, k_turns: ``(n, D)``, the cosines of each token and then its sines.
        mask: ``(b, MASK_H, n)``. Padding becomes zeros; of queries only NaN and inf do.
        documents: ``(b, n)``, runs of equal numbers, or None. A query sees keys of its own run,
            from whose first token the table and the bias count.
        TRAINS: whether gradients will be taken, so that queries have to be finite.
        BACK: whether these are gradients. They are rotated back, and only those of values cleared.
        table: 0 where a token sees another, else -inf; rows of ``TABLE_ROW`` numbers.
        bias: ``(BIAS_H, W, SPAN)``, from ``BEHIND`` windows before a query's own on.
        scores: ``(b or 1, H or 1, n, n rounded up to a multiple of ALIGNED)``, with 1 where all are
            alike.
        LOW: the scores of padding.
    """
    row, first, which = tl.program_id(0).to(tl.int64), tl.program_id(1) * TOKENS, tl.program_id(2)
    if which == 0:
        if q_out is not None:
            _treat(
                q, q_out, q_turns, mask if TRAINS else None, q_b, q_h, q_n, b, row, first, n,
                H, MASK_H, D, False, BACK, TOKENS,
            )  # fmt: skip
    elif which == 1:
        if k_out is not None:
            _treat(
                k, k_out, k_turns, None if BACK else mask, k_b, k_h, k_n, b, row, first, n,
                KV, MASK_H, D, True, BACK, TOKENS,
            )  # fmt: skip
    elif which == 2:
        if v_out is not None:
            _treat(
                v, v_out, None, mask, v_b, v_h, v_n, b, row, first, n,
                KV, MASK_H, D, True, BACK, TOKENS,
            )  # fmt: skip
    else:
        if scores is not None:
            SCORES_H: tl.constexpr = 1 if bias is None and MASK_H == 1 else H
            if row < (1 if mask is None else b) * SCORES_H:
                _hide(
                    table, bias, scores, mask, documents, row, first, n,
                    SCORES_H, MASK_H, TABLE_ROW, LOW, BIAS_H, W, BEHIND, SPAN, ALIGNED,
                    TOKENS,
                )  # fmt: skip


@triton.jit
def _treat(
    x, out, turns, mask, x_b, x_h, x_n, b, row, first, n,
    H: tl.constexpr, MASK_H: tl.constexpr, D: tl.constexpr, WHOLLY: tl.constexpr,
    BACK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens of a row; their halves are rotated against each other, and rounded once."""
    HALF: tl.constexpr = D // 2
    PLACES: tl.constexpr = triton.next_power_of_2(HALF)
    token, place = first + tl.arange(0, TOKENS)[:, None], tl.arange(0, PLACES)[None, :]
    there = (row < b * H) & (token < n) & (place < HALF)
    at = x + (row // H) * x_b + (row % H) * x_h + token * x_n + place
    low, high = tl.load(at, there, 0.0), tl.load(at + HALF, there, 0.0)
    if mask is not None:
        # A NaN in padding would spread: its weight is 0, and 0 * NaN is NaN. From a padded query
        # it would by its gradient, which is 0.
        keeps = tl.load(_keys_of(mask, row, n, H, MASK_H) + token, token < n, 0) != 0
        if WHOLLY:
            low, high = tl.where(keeps, low, 0.0), tl.where(keeps, high, 0.0)
        else:
            low = tl.where(keeps | (tl.abs(low) < float("inf")), low, 0.0)
            high = tl.where(keeps | (tl.abs(high) < float("inf")), high, 0.0)
    if turns is not None:
        cos = tl.load(turns + token * D + place, there, 0.0)
        sin = tl.load(turns + token * D + HALF + place, there, 0.0)
        if BACK:
            sin = -sin
        low, high = low * cos - high * sin, high * cos + low * sin
    at = out + (row * n + token) * D + place
    tl.store(at, low, there)
    tl.store(at + HALF, high, there)


@triton.jit
def _hide(
    table, bias, scores, mask, documents, row, first, n,
    H: tl.constexpr, MASK_H: tl.constexpr, TABLE_ROW: tl.constexpr, LOW: tl.constexpr,
    BIAS_H: tl.constexpr, W: tl.constexpr, BEHIND: tl.constexpr, SPAN: tl.constexpr,
    ALIGNED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What is added to some queries' scores."""
    KEYS: tl.constexpr = 128
    query = first + tl.arange(0, TOKENS)[:, None]
    at = scores + (row * n + query) * ((n + ALIGNED - 1) // ALIGNED * ALIGNED)
    start, end = query * 0, query * 0 + n
    if documents is not None:
        start, end = _ends(documents + (row // H) * n, query, n, KEYS)
    place = query - start
    for begin in range(0, n, KEYS):
        key = begin + tl.arange(0, KEYS)[None, :]
        there = (query < n) & (key < n) & (key >= start) & (key < end)
        added = tl.load(table + place * TABLE_ROW + (key - start), there, float("-inf"))
        if bias is not None:
            of_query = bias + ((row % H % BIAS_H) * W + place % W) * SPAN
            column = key - start - (place // W - BEHIND) * W
            added += tl.load(of_query + column, there & (added == 0), 0.0)
        if mask is not None:
            keeps = tl.load(_keys_of(mask, row, n, H, MASK_H) + key, key < n, 0) != 0
            added = tl.where(keeps, added, LOW)
        tl.store(at + key, added, (query < n) & (key < n))


@triton.jit
def _ends(documents, query, n, KEYS: tl.constexpr):
    """The first token of each query's document, and the one after its last."""
    n = n.to(tl.int32)
    start, end = query * 0, query * 0 + n
    for begin in range(0, n, KEYS):
        token = begin + tl.arange(0, KEYS)[None, :]
        inside = (token > 0) & (token < n)
        number = tl.load(documents + token, inside, 0)
        begins = inside & (number != tl.load(documents + token - 1, inside, 0))
        before = tl.reduce(tl.where(begins & (token <= query), token, 0), 1, _later, keep_dims=True)
        after = tl.reduce(tl.where(begins & (token > query), token, n), 1, _sooner, keep_dims=True)
        start, end = tl.maximum(start, before), tl.minimum(end, after)
    return start, end


# Not tl.max and tl.min, which Triton's interpreter knows only if it was asked for from the start.
@triton.jit
def _later(one, other):
    return tl.maximum(one, other)


@triton.jit
def _sooner(one, other):
    return tl.minimum(one, other)


@triton.jit
def _keys_of(mask, row, n, H: tl.constexpr, MASK_H: tl.constexpr):
    """Where the mask of a row begins."""
    return mask + ((row // H) * MASK_H + row % H % MASK_H) * n
