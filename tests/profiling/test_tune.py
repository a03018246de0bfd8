"""The sweep's order, and the command: what it prints, records and writes, and its errors."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_candidates import BLOCKS, usual
from test_tuned_table import entry

from flexlocal import Window
from profiling import sweep, tune
from profiling.candidates import PASSES, Outcome, flash, milliseconds, winner_of
from profiling.peers import PEERS
from profiling.problems import PROBLEMS
from profiling.tuned_table import merged, text_of
from profiling.workers import Workers

ROOT = Path(__file__).parents[2]


# The order of a sweep.


class FakeWorkers:
    """Calls ``outcome_of`` in place of a GPU, and keeps what was tried."""

    def __init__(self, outcome_of):
        self.outcome_of, self.tried = outcome_of, []

    def results(self, trials):
        self.tried += trials
        return map(self.outcome_of, reversed(trials))


def swept(outcome_of, *arguments):
    options = tune.read(["--problem", "slide256", *arguments])
    workers = FakeWorkers(outcome_of)
    found = list(sweep.sweep(options.problems[0], options, workers, Path("lock")))
    return found, workers.tried


def made_best(kind, layout):
    """The candidate that ``timed`` makes the fastest: the second of 64, the third of 128."""
    return [c for c in usual(kind) if c.layout == layout][layout[0] // 64]


def timed(one):
    """64 beats 128, one list two; what is not swept takes longer than either."""
    each, (block, one_list) = one.candidate, one.candidate.layout
    best = each.swept and each == made_best(each.kind, each.layout)
    ms = block / 64 + (each.kind == "training") + (0 if best else 1) + (0 if one_list else 0.5)
    return Outcome(each, "measured", error=0.0, ms=ms if each.swept else 9.0)


LAYOUTS = [(64, False), (64, True), (128, False), (128, True)]


def test_training_takes_the_fastest_forward_options_of_its_layout():
    found, tried = swept(timed)
    assert len(found) == len(tried) == 2 * (52 + 180) + 2
    assert {(t.problem, t.dtype, t.seconds) for t in tried} == {
        (PROBLEMS["slide256"], torch.bfloat16, 0.1)
    }
    forward = {layout: made_best("forward", layout).options for layout in LAYOUTS}
    for one in tried:
        trains = one.candidate.kind == "training" and one.candidate.swept
        assert one.forward == (forward[one.candidate.layout] if trains else ())
    assert winner_of(found).layout == (64, True)
    assert dict(winner_of(found).options).items() >= dict(forward[64, True]).items()


def test_without_forward_options_a_layout_is_not_trained():
    def outcome_of(one):
        small = one.candidate.kind == "forward" and one.candidate.layout == (64, True)
        return Outcome(one.candidate, "failed", "no") if small else timed(one)

    found, tried = swept(outcome_of)
    trained = {t.candidate.layout for t in tried if t.candidate.kind == "training"}
    assert trained == {*LAYOUTS} - {(64, True)}
    kind, layout = "training", (64, True)
    left = [o for o in found if (o.candidate.kind, o.candidate.layout) == (kind, layout)]
    assert len(left) == 36 and {o.status for o in left} == {"failed"}
    assert left[0].reason == "no forward options run with blocks of 64 in one list"
    assert winner_of(found).layout == (64, False)


@pytest.mark.parametrize("missing", [None, "it is not installed"])
def test_flash_is_measured_where_it_is_installed(monkeypatch, missing):
    monkeypatch.setitem(PEERS, "FlashAttention 4", PEERS["FlashAttention 4"])
    monkeypatch.setattr(type(PEERS["FlashAttention 4"]), "missing", lambda peer: missing)
    found, _ = swept(timed, "--limit", "2")
    assert len(found) == 2 * (2 + (2 if missing is None else 1))
    assert (milliseconds(found, flash("training")) == 9.0) is (missing is None)
    found, _ = swept(timed, "--limit", "2", "--dtype", "fp32")
    assert milliseconds(found, flash("training")) is None


@pytest.mark.parametrize(("asked", "memory", "count"), [(4, 80e9, 4), (15, 30e9, 11), (4, 1e9, 1)])
def test_as_many_processes_as_fit_and_one_thread_in_each(monkeypatch, asked, memory, count):
    """Of slide256, with 12 tensors of 2 ** 26 numbers in 16 bits, and a context of 2 ** 30."""
    made = []

    def workers(count, *rest):
        made.append(count)
        return Workers(count, *rest)

    properties = SimpleNamespace(total_memory=int(memory))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(sweep, "Workers", workers)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "5")
    options = tune.read(["--problem", "tiny", "slide256", "--workers", str(asked)])
    with sweep.workers_for(options.problems, options):
        assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "5"
    assert made == [min(asked, max(1, int(memory // (12 * 2**26 * 2 + 2**30))))] == [count]


# The command.


@pytest.fixture
def gpu(monkeypatch):
    """All that the command asks of a GPU, but for its kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune.machine, "device_name", lambda device: "a GPU")

    def work_as(outcome_of):
        @contextmanager
        def workers_for(problems, options):
            yield FakeWorkers(outcome_of)

        monkeypatch.setattr(tune, "workers_for", workers_for)

    return work_as


