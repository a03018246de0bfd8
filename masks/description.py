"""A mask in numbers, and what its choices waste.

Keys per query take time linear in the sequence; everything about blocks takes time linear in the
blocks of queries.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .window import Window

if TYPE_CHECKING:
    from .picture import MaskPicture

_PREFIXES = {1000: ("", "k", "M", "G", "T", "P"), 1024: ("", "Ki", "Mi", "Gi", "Ti", "Pi")}

_WASTEFUL = 1.5
"""Scores computed per score needed, above which advice is worth a line."""


@dataclass(frozen=True)
class Description:
    """The numbers of a mask; ``print`` it.

    Attributes:
        title: the rule's parameters and the numbers of queries and keys.
        words: what the rule says.
        queries, keys: how many.
        least_keys, most_keys, mean_keys: keys that a query sees.
        blind_queries: queries that see no key; attention gives zeros for them.
        scores: query and key pairs that see each other.
        share: of all ``queries * keys`` pairs.
        block_size: queries and keys in a block.
        empty_blocks, partial_blocks, full_blocks: how many are skipped, masked, whole.
        computed: scores in blocks that are not empty; blocks past the end count whole.
        waste: scores computed per score needed; infinite when none is needed.
        head_size: channels of a head.
        flops: floating-point operations of the scores needed, forward, one head: 2 per channel
            for the score and 2 for the mixture of values.
        computed_flops: the same of the scores computed.
        block_mask_bytes: of the block mask's index tensors.
        dense_mask_bytes: of a boolean mask of all pairs.
        advice: sentences, where a choice wastes work or hides everything.
    """

    title: str
    words: str
    queries: int
    keys: int
    least_keys: int
    most_keys: int
    mean_keys: float
    blind_queries: int
    scores: int
    share: float
    block_size: tuple[int, int]
    empty_blocks: int
    partial_blocks: int
    full_blocks: int
    computed: int
    waste: float
    head_size: int
    flops: int
    computed_flops: int
    block_mask_bytes: int
    dense_mask_bytes: int
    advice: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Names and values, as the description prints them."""
        queries, keys = self.block_size
        blocks = self.empty_blocks + self.partial_blocks + self.full_blocks
        return [
            (
                "keys per query",
                f"{self.least_keys:,} least, {self.most_keys:,} most, {self.mean_keys:,.2f} mean",
            ),
            (
                "scores needed",
                f"{self.scores:,}, {_percent(self.share)} of {self.queries:,} x {self.keys:,}",
            ),
            (
                "blocks",
                f"{self.empty_blocks:,} empty, {self.partial_blocks:,} partial, "
                f"{self.full_blocks:,} full, of {blocks:,} with {queries} x {keys} tokens",
            ),
            (
                "scores computed",
                f"{self.computed:,}, {self.waste:.2f} per score needed",
            ),
            (
                "operations",
                f"{_amount(self.flops, 1000, 'FLOP')} needed, "
                f"{_amount(self.computed_flops, 1000, 'FLOP')} computed, "
                f"forward, per head of {self.head_size}",
            ),
            (
                "memory",
                f"{_amount(self.block_mask_bytes, 1024, 'B')} for the block mask "
                f"(a dense one: {_amount(self.dense_mask_bytes, 1024, 'B')})",
            ),
        ]

    def numbers(self) -> str:
        """The rows and the advice as lines."""
        lines = [f"{name:<16} {value}" for name, value in self.rows()]
        return "\n".join(lines + [f"advice: {line}" for line in self.advice])

    def __str__(self) -> str:
        return f"{self.title}\n{self.words}\n{self.numbers()}"


def described(picture: "MaskPicture") -> Description:
    """The numbers of a picture."""
    least, most, scores, blind = picture.n_keys, 0, 0, 0
    for count in picture.seen.counts():
        least, most = min(least, int(count.min())), max(most, int(count.max()))
        scores += int(count.sum())
        blind += int((count == 0).sum())
    blocks = picture.blocks
    empty, partial, full = blocks.count()
    computed = (partial + full) * picture.block_size[0] * picture.block_size[1]
    waste = computed / scores if scores else float("inf") if computed else 1.0
    return Description(
        title=picture.title,
        words=picture.words,
        queries=picture.n,
        keys=picture.n_keys,
        least_keys=least,
        most_keys=most,
        mean_keys=scores / picture.n,
        blind_queries=blind,
        scores=scores,
        share=scores / (picture.n * picture.n_keys),
        block_size=picture.block_size,
        empty_blocks=empty,
        partial_blocks=partial,
        full_blocks=full,
        computed=computed,
        waste=waste,
        head_size=picture.head_size,
        flops=4 * picture.head_size * scores,
        computed_flops=4 * picture.head_size * computed,
        block_mask_bytes=blocks.index_bytes,
        dense_mask_bytes=picture.n * picture.n_keys,
        advice=tuple(_advice(picture, least, most, blind, waste)),
    )


def _advice(picture: "MaskPicture", least: int, most: int, blind: int, waste: float) -> list[str]:
    short = picture.n <= picture.block_size[0] and picture.n_keys <= picture.block_size[1]
    advice = []
    if blind:
        what = "query sees" if blind == 1 else "queries see"
        advice.append(f"{blind:,} {what} no key, and attention gives zeros there")
    if least == picture.n_keys > 1:
        advice.append("every query sees every key: full attention does the same")
    elif most == 1 and picture.n > 1 and picture.key_mask is None:
        advice.append("a query sees one key only: attention copies its value")
    if short and waste > 1:
        advice.append("the sequence fits into one block, which a kernel computes whole")
    elif waste > _WASTEFUL:
        advice.append(_of_blocks(picture, waste))
    return advice


def _of_blocks(picture: "MaskPicture", waste: float) -> str:
    rule, sizes = picture.rule, picture.block_size
    # Where both sides' blocks begin, and the least step from one block's edge to any other's.
    block, grain = math.lcm(*sizes), math.gcd(*sizes)
    cost = f"{waste:.2f} scores are computed per score needed"
    exact = isinstance(rule, Window) and rule.exact
    if rule.size % block and block % rule.size and not exact:
        near = max(block, round(rule.size / block) * block)
        return (
            f"window_size {rule.size} is no multiple of the block {block}, so that windows end "
            f"inside blocks: {cost}; window_size {near} would end where blocks do"
        )
    # Of more keys than queries a last block that is not whole may see another block.
    if isinstance(rule, Window) and picture.n == picture.n_keys:
        reach = rule.before, rule.after
        free = tuple(-(-keys // grain) * grain for keys in reach)
        if free != reach:
            return (
                f"a reach of {_reach(*reach)} is no multiple of the block {grain}: {cost}; "
                f"a reach of {_reach(*free)} visits the same blocks"
            )
    return f"partial blocks are computed whole: {cost}; smaller blocks would waste less"


def _reach(back: int, ahead: int) -> str:
    return f"{back} keys back" + (f" and {ahead} ahead" if ahead else "")


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _amount(count: float, base: int, unit: str) -> str:
    """A count with a prefix: powers of 1000 (k, M, G), or of 1024 (Ki, Mi, Gi)."""
    prefixes = _PREFIXES[base]
    for prefix in prefixes:
        if count < base or prefix == prefixes[-1]:
            break
        count /= base
    digits = f"{count:.0f}" if not prefix else f"{count:.3g}"
    return f"{digits} {prefix}{unit}"
