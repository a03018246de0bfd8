"""``local_attention``; ``explain`` says which path it takes, ``attention_map`` its weights."""

from typing import Any

from torch import Tensor

from . import decoding, dispatch
from .cache import LocalCache
from .dispatch import Choice
from .eager.attend import weights
from .masks import Rule
from .masks.spans import MOST_DENSE, from_spans
from .masks.window import as_rule
from .rotary import Rotary
from .shapes import shaped
from .spec import BackendName, Inputs, Spec, call_of, rotation_of
from .torch_limits.tracing import is_tracing
from .varlen import in_a_row


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Rule | int,
    *,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    shared_qk: bool = False,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    rotary: Rotary | None = None,
    documents: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_offset: int | Tensor | None = None,
    return_lse: bool = False,
    cache: LocalCache | None = None,
    backend: BackendName = "auto",
    kernel_options: dict[str, Any] | None = None,
) -> Any:
    """Attention of each query to the keys that ``window`` lets it see.

    Args:
        q: ``(*lead, n, d)``; any length ``n``, any leading sizes.
        k: as ``q``; in 4 dimensions it may have fewer heads, a divisor of ``q``'s. With an offset
            it may have another length ``m``.
        v: as ``k``, but of any last size ``d_v``.
        window: the rule; an int is the size of a window that looks one back and one forward.
        mask: boolean ``(batch, m)``, True for keys to keep. ``batch`` divides the number of rows,
            ``q``'s leading sizes multiplied; row ``r`` takes ``mask[r // (rows / batch)]``.
        attn_bias: ``(heads, W, window.span)``, added to the scores. Its second index is the query's
            place in its window, its third the key's place in the windows that the query looks at.
            ``heads`` divides the number of rows, and row ``r`` takes ``r % heads``. It may require
            a gradient.
        scale: factor on the query-key products, ``d ** -0.5`` by default.
        softcap: bound ``c`` of a product ``s`` with its scale, which becomes ``c * tanh(s / c)``
            before the bias is added (Gemma 2, arXiv:2408.00118, section 2). None for no bound.
        sinks: ``(heads,)``, a logit for each head that takes part in the softmax and has no value
            (gpt-oss, arXiv:2508.10925, section 2). ``heads`` as for ``attn_bias``. It may require a
            gradient.
        shared_qk: keys are scaled to length 1, and a token attends to itself only when it sees
            nothing else (Reformer, arXiv:2001.04451).
        dropout: probability to drop an attention weight after the softmax, in [0, 1). Sinks are not
            dropped.
        dropout_seed: 0-d int64 tensor that decides which weights are dropped, by default drawn from
            torch's generator. Either path drops the same weights for the same seed. So does a call
            over a part of the queries, where offsets say which.
        rotary: rotates queries and keys first, by position; a ``Rotary`` of ``q``'s head size, on
            its device.
        documents: integer ``(batch, m)`` or ``(m,)``, the document of each key. A document is a run
            of equal numbers in a row, and a query sees keys of its own document alone. Positions
            count from a document's first token. Negative numbers are padding: it sees nothing, and
            nothing sees it. ``batch`` is 1 or as for ``mask``. On a GPU the numbers are never
            read on the host, so that a kernel serves every packing.
        q_offset, kv_offset: position of the first query and of the first key, 0 by default: ints,
            or integer ``(batch,)`` on ``q``'s device, ``batch`` as for ``documents``. Windows begin
            at position 0. A key at a position below 0 is not seen; a query there sees nothing.
            Where documents are given as well, a query is of the document of the key at its
            position, or of the nearest key, and the first document of a row counts from position 0.
        return_lse: return the log-sum-exps as well.
        cache: a ``LocalCache`` that holds the tokens so far. It stores the new ones, and their
            queries see its keys as well. Positions go on from ``cache.lengths``. A ``mask`` is for
            the new tokens, ``(batch, n)``, and each row stores those that are kept.
        backend: ``"auto"``, ``"flex"`` (one fused kernel) or ``"eager"`` (plain tensor
            operations, linear in ``n``). ``explain`` says what ``auto`` takes.
        kernel_options: passed to ``flex_attention``. They must be None with ``backend="eager"``,
            and have no effect where ``"auto"`` takes that path.

    Returns:
        ``(*lead, n, d_v)`` in ``q``'s dtype, or in autocast's where that is on; float64 stays
        float64. Zeros for a query that sees no key.
        With ``return_lse`` a pair of that and ``(*lead, n)``, the natural logarithm of the sum of
        exponentials of a query's scores, its sink included: fp32 (fp64 for float64), -inf for a
        query that sees no key. ``merge_attention`` takes such pairs.

    Raises:
        ValueError: an argument does not fit; the message names it and says what would.
        TypeError: an argument is of the wrong kind.
        RuntimeError: on the flex path, where torch leaves the kernel uncompiled.
    """
    spec, inputs = call_of(
        q, k, v, window, mask, attn_bias, scale, softcap, sinks, shared_qk, dropout, dropout_seed,
        rotary, documents, q_offset, kv_offset, return_lse, backend, kernel_options,
    )  # fmt: skip
    if cache is not None:
        return decoding.attend(spec, inputs, cache)
    return dispatch.attend(spec, inputs)


