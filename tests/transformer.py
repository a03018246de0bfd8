"""A small language model whose layers take windows in turn, for tests that train one."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from flexlocal import LocalAttention

# No two sizes are the same, so that no two axes can be swapped unseen.
VOCABULARY, EMBEDDING, HEADS = 50, 64, 4
HEAD_SIZE, VALUE_SIZE = EMBEDDING // HEADS, 24
LAYERS = 12
WINDOWS = (
    {"window_size": 20},
    {"window_size": 28, "exact_windowsize": True},
    {"window_size": 40, "look_backward": 0},
)
TWELVE_WINDOWS = tuple({"window_size": size} for size in range(26, 26 + LAYERS))
TOKENS = 130  # in a sequence: over a block of the kernel, and a multiple of no window


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.before, self.between = nn.LayerNorm(EMBEDDING), nn.LayerNorm(EMBEDDING)
        self.inputs = nn.Linear(EMBEDDING, HEADS * (2 * HEAD_SIZE + VALUE_SIZE))
        self.output = nn.Linear(HEADS * VALUE_SIZE, EMBEDDING)
        self.mlp = nn.Sequential(
            nn.Linear(EMBEDDING, 2 * EMBEDDING), nn.GELU(), nn.Linear(2 * EMBEDDING, EMBEDDING)
        )

    def forward(self, x):
        heads = self.inputs(self.before(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        mixed = self.attention(*heads.split((HEAD_SIZE, HEAD_SIZE, VALUE_SIZE), dim=-1))
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Transformer(nn.Module):
    """A causal language model; its layers take the windows in turn."""

    def __init__(self, layers=LAYERS, windows=WINDOWS, dropout=0.0, backend="auto"):
        super().__init__()
        self.checkpointed = False
        self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
        self.norm = nn.LayerNorm(EMBEDDING)
        self.logits = nn.Linear(EMBEDDING, VOCABULARY)
        self.blocks = nn.ModuleList(
            Block(
                LocalAttention(
                    **window,
                    causal=True,
                    autopad=True,
                    dim=HEAD_SIZE,
                    dropout=dropout,
                    backend=backend,
                )
            )
            for window in itertools.islice(itertools.cycle(windows), layers)
        )

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.logits(self.norm(x))


def seeded(device="cpu", dtype=torch.float32, **options):
    """A model whose weights do not depend on where and in what dtype it is."""
    torch.manual_seed(0)
    return Transformer(**options).to(device, dtype)


def batch(device="cpu", seed=1, n=TOKENS, sequences=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (sequences, n), generator=generator).to(device)


def loss_of(model, tokens):
    logits = model(tokens)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, tokens[:, 1:].flatten())


def trained(model, loss):
    """Gradients of ``loss()`` and, a step of the optimizer later, the parameters, whole, by name.

    The optimizer is made first: FSDP2 leaves other parameters in the model after a forward pass.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss().backward()
    named = list(model.named_parameters())
    found = {f"gradient of {name}": whole(parameter.grad) for name, parameter in named}
    optimizer.step()
    return found | {name: whole(parameter) for name, parameter in named}


def whole(x):
    """A parameter on the CPU, also one that FSDP2 has spread over processes."""
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).cpu()
