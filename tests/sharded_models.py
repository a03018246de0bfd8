"""A model of local and full layers, trained by ranks that hold runs of its sequences.

The full layers, and how parameters are spread, are the blocks of docs/several_devices.md that need
several ranks (there called py, as tests/package/test_docs.py runs those called python).
"""

import re
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformer import batch, seeded, trained

from flexlocal.distributed import shard_sequence

PAGE = Path(__file__).parents[1] / "docs" / "several_devices.md"
SEQUENCES, TOKENS, LAYERS = 4, 121, 3  # 120 targets, which two and four ranks share alike


def recipe(name):
    """The function of that name in the page."""
    for block in re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        if f"def {name}(" in block:
            found = {}
            exec(block, found)
            return found[name]
    raise KeyError(name)


class Full(torch.nn.Module):
    """Causal attention to everything, over runs of a sequence if there is a group."""

    def __init__(self, group=None):
        super().__init__()
        self.group = group

    def forward(self, q, k, v):
        if self.group is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return recipe("full_attention")(q, k, v, self.group)


def replicated(model, device, sequence):
    return DistributedDataParallel(model)


def spread(model, device, sequence):
    return recipe("prepared")(model, device, sequence, dist.get_world_size() // sequence)


WAYS = {"DDP": replicated, "FSDP2": spread}


def made(device, full):
    model = seeded(device, layers=LAYERS)
    if full:
        model.blocks[1].attention = Full()
    return model


def loss_of_run(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def check_training(rank, way, sequence, full, device="cpu"):
    """A step of ranks, ``sequence`` of which share each sequence, is that of one process."""
    tokens = batch(device, n=TOKENS, sequences=SEQUENCES)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    one = made(device, full)
    expected = trained(one, partial(loss_of_run, one, inputs, targets))

    ranks = dist.get_world_size()
    mesh = init_device_mesh(device, (sequence, ranks // sequence), mesh_dim_names=("s", "data"))
    model = made(device, full)
    for block in model.blocks:
        block.attention.group = mesh["s"]
    run = WAYS[way](model, device, sequence)
    for block in model.blocks:
        if isinstance(block.attention, Full):  # whose collectives want a process group
            block.attention.group = mesh["s"].get_group()
    rows = mesh["data"].get_local_rank()
    inputs, targets = (
        shard_sequence(x.chunk(ranks // sequence)[rows], mesh["s"]) for x in (inputs, targets)
    )
    found = trained(model, partial(loss_of_run, run, inputs, targets))
    names = {name: name.removeprefix("module.") for name in found}
    assert set(names.values()) == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(
            x,
            expected[names[name]],
            rtol=1e-4,
            atol=1e-6,
            msg=lambda words, name=name: f"{name}: {words}",
        )