def test_the_fastest_is_printed_recorded_and_merged(tmp_path, gpu, capsys):
    gpu(timed)
    record, table = tmp_path / "sweep.json", tmp_path / "table.json"
    table.write_text(text_of(merged(None, entry(257, flash=True))))
    asked = ["--problem", "slide256", "--json", str(record), "--table", str(table)]
    assert tune.main(asked) == 0

    options, at_128 = (
        dict(made_best("forward", layout).options + made_best("training", layout).options)
        for layout in ((64, True), (128, False))
    )
    assert options != at_128
    (new,) = json.loads(table.read_text())["entries"]
    assert new["problem"] == "slide256" and new["dtype"] == "bfloat16"
    assert (new["capability"], new["head_size"], new["reach"]) == ([9, 0], 64, 257)
    assert (new["block"], new["one_list"], new["options"]) == (64, True, options)
    assert new["torch"] == torch.__version__ and new["device"] == "a GPU"
    if PEERS["FlashAttention 4"].missing() is not None:
        assert new["flash"] is True  # as it was

    (part,) = json.loads(record.read_text())["problems"]
    assert len(part["outcomes"]) >= 2 * (52 + 180) + 2
    assert (part["winner"]["block"], part["winner"]["one_list"]) == (64, True)
    assert part["winner"]["options"] == options
    assert part["winner"]["forward_ms"] == 1.0 and part["winner"]["training_ms"] == 2.0
    shown = {(o["kind"], o["block"], len(o["options"])) for o in part["outcomes"]}
    assert ("forward", 64, 4) in shown and ("training", 128, 6) in shown

    printed = capsys.readouterr().out
    fastest = "blocks of 64 in one list, forward 1.00 ms (9.00x), training 2.00 ms (4.50x)"
    assert f"fastest: {fastest}" in printed
    assert str(options) in printed
    assert "to pass, in blocks of 128, forward 2.50 ms (3.60x), training 3.50 ms" in printed
    assert f"kernel_options={at_128}" in printed
    assert printed.count("  BLOCK_M=") == 10
    assert f"written to {table}" in printed


def test_an_entry_of_a_window_without_gaps_serves_others_with_one_list(tmp_path, gpu, capsys):
    gpu(timed)
    table = tmp_path / "table.json"
    assert tune.main(["--problem", "doc256", "--limit", "4", "--table", str(table)]) == 0
    (new,) = json.loads(table.read_text())["entries"]
    assert (new["reach"], new["one_list"]) == (512, True)


def test_a_table_is_left_alone_where_the_own_options_are_faster(tmp_path, gpu, capsys):
    def slow(one):
        return replace(timed(one), ms=10.0 if one.candidate.swept else 9.0)

    gpu(slow)
    table = tmp_path / "table.json"
    assert tune.main(["--limit", "2", "--table", str(table)]) == 0
    assert not table.exists()
    assert "FlexAttention's own options are faster" in capsys.readouterr().out


