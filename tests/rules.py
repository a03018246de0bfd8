"""Rules that a user might write, which the package knows nothing of."""

from dataclasses import dataclass

import torch

from flexlocal.masks import Reach, Rule


@dataclass(frozen=True, eq=False)
class WindowOfEachEntry(Rule):
    """A causal sliding window whose length differs by batch entry, held in a tensor.

    Args:
        back: int64 ``(batch,)``, how many keys before its own a query sees.
        most: at least the largest of ``back``.
    """

    back: torch.Tensor
    most: int

    def keys(self, batch, head, query):
        return query - self.back[batch], query

    def queries(self, batch, head, key):
        return key, key + self.back[batch]

    @property
    def reach(self):
        return Reach(self.most + 1, self.most, 0, f"window_of_each_entry_{self.most}")

    @property
    def tensors(self):
        return (self.back,)

    def with_tensors(self, tensors):
        return WindowOfEachEntry(tensors[0], self.most)

    @property
    def words(self):
        return "a query sees its own key and as many before it as its batch entry says"


@dataclass(frozen=True)
class WiderByHead(Rule):
    """A window on both sides that is `step` keys wider for each head; no tensors."""

    step: int
    heads: int

    def keys(self, batch, head, query):
        return query - self.step * (head + 1), query + head

    def queries(self, batch, head, key):
        return key - head, key + self.step * (head + 1)

    @property
    def reach(self):
        back, ahead = self.step * self.heads, self.heads - 1
        return Reach(back + 1 + ahead, back, ahead, f"wider_by_head_{self.step}_{self.heads}")


def visible_of_entries(back, n):
    """(batch, 1, n, n): what WindowOfEachEntry lets a query see, one pair at a time."""
    pairs = [[[i - b <= j <= i for j in range(n)] for i in range(n)] for b in back.tolist()]
    return torch.tensor(pairs)[:, None]


def visible_by_head(step, heads, n):
    """(1, heads, n, n), likewise for WiderByHead."""
    pairs = [
        [[i - step * (h + 1) <= j <= i + h for j in range(n)] for i in range(n)]
        for h in range(heads)
    ]
    return torch.tensor(pairs)[None]


def attend(q, k, v, visible, keep=None, scale=None):
    """Dense attention in float64 over what is visible, by definition; zeros where nothing is."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if keep is not None:
        visible = visible & keep[:, None, None, :]
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.where(visible, scores, -torch.inf).softmax(-1)
    return torch.where(visible, weights, 0.0).nan_to_num(0.0) @ v
