"""The sweep: candidates fit the kernels, wrong ones never win, and the table is what is read."""

import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexlocal import Window, tuning
from flexlocal.tuning import FLASH, STOCK_BLOCK, TABLE
from profiling import conditions, sweep, trial, tune
from profiling.candidates import (
    PASSES,
    Candidate,
    Outcome,
    Space,
    candidates,
    counted,
    flash,
    flash_is_faster,
    milliseconds,
    ranked,
    spread,
    stock,
    winner_of,
)
from profiling.peers import PEERS, REFERENCE
from profiling.problems import PROBLEMS, Problem
from profiling.trial import Trial, attempt
from profiling.tuned_table import SHIPPED, merged, old_flash, read_table, text_of
from profiling.workers import Workers

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = Problem("small", 3, 4, 256, 16, Window(64, causal=True))
BLOCKS = Space().blocks
SLIDING, STANDING = Window(256, causal=True, exact=True), Window(256, causal=True)
KINDS = pytest.mark.parametrize("kind", PASSES)
HEADS = pytest.mark.parametrize("head_size", [16, 64, 128, 256])


# Which candidates there are.


def usual(kind, head_size=64, window=SLIDING, **space):
    problem = Problem("some", 1, 2, 1024, head_size, window)
    return candidates(kind, problem, Space(**space))


@KINDS
@HEADS
def test_candidates_fulfil_the_conditions_of_the_kernels(kind, head_size):
    prefix = {"forward": "fwd_", "training": "bwd_"}[kind]
    for candidate in usual(kind, head_size):
        options = dict(candidate.options)
        assert len(options) == len(candidate.options)
        assert all(name.startswith(prefix) for name in options)
        own = {name.removeprefix(prefix): value for name, value in options.items()}
        tiles = {name: own.pop(name) for name in list(own) if name.startswith("BLOCK_")}
        assert set(tiles) == ({"BLOCK_M", "BLOCK_N"} if kind == "forward" else BACKWARD_TILES)
        block, _ = candidate.layout
        assert STOCK_BLOCK % block == 0
        assert all(block % size == 0 for size in tiles.values())
        if kind == "training":
            assert tiles["BLOCK_N1"] % tiles["BLOCK_M1"] == 0
            assert tiles["BLOCK_M2"] % tiles["BLOCK_N2"] == 0
        assert own.pop("num_warps") in (4, 8)
        assert own.pop("num_stages") in (2, 3)
        assert own in ([{}] if head_size < 128 else [{}, {"USE_TMA": True}])
        assert candidate.swept


BACKWARD_TILES = {"BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"}


@KINDS
@HEADS
def test_no_candidate_comes_twice_and_all_layouts_come(kind, head_size):
    found = usual(kind, head_size)
    assert len({(c.layout, frozenset(c.options)) for c in found}) == len(found)
    assert {c.layout for c in found} == {(64, False), (64, True), (128, False), (128, True)}


@KINDS
def test_one_list_is_tried_where_two_have_gaps(kind):
    """Windows of whole blocks leave none, on a sequence of whole blocks."""
    assert {c.layout for c in usual(kind, window=STANDING)} == {(64, False), (128, False)}
    uneven = usual(kind, window=Window(64, causal=True))
    assert {c.layout for c in uneven} == {(64, False), (128, False), (128, True)}
    ragged = candidates(kind, Problem("some", 1, 2, 1000, 64, STANDING), Space())
    assert (64, True) in {c.layout for c in ragged}