def test_without_a_winner_nothing_is_written(tmp_path, gpu, capsys):
    gpu(lambda one: Outcome(one.candidate, "wrong", "off: the output by nan", ms=None))
    table = tmp_path / "table.json"
    assert tune.main(["--limit", "2", "--table", str(table)]) == 1
    assert not table.exists()
    printed = capsys.readouterr().out
    assert "wrong (off: the output by nan)" in printed
    assert "there is no winner" in printed


def test_the_list_says_how_many_and_which(capsys):
    assert tune.main(["--list", "--problem", "slide256", "slide1k"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "candidates" in line] == [
        "forward: 104 candidates",
        "training: 360 candidates",
        "forward: 208 candidates",
        "training: 720 candidates",
    ]
    assert lines[0] == PROBLEMS["slide256"].label
    assert "  blocks of 64: BLOCK_M=32 BLOCK_N=64 num_warps=8 num_stages=3" in lines
    assert sum(line.startswith("  blocks of ") for line in lines) == 2 * (52 + 180 + 104 + 360)
    assert tune.main(["--list", "--limit", "3"]) == 0
    assert capsys.readouterr().out.count("\n  blocks of ") == 6
    part = ["--blocks", "64", "--tiles", "16", "64", "--warps", "2", "--stages", "1", "4"]
    assert tune.main(["--list", "--problem", "doc256", *part]) == 0
    listed = capsys.readouterr().out
    assert "forward: 8 candidates" in listed and "training: 18 candidates" in listed
    assert "  blocks of 64: BLOCK_M=16 BLOCK_N=64 num_warps=2 num_stages=4" in listed


def test_without_a_gpu_there_is_nothing_to_tune(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    said = capsys.readouterr().err
    assert "no GPU" in said and "--list" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--problem", "nothing"], "invalid choice: 'nothing'"),
        (["--limit", "0"], "must be 1 or more, got 0"),
        (["--stages", "2", "0"], "must be 1 or more, got 0"),
        (["--blocks", "64", "96"], "must divide 128, got 96"),
        (["--dtype", "fp32", "--ship"], "16-bit tensors, got fp32"),
        (["--table", "t.json", "--ship"], "not allowed with"),
        (["--table", "no/such/folder/t.json"], "must be in a folder that exists"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        tune.main(arguments)
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_a_shape_of_ones_own():
    options = tune.read(["--shape", "2", "3", "1024", "80", "--window", "100", "--ship"])
    (problem,) = options.problems
    assert problem.shape == (2, 3, 1024, 80)
    assert problem.window == Window(100, causal=True, exact=True)
    assert options.table == ROOT / "flexlocal" / "tuned.json"


@pytest.mark.gpu
def test_a_short_sweep_on_a_gpu(tmp_path):
    shape = ["--shape", "1", "2", "1024", "64", "--window", "128", "--causal", "--exact"]
    few = ["--limit", "2", "--workers", "2", "--seconds", "0.01"]
    record, table = tmp_path / "sweep.json", tmp_path / "table.json"
    files = ["--json", str(record), "--table", str(table)]
    command = [sys.executable, "-m", "profiling.tune", *shape, *few, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (part,) = json.loads(record.read_text())["problems"]
    outcomes = part["outcomes"]
    own = [o for o in outcomes if not o["options"]]
    assert [o["status"] for o in own] == ["measured"] * 2, own
    tried = [o for o in outcomes if o["options"] and "BACKEND" not in o["options"]]
    assert {(o["kind"], o["block"]) for o in tried} == {(k, b) for k in PASSES for b in BLOCKS}
    right = [o for o in tried if o["status"] == "measured"]
    assert len(right) >= 2 and all(o["ms"] > 0 and o["error"] < 2e-2 for o in right), tried
    assert not [o for o in tried if o["status"] == "wrong"], tried
    assert part["winner"]["block"] in BLOCKS
    if table.exists():  # FlexAttention's own options may be faster than two candidates
        (entry,) = json.loads(table.read_text())["entries"]
        assert entry["reach"] == 129 and entry["options"] == part["winner"]["options"]
    own_layout = part["winner"]["block"], part["winner"]["one_list"]
    assert "kernel_options=" in done.stdout or own_layout != (128, False)
