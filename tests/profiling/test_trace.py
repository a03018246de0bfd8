"""Traces: the layer's regions in them, own times by phase and part, memory over time."""

import csv
import gc
import re
import weakref

import pytest
import torch

from profiling import trace
from profiling.chrome import Trace

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """The same traces with a GPU and without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "default_device", lambda: torch.device("cpu"))
        yield


@pytest.fixture(scope="module")
def traced(folder):
    """A model of two blocks, trained for two steps."""
    flags = ["--problem", "tiny", "--model", "--rotary", "--dropout", "0.1", "--gzip"]
    return trace.main([*flags, "--steps", str(STEPS), "--out", str(folder)])


def names(rows, **wanted):
    """Names of the rows that have these attributes."""
    return {row.name for row in rows if all(getattr(row, k) == v for k, v in wanted.items())}


def test_the_layers_steps_are_in_the_trace(traced):
    assert re.fullmatch(r".+_\d+\.\d+\.pt\.trace\.json\.gz", traced.file.name)
    assert traced.file.parent.name == "tiny-model-rotary-dropout"
    labels = [span.name for span in Trace(traced.file).regions]
    blocks = 2
    for step in ("rotary", "dropout", "attention", "attention backward"):
        assert labels.count(f"flexlocal::{step}") == blocks * STEPS


def test_own_times_are_told_by_phase_and_part(traced):
    assert {"forward", "backward", "optimizer"} <= {row.phase for row in traced.rows}
    assert "aten::bmm" in names(traced.rows, phase="forward", part="attention")
    assert "aten::bmm" in names(traced.rows, phase="backward", part="attention backward")
    assert "aten::cos" in names(traced.rows, phase="forward", part="rotary")
    assert "aten::cat" in names(traced.rows, phase="forward", part="rotary")
    assert "_TurnedBackward" in names(traced.rows, phase="backward", part="rotary backward")
    assert "_TiledBackward" in names(traced.rows, phase="backward", part="attention backward")
    assert not names(traced.rows, part="dropout backward")  # its numbers have no gradient
    assert "aten::addmm" in names(traced.rows, phase="forward", part="linear")
    assert not names(traced.rows, phase="forward", part="attention backward")


def test_own_times_add_up_to_the_steps(traced):
    """On a CPU everything happens inside a step, on its thread."""
    assert len(Trace(traced.file).steps) == STEPS
    assert sum(row.own for row in traced.rows) == pytest.approx(traced.wall, rel=1e-3)


def test_memory_ends_where_it_began(traced):
    memory = traced.memory["cpu"]
    assert memory.growth == 0
    logits = 256 * 256 * 4  # bytes; the loss holds them more than once
    assert memory.peak > 2 * logits
    assert memory.times == sorted(memory.times)


def test_what_the_warm_up_left_is_freed_before_the_trace(tmp_path):
    class Ring:
        def __init__(self):
            self.me = self

    rings, left = [], []

    def step():
        torch.zeros(8)
        if len(rings) < trace.WARM_UP:
            rings.append(weakref.ref(Ring()))
        else:
            left.extend(ring() for ring in rings)

    gc.disable()
    try:
        trace.record(step, torch.device("cpu"), tmp_path, STEPS, gzip=False)
    finally:
        gc.enable()
    assert left == [None] * trace.WARM_UP * STEPS


def test_memory_is_written_beside_the_trace(traced):
    table, picture = trace.write_memory(traced)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    held = [int(row["bytes"]) for row in rows if row["device"] == "cpu"]
    assert held == traced.memory["cpu"].held
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_summary_names_files_and_parts(capsys, tmp_path):
    flags = ["--shape", "1", "1", "60", "8", "--window", "20", "--no-causal", "--forward-only"]
    found = trace.main([*flags, "--problem", "tiny", "--steps", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "custom: 1 x 1 x 60 x 8" in printed
    assert "look_forward=1" in printed  # what a window that is not causal has by default
    assert str(found.file) in printed
    assert f"tensorboard --logdir {tmp_path}" in printed
    assert re.search(r"forward +attention +aten::bmm", printed)
    assert {row.phase for row in found.rows} == {"forward", ""}


def test_what_cannot_run_is_said(tmp_path):
    with pytest.raises(SystemExit, match="cannot be traced: .* no backward pass on the CPU"):
        trace.main(["--problem", "tiny", "--backend", "flex", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_trace_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "default_device", lambda: torch.device("cuda", 0))
    flags = ["--shape", "1", "2", "1024", "64", "--window", "128", "--rotary"]
    steps, tensor = 8, 1024 * 2 * 64 * 2  # bytes
    found = trace.main([*flags, "--steps", str(steps), "--out", str(tmp_path)])
    for phase, part in (("forward", "attention"), ("backward", "attention backward")):
        rows = [row for row in found.rows if (row.phase, row.part) == (phase, part)]
        assert any("flex_attention" in row.name for row in rows)
        assert all(row.calls % steps == 0 for row in rows)
    memory = found.memory["cuda:0"]
    assert memory.peak >= 4 * tensor  # the output and three gradients
    assert memory.peak < steps * tensor  # no step leaves anything
    assert memory.growth <= 3 * tensor  # the last one's gradients: no event after it says more