def test_how_many_there_are():
    # Tiles in blocks of 64 and 128, by warps and stages: 2 ** 2 + 3 ** 2, and pairs in order.
    assert len(usual("forward", window=STANDING)) == 4 * (4 + 9)
    assert len(usual("training", window=STANDING)) == 4 * (3**2 + 6**2)
    for kind in PASSES:
        assert len(usual(kind)) == 2 * len(usual(kind, window=STANDING))
        assert len(usual(kind, 128)) == 2 * len(usual(kind))
    assert len(usual("forward", blocks=(64,), tiles=(64,), warps=(2,), stages=(1, 5))) == 4


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: f"{e.head_size}-{e.reach}")
@KINDS
def test_what_is_shipped_is_among_them(entry, kind):
    prefix = {"forward": "fwd_", "training": "bwd_"}[kind]
    options = {pair for pair in entry.tuning.options if pair[0].startswith(prefix)}
    found = usual(kind, entry.head_size, stages=(1, 2, 3, 4))
    layout = entry.tuning.block, entry.tuning.one_list
    assert (layout, options) in [(c.layout, set(c.options)) for c in found]


@pytest.mark.parametrize("count", [1, 2, 10, 52])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 60, None])
def test_a_limit_spreads(count, limit):
    found = spread(list(range(count)), limit)
    assert len(found) == min(count, limit or count)
    assert found[0] == 0
    if len(found) > 1:
        assert found[-1] == count - 1
        steps = {b - a for a, b in zip(found, found[1:], strict=False)}
        assert min(steps) >= 1 and max(steps) - min(steps) <= 1


def test_a_call_gets_sorted_options():
    """As ``flexlocal.tuning`` keeps them, so that equal ones share a kernel."""
    backward = usual("training", blocks=(64,))[-1]
    forward = usual("forward")[0].options
    made = backward.tuning(forward)
    assert (made.block, made.one_list) == (64, True)
    assert list(made.options) == sorted({*backward.options, *forward})
    assert flash("training").tuning() == FLASH
    assert stock("forward").tuning() == tuning.STOCK


# Which one wins.


def candidate(kind, block, warps):
    prefix = {"forward": "fwd_", "training": "bwd_"}[kind]
    return Candidate(kind, (block, False), ((f"{prefix}num_warps", warps),))


def measured(kind, block, ms, warps=4):
    return Outcome(candidate(kind, block, warps), "measured", error=0.0, ms=ms)


def test_the_least_sum_over_a_block_wins():
    """The fastest forward pass does not, where its block is slow backward; nor in between."""
    outcomes = [
        measured("forward", 64, 2.0, 4),
        measured("forward", 64, 1.5, 8),
        measured("forward", 128, 1.0, 4),
        measured("training", 64, 5.0, 8),
        measured("training", 64, 4.0, 4),
        measured("training", 128, 4.5, 4),
    ]
    for _ in range(5):
        random.shuffle(outcomes)
        winner = winner_of(outcomes)
        assert winner.layout == (64, False)
        assert dict(winner.options) == {"fwd_num_warps": 8, "bwd_num_warps": 4}
        assert (winner.forward_ms, winner.training_ms) == (1.5, 4.0)
    other = winner_of(outcomes, [(128, False)])
    assert (other.layout[0], other.forward_ms, other.training_ms) == (128, 1.0, 4.5)


@pytest.mark.parametrize("status", ["wrong", "failed", "out of memory"])
def test_the_wrong_and_the_failed_never_win(status):
    bad = [
        replace(measured(kind, block, 0.1, 8), status=status) for kind in PASSES for block in BLOCKS
    ]
    assert winner_of(bad) is None
    good = [measured("forward", 128, 2.0), measured("training", 128, 5.0)]
    winner = winner_of(bad + good)
    assert (winner.layout[0], winner.forward_ms, winner.training_ms) == (128, 2.0, 5.0)
    assert all(o.status == "measured" for kind in PASSES for o in ranked(bad + good, kind))


def test_what_is_measured_beside_the_sweep_never_wins():
    beside = [Outcome(each(kind), "measured", ms=0.1) for each in (stock, flash) for kind in PASSES]
    assert winner_of(beside) is None
    good = [measured("forward", 64, 2.0), measured("training", 64, 5.0)]
    assert winner_of(beside + good).forward_ms == 2.0


