"""What a call is: ``Spec``, all that is known without tensors, and ``Inputs``, its tensors.

Both first hold a user's arguments as they came. ``resolved`` fills in the defaults of a ``Spec``,
and ``shapes`` brings ``Inputs`` to the shapes that the paths take. A new argument is a field here,
a check in ``checks`` and a line on each path.

Shapes, here and on the paths: ``b`` batch entries, ``h`` query heads, ``kv`` key heads, a divisor
of ``h``; ``n`` queries, and keys, where these are not ``m``; ``d`` the head size, ``d_v`` that of
values; ``W`` tokens in a window, ``span`` keys in a query's windows.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .masks.arguments import kind_of, plain
from .masks.documents import documents_from_cu_seqlens
from .masks.rule import Rule
from .masks.window import as_rule
from .rotary import Rotary
from .torch_limits.sizes import plain_float, plain_int
from .xpos import Xpos

BackendName = Literal["auto", "flex", "eager"]

Result = Tensor | tuple[Tensor, Tensor]
"""The output, and the log-sum-exps where these are asked for."""


class Spec(NamedTuple):
    """What a call is, without its tensors. Hashable once it is resolved.

    Attributes:
        rule: which keys a query sees; its tensors are in ``Inputs``.
        scale: factor on the products of queries and keys. None stands for ``d ** -0.5`` until it is
            resolved.
        shared_qk: keys are scaled to length 1, and a token sees itself only when it sees nothing
            else.
        dropout: probability to drop a weight.
        xpos_base: tokens per unit of xpos's exponent; None without xpos.
        backend: the path that the user asked for.
        kernel_options: a dict for ``flex_attention``; once resolved, sorted pairs, to be hashable.
        softcap: bound of the products times ``scale``, approached by a tanh; None without one.
        return_lse: return the log-sum-exp of each query's scores as well.
    """

    rule: Rule
    scale: float | None = None
    shared_qk: bool = False
    dropout: float = 0.0
    xpos_base: float | None = None
    backend: BackendName = "auto"
    kernel_options: Any = None
    softcap: float | None = None
    return_lse: bool = False


class Inputs(NamedTuple):
    """The tensors of a call, in a user's shapes; in brackets those that ``shapes`` makes.

    Attributes:
        q: ``(*lead, n, d)`` [``(b, h, n, d)``].
        k, v: as ``q``, ``v`` with ``d_v``; in 4 dimensions they may have fewer heads. ``m`` keys,
            as many as queries where no offset is given [``(b, kv, m, d or d_v)``].
        mask: boolean ``(batch, m)``, True = keep, ``batch`` a divisor of ``q``'s rows
            [``(b, h or 1, m)``].
        bias: ``(heads, W, span)``; ``heads`` divides ``b * h``.
        seed: 0-d int64, which weights are dropped.
        inv_freq: ``(d / 2,)``, rotary's frequencies.
        zeta: ``(d / 2,)``, xpos's decay.
        rule_tensors: ``spec.rule.tensors``.
        sinks: ``(heads,)``; ``heads`` divides ``b * h``.
        documents: integer ``(batch, m)`` or ``(m,)`` [``(b or 1, h or 1, m)``].
        q_offset, kv_offset: position of the first query and of the first key, an int or integer
            ``(batch,)`` [an int or ``(b or 1, h or 1, 1)``]; None for both unless one was given.
        begin: position at which each row's first document begins, which may lie before the keys:
            integer ``(batch,)`` [``(b or 1, h or 1, 1)``]; None for 0.
        seeing: the first query that sees keys, and the first one after that which sees none, ints
            [or integer ``(1, 1, 1)``]; None where all queries may.
        cu_seqlens: in place of ``documents`` of a single row, or beside them: where each begins,
            and last where the last one ends, integer ``(documents + 1,)``. ``numbered`` makes
            documents of it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    seed: Tensor | None = None
    inv_freq: Tensor | None = None
    zeta: Tensor | None = None
    rule_tensors: tuple[Tensor, ...] = ()
    sinks: Tensor | None = None
    documents: Tensor | None = None
    q_offset: int | Tensor | None = None
    kv_offset: int | Tensor | None = None
    begin: Tensor | None = None
    seeing: tuple[int | Tensor, int | Tensor] | None = None
    cu_seqlens: Tensor | None = None


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Rule | int,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    shared_qk: bool,
    dropout: float,
    dropout_seed: Tensor | None,
    rotary: Rotary | None,
    documents: Tensor | None,
    q_offset: int | Tensor | None,
    kv_offset: int | Tensor | None,
    return_lse: bool,
    backend: BackendName,
    kernel_options: dict[str, Any] | None,
) -> tuple[Spec, Inputs]:
    """The call that arguments of ``local_attention`` make, in its order.

    Raises:
        ValueError, TypeError: no window, offset or rotary embedding can be read from them.
    """
    rule, (base, inv_freq, zeta) = as_rule(window), rotation_of(rotary)
    offsets = offsets_of(q, k, q_offset, kv_offset)
    spec = Spec(rule, scale, shared_qk, dropout, base, backend, kernel_options, softcap, return_lse)
    inputs = Inputs(
        q, k, v, mask, attn_bias, dropout_seed, inv_freq, zeta, rule.tensors, sinks, documents,
        *offsets,
    )  # fmt: skip
    return spec, inputs


