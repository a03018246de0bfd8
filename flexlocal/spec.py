"""What a call is: ``Spec``, all that is known without tensors, and ``Inputs``, its tensors.

Both first hold a user's arguments as they came. ``resolved`` fills in the defaults of a ``Spec``,
and ``shaped`` brings ``Inputs`` to the shapes that the paths take. A new argument is a field here,
a check in ``checks`` and a line on each path.

Shapes, here and on the paths: ``b`` batch entries, ``h`` query heads, ``kv`` key heads, a divisor
of ``h``; ``n`` tokens, ``d`` the head size, ``d_v`` that of values; ``W`` tokens in a window,
``span`` keys in a query's windows.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .masks.arguments import kind_of
from .masks.keys import for_each_head, mask_of_rows
from .masks.rule import Rule
from .rotary import Rotary, Xpos
from .torch_limits import plain_int

BackendName = Literal["auto", "flex", "eager"]


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
    """

    rule: Rule
    scale: float | None = None
    shared_qk: bool = False
    dropout: float = 0.0
    xpos_base: float | None = None
    backend: BackendName = "auto"
    kernel_options: Any = None


class Inputs(NamedTuple):
    """The tensors of a call, in a user's shapes; in brackets the shapes that ``shaped`` makes.

    Attributes:
        q: ``(*lead, n, d)`` [``(b, h, n, d)``].
        k, v: as ``q``, ``v`` with ``d_v``; in 4 dimensions they may have fewer heads
            [``(b, kv, n, d or d_v)``].
        mask: boolean ``(batch, n)``, True = keep, ``batch`` a divisor of ``q``'s rows
            [``(b, h or 1, n)``].
        bias: ``(heads, W, span)``; ``heads`` divides ``b * h``.
        seed: 0-d int64, which weights are dropped.
        inv_freq: ``(d / 2,)``, rotary's frequencies.
        zeta: ``(d / 2,)``, xpos's decay.
        rule_tensors: ``spec.rule.tensors``.
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
    if options is not None:
        options = tuple(sorted(options.items()))
    if rule.tensors and not torch.compiler.is_compiling():
        rule = without_values(rule)
    return spec._replace(rule=rule, scale=scale, kernel_options=options)


def without_values(rule: Rule) -> Rule:
    """``rule`` over meta tensors of the same shapes, which hold no memory."""
    return rule.with_tensors(tuple(x.to("meta") for x in rule.tensors))


def rule_of(spec: Spec, inputs: Inputs) -> Rule:
    """The rule of a call, over the call's own tensors."""
    return spec.rule.with_tensors(inputs.rule_tensors) if inputs.rule_tensors else spec.rule


def xpos_of(spec: Spec, inputs: Inputs) -> Xpos | None:
    """xpos of a call, or None where it is off."""
    if spec.xpos_base is None or inputs.zeta is None:
        return None
    return Xpos(inputs.zeta, spec.xpos_base)


def shaped(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """``inputs`` in the shapes that the paths take; q, k and v cast to ``dtype``, unless None."""
    q, k, v, mask = inputs[:4]
    if dtype is None and mask is None and q.dim() == 4:
        return inputs
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    q, k, v = (_four_dimensional(x, mask) for x in (q, k, v))
    if mask is not None:
        mask = mask_of_rows(mask, q.shape[0], q.shape[1])
        if mask.shape[1] > 1:
            k, v = for_each_head(k, q.shape[1]), for_each_head(v, q.shape[1])
    return Inputs(q, k, v, mask, *inputs[4:])


def _four_dimensional(x: Tensor, mask: Tensor | None) -> Tensor:
    """``(*lead, n, d)`` as ``(b, h, n, d)``, the rows in the same order.

    A view, except that five dimensions that are transposed are copied. A kernel is compiled for one
    ``h`` and serves any ``b``.
    """
    if x.dim() == 4:
        return x
    if x.dim() > 4:
        return x.flatten(0, -4)
    rows = math.prod(x.shape[:-2])
    # Rows that share a mask become heads of one batch entry, so that the mask needs no heads.
    batch = max(1, rows if mask is None else mask.shape[0])
    heads = plain_int(rows // batch)
    # `expand` states the number of heads: Dynamo would else know a quotient of symbolic sizes.
    return x.reshape(batch, heads, *x.shape[-2:]).expand(-1, heads, -1, -1)
