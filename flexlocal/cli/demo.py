"""A small byte-level language model with ``LocalAttention``, trained in about a minute.

It learns the source of Python's standard library, split by file into a training and a held-out
part, and must end well under what the frequencies of the bytes alone give. Losses are in bits
per byte. ``python -m flexlocal demo`` runs it.

Shapes: b batch, n tokens.
"""

import hashlib
import math
import os
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import BackendName
from ..torch_limits.kernels import unavailable
from .byte_model import EMBEDDING, HEADS, LAYERS, ByteModel
from .progress import Progress

STEPS = 220  # with the rest about a minute on two CPU cores
SECONDS = 90.0  # of training at most, unless asked for
CONTEXT = 512  # at least; rounded up to whole windows
TOKENS = 2048  # in a batch
HELD_OUT_TOKENS = 16384  # that the loss is measured on
RATE = 3e-3
SAMPLE = 256  # bytes, prompt included; rounded up to whole windows


class CannotRun(Exception):
    """What was asked for cannot run here; the message says why."""


def source_files(root: Path) -> tuple[list[Path], list[Path]]:
    """Python files under ``root`` to train on and to hold out, one in ten, chosen by name."""
    parts: tuple[list[Path], list[Path]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not {"site-packages", "dist-packages", "test", "tests"} & set(name.parts):
            draw = hashlib.sha256(name.as_posix().encode()).digest()[0]
            parts[draw < 26].append(path)
    return parts


def read(paths: list[Path]) -> Tensor:
    """The bytes of the files, one after the other."""
    joined = bytearray(b"\n" + b"".join(path.read_bytes() for path in paths))  # never empty
    return torch.frombuffer(joined, dtype=torch.uint8)


def rows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """``length`` bytes from each start: ``(starts, length)``, int64."""
    return text[starts[:, None] + torch.arange(length)].long()


def losses(model: ByteModel, rows_bn: Tensor) -> Tensor:
    """Mean loss of predicting each byte from those before it, in bits per byte."""
    logits = model(rows_bn[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows_bn[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def held_out_loss(model: ByteModel, rows_bn: Tensor, batch: int) -> float:
    """Mean loss over all the rows, in bits per byte."""
    sums = [losses(model, part).item() * len(part) for part in rows_bn.split(batch)]
    return sum(sums) / len(rows_bn)


def frequency_loss(training: Tensor, rows_bn: Tensor) -> float:
    """Loss of the training part's byte frequencies on the same bytes, in bits per byte."""
    counts = torch.bincount(training, minlength=256).double() + 1
    return -(counts / counts.sum()).log2()[rows_bn[:, 1:].cpu()].mean().item()


def train(
    model: ByteModel,
    text: Tensor,
    context: int,
    steps: float,
    seconds: float,
    seed: int,
    progress: Progress,
) -> float:
    """Train for ``steps`` or ``seconds``, what ends first; return tokens per second."""
    device = next(model.parameters()).device
    batch = max(1, TOKENS // context)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    done, step, started = 0.0, 0, time.perf_counter()
    while done < 1:
        for group in optimizer.param_groups:  # warm up, then down along a cosine
            group["lr"] = RATE * min(1, (step + 1) / 20) * (0.52 + 0.48 * math.cos(math.pi * done))
        starts = torch.randint(len(text) - context, (batch,), generator=draw)
        loss = losses(model, rows(text, starts, context + 1).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        now = loss.item()
        elapsed = time.perf_counter() - started
        done = min(1.0, max(step / steps, elapsed / seconds))
        rate = step * batch * context / elapsed
        progress.show(done, f"step {step:4}  {now:5.2f} bits/byte  {rate:9,.0f} tokens/s")
    return rate


@torch.no_grad()
def sample(
    model: ByteModel, prompt: bytes, length: int, seed: int, cached: bool = True
) -> tuple[str, float]:
    """``prompt`` and what the model writes after it, ``length`` bytes together, as text.

    Args:
        cached: keep keys and values, instead of computing the whole text for each byte.

    Returns:
        The text, and bytes written in a second.
    """
    draw = torch.Generator().manual_seed(seed)
    row_bn = torch.zeros(1, length, dtype=torch.int64)  # one shape throughout: compiled once
    row_bn[0, : len(prompt)] = torch.tensor(list(prompt))
    device = next(model.parameters()).device
    caches = model.new_caches(1) if cached else None
    started = time.perf_counter()
    known = 0
    for place in range(len(prompt), length):
        if caches is None:
            logits = model(row_bn.to(device))[0, place - 1]
        else:
            logits = model(row_bn[:, known:place].to(device), caches)[0, -1]
            known = place
        odds = (logits.float().cpu() / 0.7).softmax(0)
        row_bn[0, place] = torch.multinomial(odds, 1, generator=draw)
    text = "".join(chr(c) if 32 <= c < 127 or c == 10 else "?" for c in row_bn[0].tolist())
    return text, (length - len(prompt)) / (time.perf_counter() - started)


@torch.no_grad()
def difference(model: ByteModel, row_bn: Tensor) -> str:
    """The largest difference that flex and eager attention make to the logits, in words."""
    device = row_bn.device
    reason = unavailable(device)
    if reason:
        return f"not compared: flex cannot run on {device.type}: {reason}"
    before = [attention.backend for attention in model.attentions]
    logits: dict[BackendName, Tensor] = {}
    backends: tuple[BackendName, ...] = ("flex", "eager")
    for backend in backends:
        for attention in model.attentions:
            attention.backend = backend
        logits[backend] = model(row_bn)
    for attention, backend in zip(model.attentions, before, strict=True):
        attention.backend = backend
    largest = (logits["flex"] - logits["eager"]).abs().max().item()
    return f"at most {largest:.1e} apart in logits of up to {logits['eager'].abs().max():.1f}"


def run(
    *,
    steps: int | None = None,
    seconds: float | None = None,
    device: str | None = None,
    backend: BackendName = "auto",
    seed: int = 0,
    window: int = 64,
    compare: bool = True,
) -> int:
    """Train, report on stdout, and return the exit status.

    Args:
        steps: training steps.
        seconds: of training. With both, what ends first; with neither, ``STEPS`` in at most
            ``SECONDS``.
        device: where to run; ``None``: the first CUDA device, or the CPU where there is none.
        backend: ``LocalAttention``'s.
        seed: of the weights, the training batches and the sample.
        window: ``LocalAttention``'s window size.
        compare: compare the two paths on the trained weights; it compiles.

    Returns:
        0, or 1 when full training (``STEPS`` or more, ``seconds`` not given) leaves the model no
        better than the byte frequencies.

    Raises:
        CannotRun: no such device, a backend that cannot train there, or no source to train on.
    """
    full = seconds is None and (steps is None or steps >= STEPS)
    if steps is None and seconds is None:
        steps, seconds = STEPS, SECONDS
    where = _device(device)
    context = math.ceil(CONTEXT / window) * window
    batch = max(1, TOKENS // context)

    torch.manual_seed(seed)
    model = ByteModel(window, backend).to(where)
    attention = model.attentions[0]
    like_q = torch.empty(1, device=where).expand(batch, HEADS, context, EMBEDDING // HEADS)
    try:
        path = attention.explain(like_q.requires_grad_())
    except ValueError as error:
        raise CannotRun(str(error)) from error

    progress = Progress(sys.stderr)
    root = Path(sysconfig.get_path("stdlib"))
    with progress.doing("reading Python's standard library"):
        training_files, held_out_files = source_files(root)
        training, held_out = read(training_files), read(held_out_files)
    if min(len(training), len(held_out)) <= 2 * context:
        found = f"{len(training):,} and {len(held_out):,} bytes of Python source under {root}"
        raise CannotRun(f"{found} are too few for a context of {context:,} tokens")
    starts = torch.linspace(
        0, len(held_out) - context - 1, max(1, HELD_OUT_TOKENS // context), dtype=torch.float64
    )
    test_rows = rows(held_out, starts.long(), context + 1).to(where)

    parameters = sum(p.numel() for p in model.parameters())
    _say("device", _name(where))
    _say("attention", f"{path.backend}: {path.reason}")
    _say("mask", attention.window.words)
    _say("model", f"{parameters:,} parameters: {LAYERS} layers, {HEADS} heads, context {context}")
    for name, text, files in (
        ("training", training, training_files),
        ("held out", held_out, held_out_files),
    ):
        _say(name, f"{len(text) / 1e6:.1f} MB of Python's standard library, {len(files)} files")
    frequencies = frequency_loss(training, test_rows)
    _say("frequencies", f"{frequencies:.3f} bits/byte held out, from byte frequencies alone")
    compiles = "; it compiles first" if path.backend == "flex" else ""
    with progress.doing(f"measuring the loss before training{compiles}"):
        before = held_out_loss(model, test_rows, batch)
    _say("before", f"{before:.3f} bits/byte held out")
    with progress.doing(f"a first step, not counted{compiles}"):
        losses(model, test_rows[:batch]).backward()
        model.zero_grad()

    started = time.perf_counter()
    rate = train(model, training, context, steps or math.inf, seconds or math.inf, seed, progress)
    _say("speed", f"{rate:,.0f} tokens/s, trained for {time.perf_counter() - started:.0f} s")
    with progress.doing("measuring the loss after training"):
        after = held_out_loss(model, test_rows, batch)
    _say("after", f"{after:.3f} bits/byte held out")
    if compare:
        with progress.doing("comparing the two paths; flex compiles first, for up to a minute"):
            apart = difference(model, test_rows[:1, :-1])
        _say("flex, eager", apart)
    length = math.ceil(SAMPLE / window) * window
    with progress.doing("writing a sample"):
        prompt = b"import os\n\n\nclass "
        written, fast = sample(model, prompt, length, seed)
        _, slow = sample(model, prompt, length, seed, cached=False)
    _say("writing", f"{fast:,.0f} bytes/s with a cache, {slow:,.0f} without")
    print(f"\nsample\n\n{written}", flush=True)

    if full and after >= frequencies:
        print("\nthe model is no better than the byte frequencies: it did not learn")
        return 1
    return 0


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise CannotRun(f"argument --device: {name!r} cannot be used here: {first}") from error
    return device


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _say(name: str, text: str) -> None:
    print(f"{name:<12} {text}", flush=True)
