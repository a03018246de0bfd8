"""Which options of FlexAttention's Triton kernels are tried, what came of it, and which win.

The two passes are swept apart, since an option of one says nothing to the other; only the sparse
block they share. Options carry their pass as a prefix, as ``flexlocal/tuned.json`` has them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from flexlocal.tuning import FLASH, STOCK_BLOCK, Tuning

from .measure import Status

Pass = Literal["forward", "training"]
"""What is timed: the forward pass, or it and the backward pass whose options are swept."""

Options = tuple[tuple[str, Any], ...]

PASSES: tuple[Pass, ...] = ("forward", "training")
PREFIX = {"forward": "fwd_", "training": "bwd_"}
BLOCKS = (64, STOCK_BLOCK)
TILES = (32, 64, 128)
WARPS = (4, 8)
STAGES = (2, 3)
LEAST_TMA_HEAD = 128
"""Narrower heads are loaded without the tensor memory accelerator."""


@dataclass(frozen=True)
class Candidate:
    """Options for one pass.

    Attributes:
        block: queries, and keys, in a sparse block.
        options: ``kernel_options``; empty for FlexAttention's own.
    """

    kind: Pass
    block: int
    options: Options

    @property
    def swept(self) -> bool:
        """Whether it may win the table; FlexAttention's own options and FLASH are beside it."""
        return any(name.startswith(PREFIX[self.kind]) for name, _ in self.options)

    @property
    def words(self) -> str:
        """For a table."""
        named = (f"{name.removeprefix(PREFIX[self.kind])}={value}" for name, value in self.options)
        return " ".join(named) or "FlexAttention's own options"

    def tuning(self, forward: Options = ()) -> Tuning:
        """For a call; a candidate for training needs ``forward`` for the pass before it."""
        return Tuning(self.block, tuple(sorted(self.options + forward)))


def stock(kind: Pass) -> Candidate:
    """FlexAttention's own options, to compare with."""
    return Candidate(kind, STOCK_BLOCK, ())


def flash(kind: Pass) -> Candidate:
    """FlashAttention 4's kernel."""
    return Candidate(kind, FLASH.block, FLASH.options)


def candidates(kind: Pass, head_size: int, limit: int | None = None) -> list[Candidate]:
    """All that the kernels of a pass can run, or ``limit`` of them evenly spread."""
    tiles = _forward_tiles if kind == "forward" else _backward_tiles
    tma: tuple[Options, ...] = ((),)
    if head_size >= LEAST_TMA_HEAD:
        tma = ((), (("USE_TMA", True),))
    found = []
    for block in BLOCKS:
        for one, warps, stages, more in product(tiles(block), WARPS, STAGES, tma):
            options = (*one, ("num_warps", warps), ("num_stages", stages), *more)
            prefixed = tuple((PREFIX[kind] + name, value) for name, value in options)
            found.append(Candidate(kind, block, prefixed))
    return spread(found, limit)


def _forward_tiles(block: int) -> Iterator[Options]:
    sizes = [size for size in TILES if block % size == 0]
    for m, n in product(sizes, repeat=2):
        yield ("BLOCK_M", m), ("BLOCK_N", n)


def _backward_tiles(block: int) -> Iterator[Options]:
    """M1 and N1 make the gradients of key and value, M2 and N2 that of the query."""
    sizes = [size for size in TILES if block % size == 0]
    for m1, n1, m2, n2 in product(sizes, repeat=4):
        if n1 % m1 == 0 and m2 % n2 == 0:
            yield ("BLOCK_M1", m1), ("BLOCK_N1", n1), ("BLOCK_M2", m2), ("BLOCK_N2", n2)


def spread(every: list[Candidate], limit: int | None) -> list[Candidate]:
    """``limit`` of them from the first to the last, in even steps."""
    if limit is None or limit >= len(every):
        return every
    if limit == 1:
        return every[:1]
    return [every[step * (len(every) - 1) // (limit - 1)] for step in range(limit)]


@dataclass(frozen=True)
class Outcome:
    """What came of a candidate; ``reason`` says why it was not timed.

    Attributes:
        error: the largest of the output and the gradients.
        ms: of a call; training with the fastest forward options of the candidate's block.
        first_s: of the first call, which compiles.
    """

    candidate: Candidate
    status: Status
    reason: str = ""
    error: float | None = None
    ms: float | None = None
    first_s: float | None = None


def ranked(outcomes: Sequence[Outcome], kind: Pass, block: int | None = None) -> list[Outcome]:
    """The swept candidates of a pass that were right, fastest first; of one block if given."""
    timed = [
        o
        for o in outcomes
        if o.status == "measured"
        and o.candidate.swept
        and o.candidate.kind == kind
        and block in (None, o.candidate.block)
    ]
    return sorted(timed, key=_ms)


def milliseconds(outcomes: Sequence[Outcome], candidate: Candidate) -> float | None:
    """The candidate's time; None where it has none."""
    return next((o.ms for o in outcomes if o.candidate == candidate), None)


@dataclass(frozen=True)
class Winner:
    """The fastest options of both passes, in milliseconds of each as ``Outcome`` has them."""

    block: int
    options: Options
    forward_ms: float
    training_ms: float


def winner_of(outcomes: Sequence[Outcome], blocks: Sequence[int] = BLOCKS) -> Winner | None:
    """The pair with the least sum of both passes, which is the time of training.

    None where no block has a right candidate for each.
    """
    pairs = []
    for block in blocks:
        forward, training = (ranked(outcomes, kind, block)[:1] for kind in PASSES)
        if forward and training:
            options = forward[0].candidate.options + training[0].candidate.options
            pairs.append(Winner(block, options, _ms(forward[0]), _ms(training[0])))
    return min(pairs, key=lambda pair: pair.training_ms, default=None)


def flash_is_faster(outcomes: Sequence[Outcome], winner: Winner) -> bool:
    """Whether FlashAttention 4's kernel beats the winner, forward and in training."""
    forward, training = (milliseconds(outcomes, flash(kind)) for kind in PASSES)
    if forward is None or training is None:
        return False
    return forward < winner.forward_ms and training < winner.training_ms


def counted(outcomes: Sequence[Outcome]) -> str:
    """How many ended how, with the commonest reason of those that were not measured."""
    parts = []
    for status, count in Counter(o.status for o in outcomes).most_common():
        reasons = Counter(o.reason for o in outcomes if o.status == status and o.reason)
        words = f" ({reasons.most_common(1)[0][0][:80]})" if reasons else ""
        parts.append(f"{count} {status}{words}")
    return ", ".join(parts)


def _ms(outcome: Outcome) -> float:
    assert outcome.ms is not None  # it was measured
    return outcome.ms
