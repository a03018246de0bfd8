"""Which options of FlexAttention's Triton kernels are tried, what came of it, and which win.

The two passes are swept apart, since an option of one says nothing to the other; only the sparse
blocks and their lists they share. Options carry their pass as a prefix, as
``flexlocal/flex/tuned.json`` has them.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from flexlocal.flex.tuning import FLASH, STOCK_BLOCK, Tuning
from flexlocal.masks.block_lists import lists_have_gaps

from .bench import Status
from .problems import Problem

Pass = Literal["forward", "training"]
"""What is timed: the forward pass, or it and the backward pass whose options are swept."""

Options = tuple[tuple[str, Any], ...]

PASSES: tuple[Pass, ...] = ("forward", "training")
PREFIX = {"forward": "fwd_", "training": "bwd_"}
LEAST_TMA_HEAD = 128
"""Narrower heads are loaded without the tensor memory accelerator."""

Layout = tuple[int, bool]
"""Tokens in a sparse block, and whether there is one list of blocks for two; see ``Tuning``."""


@dataclass(frozen=True)
class Space:
    """What is combined: sparse blocks, tiles that divide them, warps and pipeline stages."""

    blocks: tuple[int, ...] = (64, STOCK_BLOCK)
    tiles: tuple[int, ...] = (32, 64, 128)
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (2, 3)

    def layouts(self, problem: Problem) -> list[Layout]:
        """The blocks, with one list of them as well where two would have gaps."""
        lengths = problem.n, problem.n
        return [
            (block, one_list)
            for block in self.blocks
            for one_list in (False, True)
            if not one_list or lists_have_gaps(problem.window, lengths, block)
        ]


@dataclass(frozen=True)
class Candidate:
    """Options for one pass, in sparse blocks of a ``layout``; FlexAttention's own where empty."""

    kind: Pass
    layout: Layout
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
        block, one_list = self.layout
        return Tuning(block, tuple(sorted(self.options + forward)), one_list)


def layout_words(layout: Layout) -> str:
    """For a message."""
    block, one_list = layout
    return f"blocks of {block}" + (" in one list" if one_list else "")


def stock(kind: Pass) -> Candidate:
    """FlexAttention's own options, to compare with."""
    return Candidate(kind, (STOCK_BLOCK, False), ())


def flash(kind: Pass) -> Candidate:
    """FlashAttention 4's kernel."""
    return Candidate(kind, (FLASH.block, False), FLASH.options)


def candidates(
    kind: Pass, problem: Problem, space: Space, limit: int | None = None
) -> list[Candidate]:
    """All of the space that the kernels of a pass can run, or ``limit`` of them evenly spread."""
    tma: tuple[Options, ...] = ((),)
    if problem.d >= LEAST_TMA_HEAD:
        tma = ((), (("USE_TMA", True),))
    found = []
    for layout in space.layouts(problem):
        sizes = [size for size in space.tiles if layout[0] % size == 0]
        for tiles, warps, stages, more in product(
            _tiles(kind, sizes), space.warps, space.stages, tma
        ):
            options = (*tiles, ("num_warps", warps), ("num_stages", stages), *more)
            prefixed = tuple((PREFIX[kind] + name, value) for name, value in options)
            found.append(Candidate(kind, layout, prefixed))
    return spread(found, limit)


def _tiles(kind: Pass, sizes: Sequence[int]) -> list[Options]:
    """M1 and N1 make the gradients of key and value, M2 and N2 that of the query."""
    if kind == "forward":
        return [(("BLOCK_M", m), ("BLOCK_N", n)) for m, n in product(sizes, repeat=2)]
    return [
        (("BLOCK_M1", m1), ("BLOCK_N1", n1), ("BLOCK_M2", m2), ("BLOCK_N2", n2))
        for m1, n1, m2, n2 in product(sizes, repeat=4)
        if n1 % m1 == 0 and m2 % n2 == 0
    ]


def spread(every: list[Candidate], limit: int | None) -> list[Candidate]:
    """``limit`` of them from the first to the last, in even steps."""
    if limit is None or limit >= len(every):
        return every
    return [every[step * (len(every) - 1) // max(1, limit - 1)] for step in range(limit)]


@dataclass(frozen=True)
class Outcome:
    """What came of a candidate; ``reason`` says why it was not timed.

    ``error`` is the largest of the output and the gradients; ``ms`` is of a call, in training with
    the fastest forward options of the candidate's layout; ``first_s`` is of the call that compiles.
    """

    candidate: Candidate
    status: Status
    reason: str = ""
    error: float | None = None
    ms: float | None = None
    first_s: float | None = None


def ranked(outcomes: Sequence[Outcome], kind: Pass, layout: Layout | None = None) -> list[Outcome]:
    """The swept candidates of a pass that were right, fastest first; of one layout if given."""
    right = [o for o in outcomes if o.status == "measured" and o.candidate.swept]
    of_kind = [o for o in right if o.candidate.kind == kind]
    found = [o for o in of_kind if layout in (None, o.candidate.layout)]
    return sorted(found, key=lambda outcome: outcome.ms or math.inf)


@dataclass(frozen=True)
class Winner:
    """The fastest options of both passes, in milliseconds of each as ``Outcome`` has them."""

    layout: Layout
    options: Options
    forward_ms: float
    training_ms: float

    @property
    def tuning(self) -> Tuning:
        """For a call."""
        return Tuning(self.layout[0], tuple(sorted(self.options)), self.layout[1])


def winner_of(
    outcomes: Sequence[Outcome], layouts: Collection[Layout] | None = None
) -> Winner | None:
    """The pair with the least time of training, which holds both passes.

    None where no layout, or none of the given ones, has a right candidate for each.
    """
    pairs = []
    for layout in layouts or dict.fromkeys(o.candidate.layout for o in outcomes):
        both = [o for kind in PASSES for o in ranked(outcomes, kind, layout)[:1]]
        if len(both) == len(PASSES):
            options = both[0].candidate.options + both[1].candidate.options
            pairs.append(Winner(layout, options, *(o.ms or math.inf for o in both)))
    return min(pairs, key=lambda pair: pair.training_ms, default=None)


def counted(outcomes: Sequence[Outcome]) -> str:
    """How many ended how, with the commonest reason of those that were not measured."""
    parts = []
    for status, count in Counter(o.status for o in outcomes).most_common():
        reasons = Counter(o.reason for o in outcomes if o.status == status and o.reason)
        words = f" ({reasons.most_common(1)[0][0][:80]})" if reasons else ""
        parts.append(f"{count} {status}{words}")
    return ", ".join(parts)
