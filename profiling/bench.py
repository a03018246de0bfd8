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
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from . import machine, report
from .check import complaint, errors, results, shortened, truth
from .options import DTYPES, add_output, add_problem, dtype_of, problems_of, reader
from .peers import OURS, PEERS, REFERENCE, Attend, Peer
from .problems import STANDARD, Problem
from .terminal import Bar
from .timing import Run, add_times, first_call, measure_rates, peak_bytes

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


Row = dict[str, Any]
"""What was found of a peer, as the JSON has it: ``peer``, ``status``, ``reason`` (why there is
nothing, or nothing of training), ``error``, times in ms by their names, ``first_..._s`` of the
calls that compile, ``peak_bytes``, and ``rounds``: what each round of turns took, by the time's
name. Kernels, a GPU's alone, take less than a call that waits for the host."""

FIELDS = (
    *("error", "forward_ms", "train_ms", "forward_kernels_ms", "train_kernels_ms"),
    *("first_forward_s", "first_train_s", "peak_bytes"),
)


def row_of(peer: str, status: Status, reason: str = "", **fields: Any) -> Row:
    """A row with nothing in the fields that are not given."""
    return {"peer": peer, "status": status, "reason": reason, **dict.fromkeys(FIELDS), **fields}


def bad(row: Row) -> bool:
    """Whether it is wrong, or ours and does not run."""
    ours = row["peer"] == OURS.name and row["status"] in ("out of memory", "failed")
    return row["status"] == "wrong" or ours


def measure_all(task: Task, peers: Sequence[Peer], bar: Bar) -> list[Row]:
    """Every peer's row.

    flexlocal must agree with the brute-force truth on a shortened problem, all the others with
    flexlocal's eager path in fp32 on the whole one.
    """
    reason = _off_the_truth(REFERENCE, replace(task, dtype=torch.float32))
    if reason is not None:
        reason = f"nothing to compare with: {REFERENCE.name} is {reason}"
        return [row_of(peer.name, "wrong", reason) for peer in peers]
    tensors = task.tensors()
    exact = [x.detach().float().requires_grad_() for x in tensors]
    attend = REFERENCE.attend(task.problem, task.device)
    # In the host's memory, where it adds nothing to a peer's peak.
    reference = [x.cpu() for x in results(attend, exact, task.train)]
    del exact
    found: dict[str, Row] = {}
    runs: dict[str, dict[str, Run]] = {"forward": {}, "train": {}}
    for peer in peers:
        bar.show(f"{task.problem.name}: {peer.name}")
        try:
            found[peer.name] = _checked(peer, task, tensors, reference, runs)
        except Exception as error:  # a peer may raise anything; the others go on
            found[peer.name] = row_of(peer.name, *trouble(error))
        _free(task.device)
        bar.advance()
    bar.show(f"{task.problem.name}: in turns")
    for kind, of_kind in runs.items():
        _add_times(kind, of_kind, task, sum(x.nbytes for x in tensors), found)
    return list(found.values())


def _off_the_truth(peer: Peer, task: Task) -> str | None:
    """How the peer differs from brute force on a shortened problem."""
    short = replace(task, problem=shortened(task.problem))
    tensors = short.tensors()
    found = results(peer.attend(short.problem, task.device), tensors, task.train)
    # Kernels made for another length are no matter of the problem, and the limit on recompilation
    # counts them all.
    torch.compiler.reset()
    return complaint(errors(found, truth(short.problem, tensors, task.train)), task.dtype)


def _checked(
    peer: Peer,
    task: Task,
    tensors: Sequence[Tensor],
    reference: Sequence[Tensor],
    runs: dict[str, dict[str, Run]],
) -> Row:
    """The row without its times; a peer that is right gets a place in ``runs``."""
    reason = peer.missing()
    if reason is not None:
        return row_of(peer.name, "missing", reason)
    reason = peer.obstacle(task.problem, task.dtype, task.device)
    if reason is not None:
        return row_of(peer.name, "refused", reason)
    reason = _off_the_truth(peer, task) if peer is OURS else None
    if reason is not None:
        return row_of(peer.name, "wrong", f"on a short sequence {reason}")
    attend, device = peer.attend(task.problem, task.device), task.device
    forward, train = forward_of(attend, tensors), training_of(attend, tensors)
    firsts: dict[str, Any] = {"first_forward_s": first_call(forward, device)}
    off = errors(results(attend, tensors, train=False), reference)
    untrained = peer.inference_only(device) if task.train else None
    trains = task.train and untrained is None
    if trains:
        try:
            firsts["first_train_s"] = first_call(train, device)
            off = errors(results(attend, tensors), reference)
        except Exception as error:
            trains, untrained = False, ": ".join(trouble(error))
    wrong, most = complaint(off, task.dtype), max(off.values())
    if wrong is not None:
        return row_of(peer.name, "wrong", wrong, error=most)
    runs["forward"][peer.name] = forward
    if trains:
        runs["train"][peer.name] = train
    reason = f"training: {untrained}" if untrained else ""
    return row_of(peer.name, "measured", reason, error=most, **firsts)


def _add_times(
    kind: str, runs: dict[str, Run], task: Task, passed: int, found: dict[str, Row]
) -> None:
    """Adds the times of one kind of call to the rows of those that are right."""
    lost: dict[str, Exception] = {}

    def call(name: str) -> None:
        try:
            if name not in lost:
                runs[name]()
        except Exception as error:  # as memory that others left too little of
            lost[name] = error

    turns = {name: partial(call, name) for name in runs}
    times = f"{kind}_ms", f"{kind}_kernels_ms"
    add_times(found, turns, times, task.device, task.seconds)
    for name, run in turns.items():
        if kind == "train":
            found[name]["peak_bytes"] = peak_bytes(run, task.device, passed)
        if name in lost:
            found[name] = row_of(name, *trouble(lost[name]))
        _free(task.device)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
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
    device, dtype, peers = options.device, dtype_of(options, options.device), options.peers
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
    record |= {"rates": rates, "problems": []}
    wrong = False
    print(f"{record['device']}, {record['settings']['dtype']}, torch {torch.__version__}")
    with Bar(len(options.problems) * len(peers)) as bar:
        for problem in options.problems:
            train = not options.forward_only
            task = Task(problem, dtype, device, options.views, train, options.seconds)
            rows = measure_all(task, peers, bar)
            wrong |= any(map(bad, rows))
            entry = {
                "name": problem.name,
                "words": problem.words,
                "shape": problem.shape,
                "window": asdict(problem.window),
                "rule": problem.window.words,
                "floors": {
                    kind: problem.floors(rates, dtype, kind == "train") for kind in report.KINDS
                },
                "rows": rows,
            }
            record["problems"].append(entry)
            print(f"\n{report.text(entry)}", flush=True)
            machine.write(record, options.json)  # a later one may take the machine with it
    if options.plot:
        report.plot(record, options.plot)
    return int(wrong)


if __name__ == "__main__":
    # First calls compile, whatever an earlier run left on the disk.
    torch.compiler.config.force_disable_caches = True
    sys.exit(main())