def test_both_passes_must_have_run_in_a_block():
    assert winner_of([measured("forward", 64, 1.0), measured("training", 128, 1.0)]) is None


@pytest.mark.parametrize(
    ("forward", "training", "faster"),
    [(0.9, 4.9, True), (1.1, 4.9, False), (0.9, 5.1, False), (None, 4.9, False)],
)
def test_flash_must_be_faster_in_both_passes(forward, training, faster):
    outcomes = [measured("forward", 128, 1.0), measured("training", 128, 5.0)]
    for kind, ms in zip(PASSES, (forward, training), strict=True):
        status = "failed" if ms is None else "measured"
        outcomes.append(Outcome(flash(kind), status, ms=ms))
    assert flash_is_faster(outcomes, winner_of(outcomes)) is faster
    assert not flash_is_faster(outcomes[:2], winner_of(outcomes))


def test_those_that_were_not_measured_are_counted():
    one = candidate("forward", 64, 4)
    outcomes = [Outcome(one, "failed", reason) for reason in ("no room", "no room", "other")]
    outcomes += [Outcome(one, "wrong", "off by 1"), measured("forward", 64, 1.0)]
    assert counted(outcomes) == "3 failed (no room), 1 wrong (off by 1), 1 measured"


# How a candidate is tried.


def try_on_cpu(monkeypatch, tmp_path, attend, kind="training"):
    monkeypatch.setattr(trial, "attention", lambda problem, tuning, device: attend)
    one = Trial(candidate(kind, 64, 4), SMALL, torch.float32, 0.001, tmp_path / "lock", device=CPU)
    return attempt(one)


def test_a_candidate_takes_the_forward_options_given_to_it(monkeypatch, tmp_path):
    seen = []

    def attention(problem, tuning, device):
        seen.append(tuning)
        return right

    monkeypatch.setattr(trial, "attention", attention)
    backward, forward = candidate("training", 64, 4), candidate("forward", 64, 8)
    one = Trial(backward, SMALL, torch.float32, 0.001, tmp_path / "lock", forward.options, CPU)
    assert attempt(one).status == "measured"
    assert [(t.block, t.one_list, dict(t.options)) for t in seen] == [
        (64, False, {"fwd_num_warps": 8, "bwd_num_warps": 4})
    ]


def right(q, k, v):
    return REFERENCE.attend(SMALL, CPU)(q, k, v)


@KINDS
def test_a_right_candidate_is_timed(monkeypatch, tmp_path, kind):
    outcome = try_on_cpu(monkeypatch, tmp_path, right, kind)
    assert (outcome.status, outcome.reason) == ("measured", "")
    assert outcome.error < 1e-5 and outcome.ms > 0 and outcome.first_s > 0


def wrong_output(q, k, v):
    return 1.01 * right(q, k, v)


def wrong_gradient(q, k, v):
    return right(q, 2 * k - k.detach(), v)


def wrong_last_head(q, k, v):
    out = right(q, k, v)
    return torch.cat([out[:, :-1], 2 * out[:, -1:]], dim=1)


def nan_in_the_last_batch_entry(q, k, v):
    out = right(q, k, v)
    return torch.cat([out[:-1], out[-1:] * float("nan")])


@pytest.mark.parametrize(
    ("attend", "words"),
    [
        (wrong_output, "the output by 1.0e-02"),
        (wrong_gradient, "the gradient of k by 1.0e+00"),
        (wrong_last_head, "the output by"),
        (nan_in_the_last_batch_entry, "the output by nan"),
    ],
)
def test_a_wrong_candidate_is_not_timed(monkeypatch, tmp_path, attend, words):
    outcome = try_on_cpu(monkeypatch, tmp_path, attend)
    assert outcome.status == "wrong" and words in outcome.reason
    assert outcome.ms is None


