"""flexlocal beside the other ways to compute local attention: checked, then timed in turns.

    python -m profiling.bench                                  # all that can run here
    python -m profiling.bench --problem slide256 --peer cuDNN "FlashAttention 2"
    python -m profiling.bench --host               # what a call costs before its kernels run
    python -m profiling.bench --shape 2 8 8192 64 --window 128 --causal --exact --dtype fp32

Every result is compared before it is timed, and a wrong one ends the program with status 1. Who
cannot take part is listed with the reason. Times are medians of warm calls; the first calls
include compilation.
"""

import argparse
import gc
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from . import bars, host, machine, report
from .check import complaint, errors, results, shortened, truth
from .options import DTYPES, dtype_of, file_to_write, problems_of, reader
from .peers import OURS, PEERS, REFERENCE, Peer, forward_of, training_of
from .problems import STANDARD, Task
from .terminal import watched
from .timing import Run, add_times, first_call, peak_bytes

Row = dict[str, Any]
"""A ``peer``, its ``status`` (measured, missing, refused, wrong, out of memory or failed), the
``reason`` for that or for no training, ``error``, times in ms and in ``rounds`` those of each,
``first_..._s`` of the calls that compile, and ``peak_bytes``. Kernels are timed on a GPU."""


def measure_all(task: Task, peers: Iterable[Peer]) -> list[Row]:
    """Every peer's row.

    flexlocal's eager path in fp32 must agree with the brute-force truth on a shortened problem,
    and all peers with it on the whole one.
    """
    short = replace(task, problem=shortened(task.problem), dtype=torch.float32)
    true = truth(short.problem, short.tensors())
    wrong = complaint(errors(_reference(short), true), short.dtype)
    if wrong is not None:
        reason = f"nothing to compare with: {REFERENCE.name} is {wrong}"
        return [row_of(peer, "wrong", reason) for peer in peers]
    tensors, reference = task.tensors(), _reference(task)
    rows: dict[str, Row] = {}
    runs: dict[str, dict[str, Run]] = {"forward": {}, "train": {}}
    for peer in peers:
        try:
            rows[peer.name] = _checked(peer, task, tensors, reference, runs)
        except Exception as error:  # a peer may raise anything; the others go on
            rows[peer.name] = row_of(peer, *trouble(error))
        gc.collect()
        torch.cuda.empty_cache()
    for kind, of_kind in runs.items():
        add_times(rows, of_kind, task, f"{kind}_ms", f"{kind}_kernels_ms")
    for name, run in runs["train"].items() if task.device.type == "cuda" else ():
        rows[name]["peak_bytes"] = peak_bytes(run, task.device, sum(x.nbytes for x in tensors))
    return list(rows.values())


def _reference(task: Task) -> list[Tensor]:
    """The eager path's results in fp32, in the host's memory: there they add to no peer's peak."""
    exact = [x.detach().float().requires_grad_() for x in task.tensors()]
    attend = REFERENCE.attend(task.problem, task.device)
    return [x.cpu() for x in results(attend, exact)]


def _checked(
    peer: Peer,
    task: Task,
    tensors: Sequence[Tensor],
    reference: Sequence[Tensor],
    runs: dict[str, dict[str, Run]],
) -> Row:
    """The row without its times; a peer that is right gets a place in ``runs``."""
    device = task.device
    reason = peer.missing()
    if reason is not None:
        return row_of(peer, "missing", reason)
    reason = peer.obstacle(task.problem, task.dtype, device)
    if reason is not None:
        return row_of(peer, "refused", reason)
    attend = peer.attend(task.problem, device)
    forward, train = forward_of(attend, tensors), training_of(attend, tensors)
    firsts = {"first_forward_s": first_call(forward, device)}
    off = errors(results(attend, tensors, train=False), reference)
    untrained = peer.no_training_on_cpu if device.type == "cpu" else None
    if untrained is None:
        try:
            firsts["first_train_s"] = first_call(train, device)
            off = errors(results(attend, tensors), reference)
        except Exception as error:
            untrained = ": ".join(trouble(error))
    wrong, most = complaint(off, task.dtype), max(off.values())
    if wrong is not None:
        return row_of(peer, "wrong", wrong, error=most)
    runs["forward"][peer.name] = forward
    if untrained is None:
        runs["train"][peer.name] = train
    reason = f"training: {untrained}" if untrained else ""
    return row_of(peer, "measured", reason, error=most, **firsts)


def row_of(peer: Peer, status: str, reason: str = "", **found: Any) -> Row:
    """A row with nothing in the fields that are not given."""
    times = [f"{kind}_{time}" for kind in ("forward", "train") for time in ("ms", "kernels_ms")]
    fields = ["error", *times, "first_forward_s", "first_train_s", "peak_bytes"]
    return {"peer": peer.name, "status": status, "reason": reason, **dict.fromkeys(fields), **found}


def trouble(error: Exception) -> tuple[str, str]:
    """What kind of trouble it is, and its first line."""
    words = str(error).strip().split("\n")[0]
    # The CPU's allocator has no class of its own.
    lost = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(
        error
    )
    return ("out of memory", words) if lost else ("failed", f"{type(error).__name__}: {words}")


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; wrong arguments end the program."""
    parser = reader("bench", __doc__, "several", seconds=0.5)
    names = ", ".join(map(repr, PEERS))
    parser.add_argument("--peer", nargs="+", choices=PEERS, metavar="NAME", help=names)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, else fp32")
    parser.add_argument("--rotary", action="store_true", help="compiled, before other peers")
    parser.add_argument("--views", action="store_true", help="tensors as a projection leaves them")
    words = "what a call costs the host, and nothing else"
    parser.add_argument("--host", action="store_true", help=words)
    parser.add_argument("--plot", type=file_to_write, metavar="FILE.png")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no GPU, got cuda")
    options.device = torch.device(options.device or machine.default_device())
    if options.host and options.device.type != "cuda":
        parser.error("argument --host: must be on a GPU, which a host launches kernels on")
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
    if options.host:
        record, status = host.run(options.seconds)
        machine.write(record, options.json)
        return status
    device, dtype = options.device, dtype_of(options, options.device)
    settings = {"dtype": str(dtype).removeprefix("torch."), "seconds": options.seconds}
    settings |= {"rotary": options.rotary, "views": options.views}
    settings["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    record = machine.record(device, **settings) | {"problems": []}
    wrong = False
    print(f"{record['device']}, {settings['dtype']}, torch {torch.__version__}")
    for problem in options.problems:
        task = Task(problem, dtype, device, options.seconds, options.views)
        rows = measure_all(task, watched(options.peers, len(options.peers), problem.name))
        entry = {"name": problem.name, "words": problem.words, "shape": problem.shape}
        entry |= {"window": asdict(problem.window), "rule": problem.window.words, "rows": rows}
        record["problems"].append(entry)
        # Ours must also run.
        bad = {OURS.name: ("wrong", "out of memory", "failed")}
        wrong |= any(row["status"] in bad.get(row["peer"], ("wrong",)) for row in rows)
        print(f"\n{report.text(entry)}", flush=True)
        machine.write(record, options.json)  # a later one may take the machine with it
    if options.plot:
        bars.plot(record, options.plot)
    return int(wrong)


if __name__ == "__main__":
    # First calls compile, whatever an earlier run left on the disk.
    torch.compiler.config.force_disable_caches = True
    sys.exit(main())
