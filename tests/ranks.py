"""Processes that stand for the ranks of a group, and take one job after the other.

To start a process costs seconds, most of them for importing torch. So a test module starts its
ranks once. A job is a function of a module that processes can import, called as ``job(rank,
*arguments)`` on every rank.
"""

import os
import tempfile
import traceback
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

SECONDS = {"cpu": 60, "cuda": 300}
"""That a job may take, by device: on a GPU it compiles. Ranks that wait for each other take for
ever."""


class Ranks:
    """So many processes in one group, between ``with`` and its end."""

    def __init__(self, count, device="cpu"):
        self.count, self.device, self.ready = count, device, True

    def __enter__(self):
        context = processes.get_context("spawn")
        self.where = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            arguments = (rank, self.count, self.device, self.where.name, theirs)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        return self

    def __exit__(self, *_):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()
        self.where.cleanup()

    def run(self, job, *arguments):
        """What ``job`` returns on each rank; it is to raise nothing."""
        return [result for result, _ in self._run(job, arguments, fails=False)]

    def errors(self, job, *arguments):
        """What ``job`` raises on each rank."""
        return [error for error, _ in self._run(job, arguments, fails=True)]

    def _run(self, job, arguments, fails):
        assert self.ready, "the ranks wait for each other since an earlier test failed"
        self.ready = False
        for pipe in self.pipes:
            pipe.send((job, arguments))
        found, waiting = {}, {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while waiting:
            ready = wait(waiting, SECONDS[self.device])
            assert ready, f"ranks {list(waiting.values())} hang"
            for pipe in ready:  # a rank that fails may leave the others waiting
                rank = waiting.pop(pipe)
                result, words = found[rank] = pipe.recv()
                assert fails or words is None, f"rank {rank}: {words}"
                assert words or not fails, f"rank {rank} raises nothing"
        self.ready = True
        return [found[rank] for rank in range(self.count)]


def _work(rank, count, device, where, pipe):
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "gloo" if device == "cpu" else "nccl"
    store = dist.FileStore(f"{where}/store", count)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    while True:
        try:
            job, arguments = pipe.recv()
        except EOFError:
            # The interpreter's own end is not waited for, see tests/layer/test_distributed.py.
            os._exit(0)
        try:
            pipe.send((job(rank, *arguments), None))
        except Exception as error:
            pipe.send((error, traceback.format_exc()))