_OF_PYTHON = {type(None), bool, int, float}
"""Types of numbers and flags that stay what they are."""


def with_plain_numbers(spec: Spec) -> Spec:
    """``spec`` with Python's numbers and flags for scalars of numpy and 0-d tensors."""
    given = spec.scale, spec.softcap, spec.dropout, spec.shared_qk, spec.return_lse
    if {*map(type, given)} <= _OF_PYTHON:
        return spec
    scale, softcap, dropout, shared_qk, return_lse = map(plain, given)
    return spec._replace(
        scale=scale, softcap=softcap, dropout=dropout, shared_qk=shared_qk, return_lse=return_lse
    )


def offsets_of(
    q: Tensor, k: Tensor, q_offset: int | Tensor | None, kv_offset: int | Tensor | None
) -> tuple[int | Tensor | None, int | Tensor | None]:
    """``Inputs.q_offset`` and ``Inputs.kv_offset``: None for both where they change nothing."""
    if q_offset is None and kv_offset is None:
        return None, None
    q_offset, kv_offset = (
        0 if x is None else x if isinstance(x, Tensor) else plain(x) for x in (q_offset, kv_offset)
    )
    numbers = type(q_offset) is int and type(kv_offset) is int
    tensors = isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() > 1 < k.dim()
    if numbers and q_offset == kv_offset == 0 and tensors and q.shape[-2] == k.shape[-2]:
        return None, None
    return q_offset, kv_offset


def wants_gradients(inputs: Inputs) -> bool:
    """Whether a call is to give gradients of q, k, v, the bias or the sinks."""
    learned = inputs.q, inputs.k, inputs.v, inputs.bias, inputs.sinks
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned)


def is_plain(spec: Spec, bias: Tensor | None, sinks: Tensor | None) -> bool:
    """Whether ``scaled_dot_product_attention`` computes a call, once it is told who sees whom."""
    if spec.softcap is not None or spec.shared_qk or spec.dropout or spec.return_lse:
        return False
    return bias is None and sinks is None and spec.xpos_base is None


def may_hide_first(spec: Spec) -> bool:
    """Whether kernels may hide scores before they scale them: -inf times 0 or less hides nothing.

    FlashAttention 4's do, and torch's for processors where they hide later keys by themselves
    (torch 2.11 to 2.15).
    """
    return spec.scale is None or spec.scale > 0


def is_placed(inputs: Inputs) -> bool:
    """Whether what queries see is not the window's alone: with documents, offsets or ``seeing``."""
    documents = inputs.documents is not None or inputs.cu_seqlens is not None
    return documents or inputs.q_offset is not None or inputs.seeing is not None


def numbered(inputs: Inputs) -> Inputs:
    """Shaped ``inputs`` with a document's number for each key, where ``cu_seqlens`` gives them."""
    sums, documents = inputs.cu_seqlens, inputs.documents
    if sums is None:
        return inputs
    if documents is None:
        documents = documents_from_cu_seqlens(sums, inputs.k.shape[2])[None, None]
    return inputs._replace(documents=documents, cu_seqlens=None)


def rotation_of(rotary: Rotary | None) -> tuple[float | None, Tensor | None, Tensor | None]:
    """``Spec.xpos_base``, ``Inputs.inv_freq`` and ``Inputs.zeta``.

    Raises:
        TypeError: it is no ``Rotary``.
    """
    if rotary is None:
        return None, None, None
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a Rotary or None, got {kind_of(rotary)}")
    if rotary.use_xpos:
        return rotary.scale_base, rotary.inv_freq, rotary.scale
    return None, rotary.inv_freq, None


def resolved(spec: Spec, inputs: Inputs) -> Spec:
    """``spec`` with its defaults filled in, hashable.

    Meta tensors take the place of the rule's: a ``Spec`` is kept, and must not keep their memory.
    """
    scale, options, rule = spec.scale, spec.kernel_options, spec.rule
    if scale is None:
        # A plain int: Dynamo may make the size symbolic, and kernels take no power of a symbol.
        scale = plain_int(inputs.q.shape[-1]) ** -0.5
    elif isinstance(scale, int):
        scale = float(plain_int(scale))
    else:
        scale = plain_float(scale)
    softcap, dropout = spec.softcap, plain_float(spec.dropout)
    if isinstance(softcap, int):
        softcap = float(plain_int(softcap))
    elif softcap is not None:
        softcap = plain_float(softcap)
    if options is not None:
        options = tuple(sorted(options.items()))
    if rule.tensors and not torch.compiler.is_compiling():
        rule = without_values(rule)
    return spec._replace(
        rule=rule, scale=scale, dropout=dropout, kernel_options=options, softcap=softcap
    )


def without_values(rule: Rule) -> Rule:
    """``rule`` over meta tensors of the same shapes, which hold no memory."""
    return rule.with_tensors(tuple(x.to("meta") for x in rule.tensors))


def xpos_of(spec: Spec, inputs: Inputs) -> Xpos | None:
    """xpos of a call, or None where it is off."""
    if spec.xpos_base is None or inputs.zeta is None:
        return None
    return Xpos(inputs.zeta, spec.xpos_base)
