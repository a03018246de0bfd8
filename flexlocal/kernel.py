"""What FlexAttention is told of a call beside its tensors: the mask, the bias, the options."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks

from .masks import (
    Rule,
    Window,
    but_itself_mod,
    in_turn,
    itself_last,
    mask_mod,
    padding_mod,
)
from .masks.blocks import block_lists, from_lists, lists_have_gaps
from .masks.rule import MaskMod
from .masks.scores import Place, ScoreMod, added, bias_place
from .tuning import STOCK_BLOCK, Tuning

LEAST_HEAD = 16
"""Channels of the narrowest heads that kernels take on the GPU."""

_MANY_BLOCKS = 4
"""So many that to leave their keys unmasked is worth lists with the gaps that a key mask leaves."""


@dataclass(frozen=True)
class Blocks:
    """The sparse blocks of a kernel's mask, and how they are listed.

    Attributes:
        window: the window.
        rule: the window, or the layout of its keys.
        n: tokens.
        masked: a key mask hides keys.
        shared_qk: a token attends to itself only when it sees nothing else.
        tuning: blocks and options.
    """

    window: Window
    rule: Rule
    n: int
    masked: bool
    shared_qk: bool
    tuning: Tuning

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and key slots."""
        return self.n, self.rule.key_slots(self.n)

    @property
    def one_list(self) -> bool:
        """Whether full blocks are listed as partial ones."""
        if self.shared_qk and not self.window.causal:
            return True  # full ones would not be asked for the query's own key
        few = self.masked and self.window.most_seen < _MANY_BLOCKS * self.tuning.block
        return self.tuning.one_list and (few or self._windows_leave_gaps)

    @property
    def have_gaps(self) -> bool:
        """Whether a list may name blocks that are no neighbours."""
        # A mask leaves some wherever it hides keys.
        return not self.one_list and (self.masked or self._windows_leave_gaps)

    @property
    def _windows_leave_gaps(self) -> bool:
        return lists_have_gaps(self.rule, self.lengths, self.tuning.block)

    def lists(self, device: torch.device, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        """The index tensors of the block mask.

        Args:
            kept: boolean ``(batch, heads or 1, slots)``, the key slots that a mask keeps.
        """
        return block_lists(
            self.rule,
            self.lengths,
            (self.tuning.block, self.tuning.block),
            device,
            kept,
            full_width=device.type == "cpu",
            one_list=self.one_list,
        )

    def mask(self, lists: tuple[Tensor, ...], mod: MaskMod) -> BlockMask:
        """The block mask of ``lists``, labelled with FlexAttention's own block size.

        The lowering drops every candidate of the backward pass whose tiles do not divide the
        blocks of the mask, before it heeds the options: smaller blocks would leave it none. So
        the options say the true size.
        """
        return from_lists(self.lengths, lists, (STOCK_BLOCK, STOCK_BLOCK), mod)


class MaskReads(NamedTuple):
    """What a mask_mod looks up; in the order in which operators without closures are given it."""

    kept: Tensor | None
    """Boolean ``(batch, heads or 1, slots)``, the key slots that a mask keeps."""
    length: Tensor | None
    """Tokens, 0-d int32, where the mask asks for them.

    No int: a dynamic one, kernels take alone and no sum of it, and dropout's gradient not at all.
    """


@dataclass(frozen=True)
class Kernel:
    """A kernel's mask, bias and options; without tensors, which the methods are given.

    Attributes:
        blocks: the sparse blocks.
        heads: query heads.
        grouped: there are fewer key heads.
        scale: factor on the query-key products.
        bias_heads: those of the bias, which rows take in turn; None without one.
        margin: columns that it has beyond the window's; None where places are clipped.
        on_gpu: Triton makes it.
        ends_alone: whether the first and the last token see only themselves, where a mask hides a
            token's own key from it; None where it hides none, or the score says it.
    """

    blocks: Blocks
    heads: int
    grouped: bool
    scale: float
    bias_heads: int | None
    margin: int | None
    on_gpu: bool
    ends_alone: tuple[bool, bool] | None

    @property
    def itself_by_score(self) -> bool:
        """Whether a token's score with itself is set, and not its key hidden; see ``itself``."""
        return self.blocks.shared_qk and self.ends_alone is None

    @property
    def asks_length(self) -> bool:
        """Whether the mask depends on how long the sequence is."""
        last_alone = self.ends_alone is not None and self.ends_alone[1]
        return last_alone or self.blocks.rule.asks_length

    def mask_mod(self, reads: MaskReads) -> MaskMod:
        """Which key slots a query sees."""
        rule: Rule = self.blocks.rule
        n: int | Tensor = self.blocks.n
        kept, length = reads
        if length is not None:
            rule, n = rule.of_length(length), length
        if self.ends_alone is not None:  # nor is there a key mask
            return but_itself_mod(rule, self.blocks.window, n, self.ends_alone)
        visible = mask_mod(rule)
        return visible if kept is None else and_masks(visible, padding_mod(kept))

    def score_mod(self, bias: Tensor | None) -> ScoreMod | None:
        """What is done to a score."""
        blocks, mods = self.blocks, []
        if bias is not None:
            mods.append(added(bias, self.bias_place))
        if self.itself_by_score:
            mods.append(itself_last(blocks.rule))
        return in_turn(*mods)

    @property
    def bias_place(self) -> Place:
        """Where in the bias a score finds its number."""
        blocks = self.blocks
        assert self.bias_heads is not None
        return bias_place(blocks.window, blocks.rule, self.heads, self.bias_heads, self.margin)

    def arguments(self, lists: tuple[Tensor, ...], reads: MaskReads) -> dict[str, Any]:
        """Arguments of ``flex_attention``: all but the tensors and the score_mod."""
        return {
            "block_mask": self.blocks.mask(lists, self.mask_mod(reads)),
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
        if "FORCE_USE_FLEX_ATTENTION" not in options:  # an older word for the same
            options.setdefault("BACKEND", "TRITON")
        if not tuning.decodes(self.blocks.n) and not self.blocks.have_gaps:
            options.setdefault("BLOCKS_ARE_CONTIGUOUS", True)
        return options
