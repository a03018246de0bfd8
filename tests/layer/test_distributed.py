"""The layer in models trained by two processes: DDP and FSDP2, against one process.

Each process takes half of the batch, so that the averaged gradients are those of the whole one.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from compilers import quick
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformer import batch, loss_of, seeded, trained

PROCESSES = 2
SEQUENCES = 6
LAYERS = 3

PLACES = [
    pytest.param("cpu", id="gloo"),
    pytest.param(
        "cuda",
        id="nccl",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                torch.cuda.device_count() < PROCESSES, reason=f"fewer than {PROCESSES} GPUs here"
            ),
        ],
    ),
]


def replicated(model, device):
    return DistributedDataParallel(model)


def sharded(model, device):
    mesh = init_device_mesh(device, (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {"DDP": replicated, "FSDP2": sharded}


def one_process(rank, way, device, where):
    """What each process runs; the first one leaves its results in a file."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=dist.FileStore(f"{where}/store", PROCESSES),
        rank=rank,
        world_size=PROCESSES,
    )
    try:
        model = seeded(device, layers=LAYERS)
        half = batch(device, sequences=SEQUENCES).chunk(PROCESSES)[rank]
        run = WAYS[way](model, device)
        found = trained(model, lambda: loss_of(run, half))
        if rank == 0:
            torch.save(found, f"{where}/found")
    finally:
        dist.destroy_process_group()
    # The interpreter's own end is not waited for: DTensor's caches keep gloo's threads alive, and
    # one that lets go of a tensor while the interpreter is taken down aborts the process.
    os._exit(0)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("way", quick(WAYS, kept=["DDP"]))
def test_two_processes_train_as_one(way, device, tmp_path):
    processes.spawn(one_process, args=(way, device, str(tmp_path)), nprocs=PROCESSES)
    found = torch.load(tmp_path / "found", weights_only=True)
    model = seeded(device, layers=LAYERS)
    expected = trained(model, lambda: loss_of(model, batch(device, sequences=SEQUENCES)))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6, msg=f"{name} differs")
