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
from ..mods.score import ScoreMod, in_turn
from ..mods.shared_qk import but_itself_mod, itself_last
from ..mods.softcap import capped
from .tuning import STOCK_BLOCK, Tuning

_MANY_BLOCKS = 4
"""From this many blocks on, separate lists of full blocks pay off, even with gaps."""


@dataclass(frozen=True)
class Blocks:
    """The sparse blocks of a kernel's mask, and how they are listed.

    Attributes:
        rule: the rule, over key slots where xpos lays keys out. Its tensors are meta tensors where
            the blocks are kept.
        n: queries.
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
        if self.rule.has_holes:
            return True
        window = self.rule.window
        if self.shared_qk and (window is None or not window.causal):
            return True  # kernels apply no mask to full blocks, which may hold the query's own key
        few_blocks = self.rule.reach.keys < _MANY_BLOCKS * self.tuning.block
        # Documents are listed as their windows are: a packed row has the bits of calls of its own.
        gaps = self._leave_gaps(self.rule if window is None else window)
        return self.tuning.one_list and (self.masked and few_blocks or gaps)

    @property
    def have_gaps(self) -> bool:
        """Whether a list may leave blocks out between others."""
        # A key mask leaves gaps wherever it hides all keys of a block.
        return not self.one_list and (self.masked or self._leave_gaps(self.rule))

    def _leave_gaps(self, rule: Rule) -> bool:
        return lists_have_gaps(rule, self.lengths, self.tuning.block)

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
        pass whose tiles do not divide the mask's blocks, before it reads the options (torch 2.11 to
        2.13): had the mask the true size, smaller blocks would leave no candidate.
        """
        return from_lists(self.lengths, lists, (STOCK_BLOCK, STOCK_BLOCK), mod)


@dataclass(frozen=True)
class Kernel:
    """A kernel's mask, score function and options. It holds no tensors: its methods are given them.

    Attributes:
        blocks: the sparse blocks, with ``Rule.for_scores``.
        rule_tensors: how many tensors the rule looks up.
        heads: query heads.
        grouped: there are fewer key heads than query heads.
        scale: factor on the query-key products, divided by ``softcap`` where there is one.
        softcap: bound of scores, None without one.
        fast_tanh: how they are capped, see ``mods.softcap``.
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
    softcap: float | None
    fast_tanh: bool
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

    def rule_over(self, looked_up: Sequence[Tensor]) -> Rule:
        """The rule over tensors of its own; ``looked_up`` as for ``mask_mod``."""
        if not self.rule_tensors:
            return self.rule
        return self.rule.with_tensors(tuple(looked_up[: self.rule_tensors]))

    def mask_mod(self, looked_up: Sequence[Tensor]) -> MaskMod:
        """Which key slots a query sees.

        Args:
            looked_up: what kernels look up beside a bias: the rule's tensors, then the key mask
                ``(batch, heads or 1, slots)`` where there is one, then the length, 0-d, where
                ``last_alone``.
        """
        rule, rest = self.rule_over(looked_up), looked_up[self.rule_tensors :]
        if self.ends_alone is not None:  # there is no key mask then
            return but_itself_mod(rule, rest[0] if rest else self.blocks.n, self.ends_alone)
        visible = mask_mod(rule)
        return and_masks(visible, padding_mod(rest[0])) if rest else visible

    def score_mod(self, bias: Tensor | None, looked_up: Sequence[Tensor]) -> ScoreMod | None:
        """What is done to a score: it is capped, the bias added, a token's own score set."""
        mods = [] if self.softcap is None else [capped(self.softcap, self.fast_tanh)]
        if bias is not None:
            mods.append(added(bias, self.bias_place(looked_up)))
        if self.sets_own_score:
            mods.append(itself_last(self.rule_over(looked_up)))
        return in_turn(*[mod.value for mod in mods])

    def pulled_back(
        self, grad: Tensor, score: Tensor, place: Sequence[Tensor], looked_up: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The gradients of a score with its bias, and without, from that of ``score_mod``."""
        if self.sets_own_score:
            own = itself_last(self.rule_over(looked_up)).gradient
            assert own is not None
            grad = own(grad, score, *place)
        if self.softcap is None:
            return grad, grad
        slope = capped(self.softcap, self.fast_tanh).gradient
        assert slope is not None
        return grad, slope(grad, score, *place)

    def bias_place(self, looked_up: Sequence[Tensor]) -> Place:
        """The indices into the bias for a score."""
        assert self.bias_heads is not None
        return bias_place(self.rule_over(looked_up), self.heads, self.bias_heads, self.margin)

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
