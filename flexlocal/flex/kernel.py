"""What FlexAttention is told of a call beside its tensors: the mask, the bias, the options."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks

from ..masks.block_intervals import Grid, Side
from ..masks.block_lists import block_lists, from_lists, lists_have_gaps
from ..masks.keys import padding_mod
from ..masks.rule import MaskMod, Rule, mask_mod
from ..mods.bias import Place, added, bias_place
from ..mods.score import Mod, ScoreMod, in_turn
from ..mods.shared_qk import but_itself_mod, itself_last
from .tuning import STOCK_BLOCK, Tuning

_MANY_BLOCKS = 4
"""From this many blocks on, separate lists of full blocks pay off, even with gaps."""


@dataclass(frozen=True)
class Blocks:
    """The sparse blocks of a kernel's mask, and how they are listed.

    Attributes:
        rule: the rule, over key slots where xpos lays keys out. Its tensors are meta tensors where
            the blocks are kept.
        n: tokens.
        slots: keys, or slots of their layout.
        entries: batch entries and heads that the rule tells apart; 1 batch entry without tensors.
        masked: a key mask hides keys.
        shared_qk: a token attends to itself only when it sees nothing else.
        tuning: blocks and options.
        laid_out: the rule is a ``KeyLayout``.
    """

    rule: Rule
    n: int
    slots: int
    entries: tuple[int, int]
    masked: bool
    shared_qk: bool
    tuning: Tuning
    laid_out: bool = False

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and key slots."""
        return self.n, self.slots

    @property
    def one_list(self) -> bool:
        """Whether full blocks are listed as partial ones."""
        window = self.rule.window
        if self.shared_qk and (window is None or not window.causal):
            return True  # kernels apply no mask to full blocks, which may hold the query's own key
        few_blocks = self.rule.reach.keys < _MANY_BLOCKS * self.tuning.block
        return self.tuning.one_list and (self.masked and few_blocks or self._windows_leave_gaps)

    @property
    def have_gaps(self) -> bool:
        """Whether a list may leave blocks out between others."""
        # A key mask leaves gaps wherever it hides all keys of a block.
        return not self.one_list and (self.masked or self._windows_leave_gaps)

    @property
    def _windows_leave_gaps(self) -> bool:
        return lists_have_gaps(self.rule, self.lengths, self.tuning.block)

    def lists(self, device: torch.device, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        """The index tensors of the block mask.

        Args:
            kept: boolean ``(batch, heads or 1, slots)``, the key slots that a mask keeps.
        """
        queries, keys = (Side(length, self.tuning.block) for length in self.lengths)
        return block_lists(
            Grid(self.rule, queries, keys, self.entries),
            device,
            kept,
            full_width=device.type == "cpu",
            one_list=self.one_list,
        )

    def mask(self, lists: tuple[Tensor, ...], mod: MaskMod) -> BlockMask:
        """The block mask of ``lists``, which claims FlexAttention's own block size.

        ``Kernel.options`` give the true size. FlexAttention drops each candidate for the backward
        pass whose tiles do not divide the mask's blocks, before it reads the options: had the mask
        the true size, smaller blocks would leave no candidate.
        """
        return from_lists(self.lengths, lists, (STOCK_BLOCK, STOCK_BLOCK), mod)


@dataclass(frozen=True)
class Kernel:
    """A kernel's mask, score function and options. It holds no tensors: its methods are given them.

    Attributes:
        blocks: the sparse blocks.
        rule_tensors: how many tensors the rule looks up.
        heads: query heads.
        grouped: there are fewer key heads than query heads.
        scale: factor on the query-key products.
        bias_heads: heads of the bias, which rows take in turn; None without a bias.
        margin: columns of the bias on either side beyond the window's; None where columns are
            clipped instead.
        on_gpu: the kernel is for a GPU, made by Triton.
        ends_alone: not None where the mask hides each token's own key from it: whether the first
            and the last token see no other key. None without ``shared_qk``, and where ``own_score``
            sees to it.
    """

    blocks: Blocks
    rule_tensors: int
    heads: int
    grouped: bool
    scale: float
    bias_heads: int | None
    margin: int | None
    on_gpu: bool
    ends_alone: tuple[bool, bool] | None

    @property
    def rule(self) -> Rule:
        """The rule, over key slots."""
        return self.blocks.rule

    @property
    def sets_own_score(self) -> bool:
        """Whether a token's score with itself is set, and not its key hidden."""
        return self.blocks.shared_qk and self.ends_alone is None

    @property
    def last_alone(self) -> bool:
        """Whether the mask needs the length, to know the last token."""
        return self.ends_alone is not None and self.ends_alone[1]

    def mask_mod(self, looked_up: Sequence[Tensor]) -> MaskMod:
        """Which key slots a query sees.

        Args:
            looked_up: what the mask looks up: the rule's tensors, then the key mask ``(batch, heads
                or 1, slots)`` where there is one, then the length, 0-d, where ``last_alone``.
        """
        rule, rest = self.rule, looked_up[self.rule_tensors :]
        if self.rule_tensors:
            rule = rule.with_tensors(tuple(looked_up[: self.rule_tensors]))
        if self.ends_alone is not None:  # there is no key mask then
            return but_itself_mod(rule, rest[0] if rest else self.blocks.n, self.ends_alone)
        visible = mask_mod(rule)
        return and_masks(visible, padding_mod(rest[0])) if rest else visible

    @property
    def own_score(self) -> Mod | None:
        """What sets the score of a token with itself, where that is set."""
        return itself_last(self.rule) if self.sets_own_score else None

    def score_mod(self, bias: Tensor | None) -> ScoreMod | None:
        """What is done to a score: the bias is added, then a token's own score is set."""
        mods = [] if bias is None else [added(bias, self.bias_place)]
        if self.own_score is not None:
            mods.append(self.own_score)
        return in_turn(*[mod.value for mod in mods])

    @property
    def bias_place(self) -> Place:
        """The indices into the bias for a score."""
        assert self.bias_heads is not None
        return bias_place(self.rule, self.heads, self.bias_heads, self.margin)

    def arguments(self, lists: tuple[Tensor, ...], looked_up: Sequence[Tensor]) -> dict[str, Any]:
        """Arguments of ``flex_attention``: all but the tensors and the score_mod."""
        return {
            "block_mask": self.blocks.mask(lists, self.mask_mod(looked_up)),
            "scale": self.scale,
            "enable_gqa": self.grouped,
            "kernel_options": self.options or None,
        }

    @property
    def options(self) -> dict[str, Any]:
        """``kernel_options`` of ``flex_attention``."""
        tuning = self.blocks.tuning
        options = dict(tuning.options)
        if tuning.block != STOCK_BLOCK:
            options |= {"SPARSE_Q_BLOCK_SIZE": tuning.block, "SPARSE_KV_BLOCK_SIZE": tuning.block}
        if not self.on_gpu:
            return options
        if "FORCE_USE_FLEX_ATTENTION" not in options:  # an older option for the same choice
            options.setdefault("BACKEND", "TRITON")
        if not tuning.decodes(self.blocks.n) and not self.blocks.have_gaps:
            options.setdefault("BLOCKS_ARE_CONTIGUOUS", True)
        return options
