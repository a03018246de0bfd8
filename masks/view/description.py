"""A mask in numbers, and what its choices waste.

Keys per query take time linear in the sequence; everything about blocks takes time linear in the
blocks of queries.
"""

import math
from dataclasses import dataclass

from .block_map import BlockMap
from .counting import Intervals
from .html import table

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

    def _repr_html_(self) -> str:
        return table(self.words, self.title, self.rows_and_advice())

    def rows_and_advice(self) -> list[tuple[str, str]]:
        """``rows``, and one row for each sentence of advice."""
        return [*self.rows(), *(("advice", line) for line in self.advice)]


def described(
    title: str, words: str, seen: Intervals, blocks: BlockMap, head_size: int
) -> Description:
    """The numbers of a mask.

    Args:
        title: the rule's parameters and the numbers of queries and keys.
        words: what the rule says.
        seen: the keys that each query sees.
        blocks: the same mask's block map.
        head_size: channels of a head.
    """
    queries, keys = seen.rows, seen.columns
    least, most, scores, blind = keys, 0, 0, 0
    for count in seen.counts():
        least, most = min(least, int(count.min())), max(most, int(count.max()))
        scores += int(count.sum())
        blind += int((count == 0).sum())
    empty, partial, full = blocks.count()
    computed = (partial + full) * blocks.block_size[0] * blocks.block_size[1]
    waste = computed / scores if scores else float("inf") if computed else 1.0
    return Description(
        title=title,
        words=words,
        queries=queries,
        keys=keys,
        least_keys=least,
        most_keys=most,
        mean_keys=scores / queries,
        blind_queries=blind,
        scores=scores,
        share=scores / (queries * keys),
        block_size=blocks.block_size,
        empty_blocks=empty,
        partial_blocks=partial,
        full_blocks=full,
        computed=computed,
        waste=waste,
        head_size=head_size,
        flops=4 * head_size * scores,
        computed_flops=4 * head_size * computed,
        block_mask_bytes=blocks.index_bytes,
        dense_mask_bytes=queries * keys,
        advice=tuple(_advice(blocks, least, most, blind, waste)),
    )


def _advice(blocks: BlockMap, least: int, most: int, blind: int, waste: float) -> list[str]:
    advice = []
    if blind:
        what = "query sees" if blind == 1 else "queries see"
        advice.append(f"{blind:,} {what} no key, and attention gives zeros there")
    if least == blocks.n_keys > 1:
        advice.append("every query sees every key: full attention does the same")
    elif most == 1 and blocks.n > 1 and blocks.key_mask is None:
        advice.append("a query sees one key only: attention copies its value")
    if blocks.shape == (1, 1) and waste > 1:
        advice.append("the sequence fits into one block, which a kernel computes whole")
    elif waste > _WASTEFUL:
        advice.append(_of_blocks(blocks, waste))
    return advice


def _of_blocks(blocks: BlockMap, waste: float) -> str:
    """What would waste less on partial blocks."""
    reach, window, sizes = blocks.rule.reach, blocks.rule.window, blocks.block_size
    # Where both sides' blocks begin, and the least step from one block's edge to any other's.
    block, grain = math.lcm(*sizes), math.gcd(*sizes)
    cost = f"{waste:.2f} scores are computed per score needed"
    if reach.step > 1 and reach.align % block and block % reach.align:
        near = max(block, round(reach.align / block) * block)
        return (
            f"window_size {reach.align} is no multiple of the block {block}, so that windows end "
            f"inside blocks: {cost}; window_size {near} would end where blocks do"
        )
    # With more keys than queries, the last block of queries may be cut off by the sequence's end
    # and see more blocks with a longer reach.
    if blocks.rule.is_window and blocks.n == blocks.n_keys:
        now = window.before, window.after
        free = tuple(-(-keys // grain) * grain for keys in now)
        if free != now:
            return (
                f"a reach of {_reach(*now)} is no multiple of the block {grain}: {cost}; "
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