def attention_map(
    q: Tensor,
    k: Tensor,
    window: Rule | int,
    *,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    shared_qk: bool = False,
    rotary: Rotary | None = None,
    dense: bool = False,
) -> Tensor:
    """The weights that ``local_attention`` mixes values with, before dropout.

    Args as those of ``local_attention``, and:
        dense: all pairs of tokens instead of the window, for up to 4096 tokens.

    Returns:
        ``(*lead, n, window.span)`` in fp32 at least: column ``c`` of query ``i`` is the key
        ``window.span_start(i) + c``, as in ``attn_bias``; 0 where it is hidden or outside the
        sequence. A row sums to 1, less its sink's weight, or to 0 where a query sees no key.
        With ``dense`` ``(*lead, n, n)``, a column for each key.

    Raises:
        ValueError, TypeError: as ``local_attention``, and for a dense map that is too large.
    """
    rule, (base, inv_freq, zeta) = as_rule(window), rotation_of(rotary)
    if not rule.is_window:
        raise ValueError(f"window must be a Window for its map, got {type(rule).__name__}")
    if is_tracing():
        raise RuntimeError(
            "attention_map cannot be traced, for it would hold at the example's length alone: "
            "torch.export takes it"
        )
    inputs = Inputs(q, k, k, mask, attn_bias, None, inv_freq, zeta, sinks=sinks)
    spec = Spec(rule, scale, shared_qk, xpos_base=base, softcap=softcap)
    spec, inputs = dispatch.checked(spec, inputs)
    n = q.shape[-2]
    if dense and n * n > MOST_DENSE:
        raise ValueError(
            f"dense must be False for q of length {n}: its square is above {MOST_DENSE} pairs"
        )
    found = weights(spec, shaped(inputs)).reshape(*q.shape[:-1], spec.rule.window.span)
    return from_spans(found, spec.rule.window) if dense else found


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Rule | int,
    *,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    shared_qk: bool = False,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    rotary: Rotary | None = None,
    documents: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_offset: int | Tensor | None = None,
    return_lse: bool = False,
    cache: LocalCache | None = None,
    backend: BackendName = "auto",
    kernel_options: dict[str, Any] | None = None,
    cu_seqlens: Tensor | None = None,
) -> Choice:
    """Which path ``local_attention`` would take for its arguments, and why.

    Args as those of ``local_attention``, and:
        cu_seqlens: as for ``local_attention_varlen``, in whose shapes q, k and v are then taken.

    Raises:
        ValueError, TypeError: as ``local_attention``.
    """
    if cu_seqlens is not None:
        if documents is not None:
            raise ValueError("documents must be None where cu_seqlens gives them, got both")
        q, k, v = in_a_row(q, k, v)
    spec, inputs = call_of(
        q, k, v, window, mask, attn_bias, scale, softcap, sinks, shared_qk, dropout, dropout_seed,
        rotary, documents, q_offset, kv_offset, return_lse, backend, kernel_options,
    )  # fmt: skip
    inputs = inputs._replace(cu_seqlens=cu_seqlens)
    if cache is not None:
        return decoding.choose(spec, inputs, cache)
    return dispatch.explained(spec, inputs)
