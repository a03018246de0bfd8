"""What FlexAttention is told of a call beside its tensors: the mask, the scores, the options."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .masks import Rule, Segments, Window, self_token, window_bias
from .masks.blocks import block_lists, from_lists, lists_have_gaps
from .masks.rule import MaskMod
from .masks.scores import ScoreMod
from .tuning import STOCK_BLOCK, Tuning


@dataclass(frozen=True)
class Kernel:
    """A kernel's mask, scores and options; all hashable and without tensors.

    Attributes:
        window: what a bias is relative to.
        rule: ``window``, or the layout of its keys.
        length: tokens.
        heads: query heads.
        grouped: there are fewer key heads.
        scale: of the products of queries and keys.
        shared_qk: a token attends to itself only when it sees nothing else.
        margin: columns that a bias has beyond the window's; None where places are clipped.
        masked: a key mask hides keys.
        on_gpu: Triton makes it.
        tuning: blocks and options.
    """

    window: Window
    rule: Rule
    length: int
    heads: int
    grouped: bool
    scale: float
    shared_qk: bool
    margin: int | None
    masked: bool
    on_gpu: bool
    tuning: Tuning

    def score_mods(self, bias: Tensor | None) -> list[ScoreMod]:
        """What is done to a score, in turn."""
        found = []
        if bias is not None:
            found.append(window_bias(bias, self.window, self.rule, self.heads, self.margin))
        if self.shared_qk:
            found.append(self_token(self.rule))
        return found

    def block_mask(self, lists: tuple[Tensor, ...], mod: MaskMod) -> BlockMask:
        """The block mask of ``lists_of``, labelled with FlexAttention's own block size.

        The lowering drops every candidate of the backward pass whose tiles do not divide the
        blocks of the mask, before it heeds the options: smaller blocks would leave it none. So
        the options say the true size.
        """
        lengths = lengths_of(self.rule, self.length)
        return from_lists(lengths, lists, (STOCK_BLOCK, STOCK_BLOCK), mod)

    @property
    def options(self) -> dict[str, Any]:
        """``kernel_options`` of ``flex_attention``."""
        block, options = self.tuning.block, dict(self.tuning.options)
        if block != STOCK_BLOCK:
            options |= {"SPARSE_Q_BLOCK_SIZE": block, "SPARSE_KV_BLOCK_SIZE": block}
        # Few queries go to a decoding kernel, which walks through the lists in another way.
        if self.on_gpu and not self.masked and self.length >= STOCK_BLOCK:
            one_list = _one_list(self.tuning, self.rule, self.length)
            if not _have_gaps(self.tuning, self.rule, self.length, one_list):
                options.setdefault("BLOCKS_ARE_CONTIGUOUS", True)
        return options


def lists_of(
    tuning: Tuning, rule: Rule, n: int, device: torch.device, kept: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The index tensors of a kernel's block mask for ``n`` queries.

    Args:
        kept: boolean ``(batch, heads or 1, slots)``, the key slots that a mask keeps.
    """
    one_list = kept is None and _one_list(tuning, rule, n)
    blocks, on_cpu = (tuning.block, tuning.block), device.type == "cpu"
    return block_lists(
        rule, lengths_of(rule, n), blocks, device, kept, full_width=on_cpu, one_list=one_list
    )


def lengths_of(rule: Rule, n: int) -> tuple[int, int]:
    """Queries and key slots of ``n`` tokens."""
    return n, rule.count * rule.slots if isinstance(rule, Segments) else n


def _one_list(tuning: Tuning, rule: Rule, n: int) -> bool:
    return tuning.one_list and _have_gaps(tuning, rule, n, one_list=False)


def _have_gaps(tuning: Tuning, rule: Rule, n: int, one_list: bool) -> bool:
    return lists_have_gaps(rule, lengths_of(rule, n), tuning.block, one_list)
