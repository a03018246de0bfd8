"""The worker processes: one that dies or loses its GPU is replaced, one that hangs is ended."""

import os

import torch

from profiling.workers import Workers


def job_of_a_worker(job):
    if job == "die":
        os._exit(7)
    if job == "spoil":  # as an illegal access to memory does
        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, None
    return job, os.getpid()


def lost(job, reason):
    return job, reason


def test_a_process_that_dies_or_loses_its_gpu_is_replaced():
    workers = Workers(1, job_of_a_worker, lost, 120)
    found = dict(workers.results(["one", "spoil", "two", "die", "three"]))
    workers.close()
    assert found["die"] == "its process ended with status 7"
    assert found["one"] == found["spoil"]
    assert len({found["one"], found["two"], found["three"], os.getpid()}) == 4


def test_a_process_that_hangs_is_ended():
    workers = Workers(1, job_of_a_worker, lost, 0.01)  # less than its start takes
    found = list(workers.results(["one"]))
    workers.close()
    assert found == [("one", "no result within 0.01 s")]
