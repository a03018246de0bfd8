"""The candidates of a problem, tried one by one in processes that share the GPU."""

import argparse
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from .candidates import (
    PASSES,
    Candidate,
    Layout,
    Outcome,
    Pass,
    candidates,
    flash,
    layout_words,
    ranked,
    stock,
)
from .options import DTYPES
from .peers import PEERS
from .problems import Problem
from .progress import Progress
from .trial import Trial, attempt
from .workers import Workers

MOST_SECONDS = 240.0
"""What a candidate may take, the start of its process and its wait for the GPU included."""

CONTEXT_BYTES = 2**30
"""Of GPU memory, that a process takes for itself."""


def sweep(
    problem: Problem, options: argparse.Namespace, workers: Workers[Trial, Outcome], lock: Path
) -> Generator[Outcome, None, None]:
    """Every candidate's outcome, as they come; close it where it is left early."""
    dtype = DTYPES[options.dtype]
    forward: dict[Layout, Outcome] = {}
    for kind in PASSES:
        trials = []
        for candidate in _tried(kind, problem, options):
            trial = Trial(candidate, problem, dtype, options.seconds, lock)
            if kind == "training" and candidate.swept:
                if candidate.layout not in forward:
                    words = f"no forward options run with {layout_words(candidate.layout)}"
                    yield Outcome(candidate, "failed", words)
                    continue
                trial = replace(trial, forward=forward[candidate.layout].candidate.options)
            trials.append(trial)
        progress, found = Progress(len(trials)), []
        progress.show(f"{problem.name}: {kind}")
        for outcome in workers.results(trials):
            progress.show(f"{problem.name}: {kind}: {outcome.candidate.words}")
            progress.done += 1
            found.append(outcome)
            yield outcome
        progress.clear()
        if kind == "forward":
            forward = {o.candidate.layout: o for o in reversed(ranked(found, kind))}


def _tried(kind: Pass, problem: Problem, options: argparse.Namespace) -> list[Candidate]:
    """The swept candidates and those they are compared with."""
    beside = [stock(kind)]
    if flash_runs(problem, options):
        beside.append(flash(kind))
    return beside + candidates(kind, problem, options.space, options.limit)


def flash_runs(problem: Problem, options: argparse.Namespace) -> bool:
    """Whether FlashAttention 4's kernel is here and takes the problem."""
    if options.dtype == "fp32" or problem.d % 8:
        return False
    return PEERS["FlashAttention 4"].missing() is None


@contextmanager
def _compiling_alone() -> Iterator[None]:
    """Processes started here compile on a thread each, without others of torch's."""
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextmanager
def workers_for(
    problems: Sequence[Problem], options: argparse.Namespace
) -> Iterator[Workers[Trial, Outcome]]:
    """As many processes as the GPU's memory holds."""
    memory = torch.cuda.get_device_properties("cuda").total_memory
    tensors = max(p.traffic(DTYPES[options.dtype], train=True) for p in problems)
    count = max(1, min(options.workers, memory // (tensors + CONTEXT_BYTES)))
    workers = Workers(count, attempt, _lost, MOST_SECONDS)
    with _compiling_alone():
        try:
            yield workers
        finally:
            workers.close()


def _lost(trial: Trial, reason: str) -> Outcome:
    return Outcome(trial.candidate, "failed", reason)