def test_a_candidate_that_raises_has_failed(monkeypatch, tmp_path):
    def attend(q, k, v):
        raise RuntimeError("out of resource: shared memory\nand so on")

    outcome = try_on_cpu(monkeypatch, tmp_path, attend)
    assert outcome.status == "failed" and outcome.ms is None
    assert outcome.reason == "RuntimeError: out of resource: shared memory"


@pytest.mark.skipif(
    conditions.fused_path(SMALL, torch.float32, CPU) is not None,
    reason=str(conditions.fused_path(SMALL, torch.float32, CPU)),
)
def test_each_candidate_runs_a_fused_path_of_its_own(tmp_path):
    """The second would be wrong if it were served what was compiled for the first."""
    # Kernels of the CPU want as many columns in the block lists as there are blocks: all here.
    for size in (64, 32):
        problem = replace(SMALL, window=Window(size, causal=True))
        one = Trial(stock("forward"), problem, torch.float32, 0.001, tmp_path / "lock", device=CPU)
        outcome = attempt(one)
        assert outcome.status == "measured", outcome.reason
        assert outcome.error < 1e-5


# Processes.


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


# The table.


def entry(reach=257, flash=False, capability=(9, 0), head_size=64, **more):
    numbers = {"capability": list(capability), "head_size": head_size, "reach": reach}
    options = {"fwd_BLOCK_M": 64, "bwd_num_warps": 4, "bwd_USE_TMA": True}
    where = {"device": "a GPU", "torch": "2.11.0"}
    return {
        "problem": "p",
        **numbers,
        "block": 64,
        "one_list": True,
        "flash": flash,
        **where,
        "options": options,
    } | more


def test_an_entry_is_added_replaced_and_the_others_stay():
    first, second = entry(257), entry(1025)
    table = merged(merged(None, first), second)
    assert table["entries"] == [first, second]
    assert (table["device"], table["torch"]) == ("a GPU", "2.11.0")
    better = entry(257, block=128, device="another GPU")
    again = merged(table, better)
    assert again["entries"] == [better, second]
    assert again["device"] == "a GPU"
    assert table["entries"] == [first, second]  # as it was
    for other in (entry(258), entry(capability=(10, 0)), entry(head_size=128)):
        assert merged(table, other)["entries"] == [first, second, other]


def test_a_table_is_read_by_flexlocal(tmp_path, monkeypatch):
    table = merged(read_table(SHIPPED), entry(999, flash=True, capability=(10, 3)))
    (tmp_path / "tuned.json").write_text(text_of(table))
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    *others, last = tuning._table()
    assert tuple(others) == TABLE
    assert (last.capability, last.head_size, last.reach, last.flash) == ((10, 3), 64, 999, True)
    assert (last.tuning.block, last.tuning.one_list) == (64, True)
    assert last.tuning.options == (("bwd_USE_TMA", True), ("bwd_num_warps", 4), ("fwd_BLOCK_M", 64))


def test_the_text_of_a_table_is_its_json():
    for table in (json.loads(SHIPPED.read_text()), merged(None, entry())):
        assert json.loads(text_of(table)) == table
        assert len(text_of(table).splitlines()) < 8 + 10 * len(table["entries"])


def test_what_a_table_knew_of_flash():
    table = merged(merged(None, entry(257, flash=True)), entry(1025))
    assert old_flash(table, entry(257)) is True
    assert old_flash(table, entry(1025)) is False
    assert old_flash(table, entry(4097)) is False
    assert old_flash(None, entry(257)) is False


def test_a_missing_file_is_no_table(tmp_path):
    assert read_table(tmp_path / "none.json") is None


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
        (["--shape", "1", "2", "100", "64"], "N must be 128 or more"),
        (["--window", "0"], "window_size must be"),
        (["--dtype", "fp32", "--ship"], "16-bit tensors, got fp32"),
        (["--table", "t.json", "--ship"], "not allowed with"),
        (["--table", "no/such/folder/t.json"], "there is no folder no/such/folder"),
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
