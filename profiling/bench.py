"""flexlocal beside the other ways to compute local attention: checked, then timed in turns.

    python -m profiling.bench                                  # all that can run here
    python -m profiling.bench --problem slide256 --peer cuDNN "FlashAttention 2"
    python -m profiling.bench --shape 2 8 8192 64 --window 128 --causal --exact --dtype fp32

Every result is compared before it is timed, and a wrong one ends the program with status 1. Who
cannot take part is listed with the reason. Times are medians of warm calls; the first calls
include compilation. The floors are what the device, by its measured copies and matrix products,
would take for the problem's bytes and operations.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from . import machine, report
from .check import complaint, errors, results, shortened, truth
from .options import DTYPES, add_output, add_problem, dtype_of, problems_of, reader
from .peers import OURS, PEERS, REFERENCE, Attend, Peer
from .problems import STANDARD, Problem
from .terminal import Bar
from .timing import Rates, Run, first_call, in_turns, kernels_ms, measure_rates, peak_bytes

Status = Literal["measured", "missing", "refused", "wrong", "out of memory", "failed"]


@dataclass(frozen=True)
class Task:
    """A problem and how it is to be measured; ``views`` as in ``Problem.tensors``."""

    problem: Problem
    dtype: torch.dtype
    device: torch.device
    views: bool = False
    train: bool = True
    seconds: float = 0.3

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the output's gradient."""
        return self.problem.tensors(self.dtype, self.device, views=self.views)


@dataclass(frozen=True)
class Measurement:
    """What was found of a peer; ``reason`` says why there is nothing, or nothing of training.

    ``rounds`` holds, by the name of a time, what each round of turns took; the time itself is the
    median. Kernels, a GPU's alone, take less than a call that waits for the host.
    """

    peer: str
    status: Status
    reason: str = ""
    error: float | None = None
    forward_ms: float | None = None
    train_ms: float | None = None
    forward_kernels_ms: float | None = None
    train_kernels_ms: float | None = None
    first_forward_s: float | None = None
    first_train_s: float | None = None
    peak_bytes: int | None = None
    rounds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def bad(self) -> bool:
        """Whether it is wrong, or ours and does not run."""
        ours = self.peer == OURS.name and self.status in ("out of memory", "failed")
        return self.status == "wrong" or ours


def measure_all(task: Task, peers: Sequence[Peer], bar: Bar) -> list[Measurement]:
    """Every peer's measurement.

    flexlocal must agree with the brute-force truth on a shortened problem, all the others with
    flexlocal's eager path in fp32 on the whole one.
    """
    reason = _off_the_truth(REFERENCE, replace(task, dtype=torch.float32))
    if reason is not None:
        reason = f"nothing to compare with: {REFERENCE.name} is {reason}"
        return [Measurement(peer.name, "wrong", reason) for peer in peers]
    tensors = [x.detach().float().requires_grad_() for x in task.tensors()]
    attend = REFERENCE.attend(task.problem, task.device)
    # In the host's memory, where it adds nothing to a peer's peak.
    reference = [x.cpu() for x in results(attend, tensors, task.train)]
    del tensors
    ours_is = _tried(lambda: _off_the_truth(OURS, task))
    # Kernels made for another problem are no matter of this one, and the limit on recompilation
    # counts them all.
    torch.compiler.reset()
    found: dict[str, Measurement] = {}
    runs: dict[str, dict[str, Run]] = {"forward": {}, "train": {}}
    tensors = task.tensors()
    for peer in peers:
        bar.show(f"{task.problem.name}: {peer.name}")
        if peer is OURS and ours_is is not None:
            row = ours_is if isinstance(ours_is, Measurement) else None
            words = f"on a short sequence {ours_is}"
            found[peer.name] = row or Measurement(peer.name, "wrong", words)
        else:
            row = _tried(lambda peer=peer: _checked(peer, task, tensors, reference, runs))
            found[peer.name] = replace(row, peer=peer.name)
        bar.advance()
        _free(task.device)
    bar.show(f"{task.problem.name}: in turns")
    for kind, of_kind in runs.items():
        _time(kind, of_kind, task, sum(x.nbytes for x in tensors), found)
    return list(found.values())


def _tried(run: Callable[[], Measurement | str | None]) -> Measurement | str | None:
    try:
        return run()
    except Exception as error:  # a peer may raise anything; the others go on
        return Measurement(OURS.name, *trouble(error))


def _off_the_truth(peer: Peer, task: Task) -> str | None:
    """How the peer differs from brute force on a shortened problem."""
    short = replace(task, problem=shortened(task.problem))
    tensors = short.tensors()
    found = results(peer.attend(short.problem, task.device), tensors, task.train)
    return complaint(errors(found, truth(short.problem, tensors, task.train)), task.dtype)


def _checked(
    peer: Peer,
    task: Task,
    tensors: Sequence[Tensor],
    reference: Sequence[Tensor],
    runs: dict[str, dict[str, Run]],
) -> Measurement:
    """Without its times; a peer that is right gets a place in ``runs``."""
    reason = peer.missing()
    if reason is not None:
        return Measurement(peer.name, "missing", reason)
    reason = peer.obstacle(task.problem, task.dtype, task.device)
    if reason is not None:
        return Measurement(peer.name, "refused", reason)
    attend, device = peer.attend(task.problem, task.device), task.device
    forward, train = forward_of(attend, tensors), training_of(attend, tensors)
    first = first_call(forward, device)
    off = errors(results(attend, tensors, train=False), reference)
    first_train, untrained = None, peer.inference_only(device) if task.train else None
    trains = task.train and untrained is None
    if trains:
        try:
            first_train = first_call(train, device)
            off = errors(results(attend, tensors), reference)
        except Exception as error:
            trains, untrained = False, ": ".join(trouble(error))
    wrong, error = complaint(off, task.dtype), max(off.values())
    if wrong is not None:
        return Measurement(peer.name, "wrong", wrong, error)
    runs["forward"][peer.name] = forward
    if trains:
        runs["train"][peer.name] = train
    reason = "" if untrained is None else f"training: {untrained}"
    firsts = {"first_forward_s": first, "first_train_s": first_train}
    return Measurement(peer.name, "measured", reason, error, **firsts)


def _time(
    kind: str, runs: dict[str, Run], task: Task, passed: int, found: dict[str, Measurement]
) -> None:
    """Adds the times of one kind of call to what was found of the peers."""
    lost: dict[str, Exception] = {}

    def call(name: str) -> None:
        try:
            if name not in lost:
                runs[name]()
        except Exception as error:  # as memory that others left too little of
            lost[name] = error

    turns = {name: lambda name=name: call(name) for name in runs}
    clocks = {"": None} | ({"kernels_": kernels_ms} if task.device.type == "cuda" else {})
    for words, clock in clocks.items():
        name_of_time = f"{kind}_{words}ms"
        for name, rounds in in_turns(turns, task.device, task.seconds, clock).items():
            row = found[name]
            times = {**row.rounds, name_of_time: rounds}
            median = {name_of_time: statistics.median(rounds)}
            found[name] = replace(row, rounds=times, **median)
    for name, run in turns.items():
        if kind == "train":
            found[name] = replace(found[name], peak_bytes=peak_bytes(run, task.device, passed))
        if name in lost:
            found[name] = Measurement(name, *trouble(lost[name]))
        _free(task.device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forward_of(attend: Attend, tensors: Sequence[Tensor]) -> Run:
    """A call of the forward pass."""
    return torch.no_grad()(lambda: attend(*tensors[:3]))


def training_of(attend: Attend, tensors: Sequence[Tensor]) -> Run:
    """A call of both passes."""
    *leaves, grad = tensors
    return lambda: torch.autograd.grad(attend(*leaves), leaves, grad)


def trouble(error: Exception) -> tuple[Status, str]:
    """What kind of trouble it is, and its first line."""
    words = str(error).strip().split("\n")[0]
    if is_out_of_memory(error):
        return "out of memory", words
    return "failed", f"{type(error).__name__}: {words}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, for which the CPU's allocator has no class of its own."""
    of_its_own = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return of_its_own or "allocate memory" in str(error)


def entry_of(task: Task, rates: Rates, rows: Sequence[Measurement]) -> report.Entry:
    """A problem's part of the record."""
    problem, kinds = task.problem, {"forward": False, "train": True}
    return {
        "name": problem.name,
        "words": problem.words,
        "shape": problem.shape,
        "window": asdict(problem.window),
        "rule": problem.window.words,
        "floors": {name: rates.floors(problem, task.dtype, kinds[name]) for name in kinds},
        "rows": [asdict(row) for row in rows],
    }


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; wrong arguments end the program."""
    parser = reader("bench", __doc__)
    add_problem(parser, several=True)
    names = ", ".join(map(repr, PEERS))
    parser.add_argument("--peer", nargs="+", choices=PEERS, metavar="NAME", help=names)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, else fp32")
    words = "our layer with rotary; compiled rotary, then others"
    parser.add_argument("--rotary", action="store_true", help=words)
    words = "(batch, n, heads, d) seen as (batch, heads, n, d)"
    parser.add_argument("--views", action="store_true", help=words)
    parser.add_argument("--forward-only", action="store_true", help="without training")
    add_output(parser, seconds=0.5, plot=True)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no GPU, got cuda")
    options.device = torch.device(options.device or machine.default_device())
    standard = STANDARD if options.device.type == "cuda" else ("cpu",)
    standard = standard[:1] if options.shape else standard
    found = problems_of(parser, options, standard, turned=options.rotary)
    options.problems = [replace(problem, rotary=options.rotary) for problem in found]
    # flexlocal always, since ratios are to its time.
    asked = options.peer or list(PEERS)
    options.peers = [peer for name, peer in PEERS.items() if peer is OURS or name in asked]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status, 1 where something was wrong."""
    options = read(arguments)
    device, dtype, peers, bad = options.device, dtype_of(options, options.device), options.peers, 0
    rates = measure_rates(device, dtype, options.seconds)
    record = machine.record(
        device,
        dtype=str(dtype).removeprefix("torch."),
        rotary=options.rotary,
        views=options.views,
        forward_only=options.forward_only,
        seconds=options.seconds,
        float32_matmul_precision=torch.get_float32_matmul_precision(),
    )
    record |= {"rates": asdict(rates), "problems": []}
    print(f"{record['device']}, {record['settings']['dtype']}, torch {torch.__version__}")
    with Bar(len(options.problems) * len(peers)) as bar:
        for problem in options.problems:
            train = not options.forward_only
            task = Task(problem, dtype, device, options.views, train, options.seconds)
            rows = measure_all(task, peers, bar)
            bad |= any(row.bad for row in rows)
            record["problems"].append(entry_of(task, rates, rows))
            print(f"\n{report.text(record['problems'][-1])}", flush=True)
            machine.write(record, options.json)  # a later one may take the machine with it
    if options.plot:
        report.plot(record, options.plot)
    return int(bad)


@contextmanager
def _cold_caches() -> Iterator[None]:
    """First calls compile, whatever an earlier run left on the disk; unless a folder is named."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    if name in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        yield


if __name__ == "__main__":
    with _cold_caches():
        sys.exit(main())
