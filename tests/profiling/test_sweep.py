"""The candidates, how one is tried, in which order, and in processes that may die."""

import os
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from compilers import needs_compiled_kernels_on_the_cpu

from flexlocal import Window, dispatch, local_attention
from flexlocal.flex import compile as flex
from flexlocal.flex import support, tuning
from flexlocal.flex.tuning import TABLE
from profiling import sweep, timing
from profiling.peers import REFERENCE
from profiling.problems import PROBLEMS, Problem, Task
from profiling.sweep import PASSES, SPACE, Trial, attempt, candidates, fastest

CPU = torch.device("cpu")
SLIDING, STANDING = Window(256, causal=True, exact=True), Window(256, causal=True)
KINDS = pytest.mark.parametrize("kind", PASSES)
HEADS = pytest.mark.parametrize("head_size", [16, 64, 128, 256])
PREFIX = {"forward": "fwd_", "training": "bwd_"}
TILES = {
    "forward": {"BLOCK_M", "BLOCK_N"},
    "training": {"BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"},
}
SMALL = Problem("small", 3, 4, 256, 16, Window(64, causal=True))
TASK = Task(SMALL, torch.float32, CPU, 0.001)


# Which candidates there are.


def usual(kind, head_size=64, window=SLIDING, n=1024, **space):
    return candidates(kind, Problem("some", 1, 2, n, head_size, window), {**SPACE, **space})


def layouts(trials):
    return {(trial.block, trial.one_list) for trial in trials}


@KINDS
@HEADS
def test_candidates_fulfil_the_conditions_of_the_kernels(kind, head_size):
    for trial in usual(kind, head_size):
        assert all(name.startswith(PREFIX[kind]) for name in trial.options)
        own = {name.removeprefix(PREFIX[kind]): x for name, x in trial.options.items()}
        tiles = {name: own.pop(name) for name in list(own) if name.startswith("BLOCK_")}
        assert set(tiles) == TILES[kind]
        assert 128 % trial.block == 0
        assert all(trial.block % size == 0 for size in tiles.values())
        if kind == "training":
            assert tiles["BLOCK_N1"] % tiles["BLOCK_M1"] == 0
            assert tiles["BLOCK_M2"] % tiles["BLOCK_N2"] == 0
        assert own.pop("num_warps") in (4, 8)
        assert own.pop("num_stages") in (2, 3)
        assert own in ([{}] if head_size < 128 else [{}, {"USE_TMA": True}])


@KINDS
@HEADS
def test_no_candidate_comes_twice_and_all_layouts_come(kind, head_size):
    found = usual(kind, head_size)
    assert len({trial.tuning for trial in found}) == len(found)
    assert layouts(found) == {(64, False), (64, True), (128, False), (128, True)}


@KINDS
def test_one_list_is_tried_where_two_have_gaps(kind):
    """Windows of whole blocks leave none, on a sequence of whole blocks."""
    assert layouts(usual(kind, window=STANDING)) == {(64, False), (128, False)}
    uneven = usual(kind, window=Window(64, causal=True))
    assert layouts(uneven) == {(64, False), (128, False), (128, True)}
    assert (64, True) in layouts(usual(kind, window=STANDING, n=1000))


def test_how_many_there_are():
    # Tiles in blocks of 64 and 128, by warps and stages: 2 ** 2 + 3 ** 2, and pairs in order.
    assert len(usual("forward", window=STANDING)) == 4 * (4 + 9)
    assert len(usual("training", window=STANDING)) == 4 * (3**2 + 6**2)
    for kind in PASSES:
        assert len(usual(kind)) == 2 * len(usual(kind, window=STANDING))
        assert len(usual(kind, 128)) == 2 * len(usual(kind))
    assert len(usual("forward", blocks=(64,), tiles=(64,), warps=(2,), stages=(1, 5))) == 4


@pytest.mark.parametrize(
    "entry", [e for e in TABLE if e.tuning.options], ids=lambda e: f"{e.head_size}-{e.reach}"
)
@KINDS
def test_what_is_shipped_is_among_them(entry, kind):
    shipped = entry.tuning
    options = {pair for pair in shipped.options if pair[0].startswith(PREFIX[kind])}
    found = usual(kind, entry.head_size, stages=(1, 2, 3, 4))
    every = [(trial.block, trial.one_list, set(trial.options.items())) for trial in found]
    assert (shipped.block, shipped.one_list, options) in every


def test_a_call_gets_sorted_options():
    """As ``flexlocal.flex.tuning`` keeps them, so that equal ones share a kernel."""
    made = usual("training", blocks=(64,))[-1].tuning
    assert (made.block, made.one_list) == (64, True)
    assert list(made.options) == sorted(made.options)


# How one is tried.


def try_on_cpu(monkeypatch, tmp_path, attend, kind="training"):
    monkeypatch.setattr(sweep, "attention", lambda problem, tuning: attend)
    return attempt(TASK, tmp_path / "lock", Trial(kind, 64, False, {}))


def right(q, k, v):
    return REFERENCE.attend(SMALL, CPU)(q, k, v)


@KINDS
def test_a_right_candidate_is_timed(monkeypatch, tmp_path, kind):
    trial = try_on_cpu(monkeypatch, tmp_path, right, kind)
    assert (trial.status, trial.reason) == ("measured", "")
    assert trial.error < 1e-5 and trial.ms > 0


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
    trial = try_on_cpu(monkeypatch, tmp_path, attend)
    assert trial.status == "wrong" and words in trial.reason
    assert trial.ms is None


def raising(q, k, v):
    raise RuntimeError("out of resource: shared memory\nand so on")


def test_a_candidate_that_raises_has_failed(monkeypatch, tmp_path):
    trial = try_on_cpu(monkeypatch, tmp_path, raising)
    assert trial.status == "failed" and trial.ms is None
    assert trial.reason == "RuntimeError: out of resource: shared memory"


def test_a_call_takes_the_tuning_that_is_tried(monkeypatch):
    """The public function by its flex path, with the candidate's sparse blocks and options."""
    seen = []

    def local_attention(q, k, v, window, backend):
        seen.append((window, backend, tuning.overridden()))
        return v

    monkeypatch.setattr(sweep, "local_attention", local_attention)
    one = Trial("forward", 64, True, {"fwd_num_warps": 8}).tuning
    sweep.attention(SMALL, one)(*torch.zeros(3, 1, 1, 2, 2))
    assert seen == [(SMALL.window, "flex", one)]
    assert tuning.overridden() is None


def test_an_overriding_tuning_is_what_the_kernel_gets(monkeypatch):
    """Also for calls whose like were made before, with the table's."""
    got = []

    def prepared(spec, inputs, engine):
        got.append(tuning.tuning_of(spec, inputs, engine == "flash by flex"))
        return lambda inputs: inputs.q

    monkeypatch.setattr(flex, "prepared", prepared)
    monkeypatch.setattr(dispatch, "_PREPARED", {})
    monkeypatch.setattr(support, "refusal", lambda *_: None)
    q, k, v = torch.zeros(3, 1, 2, 130, 8)
    one, other = (Trial("forward", 64, False, {"fwd_num_warps": warps}).tuning for warps in (4, 8))
    run = partial(local_attention, q, k, v, SMALL.window, backend="flex")
    run()
    for each in (one, other):
        with tuning.overriding(each):
            run()
    run()
    assert got == [tuning.STOCK, one, other]


def test_the_final_times_both_passes_of_those_that_are_right(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    made = {1: right, 2: wrong_gradient, 3: raising, 4: right}
    monkeypatch.setattr(sweep, "attention", lambda problem, tuning: made[tuning])
    found = sweep.in_the_end(TASK, {"a": 1, "wrong": 2, "raises": 3, "b": 4})
    names = {kind: list(rounds) for kind, rounds in found.items()}
    assert names == {"forward": ["a", "b"], "training": ["a", "b"]}
    assert all(len(rounds) == 3 for of_kind in found.values() for rounds in of_kind.values())


@pytest.mark.slow
@needs_compiled_kernels_on_the_cpu
def test_a_candidate_runs_the_fused_path(tmp_path):
    # Kernels of the CPU want as many columns in the block lists as there are blocks: all here.
    trial = attempt(TASK, tmp_path / "lock", Trial("forward", 128, False, {}))
    assert trial.status == "measured", trial.reason
    assert trial.error < 1e-5


# The order of a sweep.


def in_place_of_processes(monkeypatch, result_of):
    """Calls ``result_of`` in place of a GPU; returns what was tried."""
    tried = []

    def in_processes(work, jobs, count):
        tried.extend(jobs)
        return [(job, result_of(job)) for job in reversed(jobs)]

    monkeypatch.setattr(sweep, "in_processes", in_processes)
    return tried


def made_best(kind, layout):
    """The candidate that ``timed`` makes the fastest: the second of 64, the third of 128."""
    found = [trial for trial in usual(kind) if (trial.block, trial.one_list) == layout]
    return found[layout[0] // 64].options


def timed(trial):
    """64 beats 128, one list two."""
    best = made_best(trial.kind, (trial.block, trial.one_list)).items() <= trial.options.items()
    ms = trial.block / 64 + (0 if best else 1) + (0 if trial.one_list else 0.5)
    return replace(trial, status="measured", error=0.0, ms=ms)


LAYOUTS = [(64, False), (64, True), (128, False), (128, True)]


def swept():
    return list(sweep.sweep(PROBLEMS["slide256"], SPACE, 4, None))


def test_training_takes_the_fastest_forward_options_of_its_layout(monkeypatch):
    tried = in_place_of_processes(monkeypatch, timed)
    found = swept()
    assert len(found) == len(tried) == 2 * (52 + 180)
    forward = {layout: made_best("forward", layout) for layout in LAYOUTS}
    for one in tried:
        held = {name: x for name, x in one.options.items() if name.startswith("fwd_")}
        if one.kind == "training":
            assert held == forward[one.block, one.one_list]
    winner, *others = fastest(found, "training")
    assert (winner.block, winner.one_list) == (64, True)
    assert winner.options == {**forward[64, True], **made_best("training", (64, True))}
    assert [o.ms for o in others] == sorted(o.ms for o in others)


def test_without_forward_options_a_layout_is_not_trained(monkeypatch):
    def result_of(one):
        small = one.kind == "forward" and (one.block, one.one_list) == (64, True)
        return replace(one, status="failed") if small else timed(one)

    tried = in_place_of_processes(monkeypatch, result_of)
    winner = fastest(swept(), "training")[0]
    assert layouts(t for t in tried if t.kind == "training") == {*LAYOUTS} - {(64, True)}
    assert (winner.block, winner.one_list) == (64, False)


@pytest.mark.parametrize("status", ["wrong", "failed", "out of memory"])
def test_the_wrong_and_the_failed_never_win(status):
    bad = [Trial(kind, 64, False, {}, status, ms=0.1) for kind in PASSES]
    good = [Trial(kind, 128, False, {}, "measured", ms=2.0) for kind in PASSES]
    for kind, one in zip(PASSES, good, strict=True):
        assert fastest(bad, kind) == []
        assert fastest(bad + good, kind) == [one]


def test_a_lost_process_is_a_failed_candidate(monkeypatch):
    in_place_of_processes(monkeypatch, lambda trial: "no result within 240 s")
    assert {(t.status, t.reason) for t in swept()} == {("failed", "no result within 240 s")}


# The processes.


def job_of_a_process(job):
    if job == "die":
        os._exit(7)
    if job == "hang":
        time.sleep(1000)
    return job, os.getpid(), torch._inductor.config.compile_threads


@pytest.mark.slow
def test_each_job_has_a_process_of_its_own():
    """A thread each is left for compiling, since the other processes compile as well."""
    found = dict(sweep.in_processes(job_of_a_process, ["one", "two"], count=1, seconds=120))
    assert [found[job][0] for job in ("one", "two")] == ["one", "two"]
    assert len({found["one"][1], found["two"][1], os.getpid()}) == 3
    assert found["one"][2] == 1


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_costs_its_own_job_only():
    """The one that hangs has the only place until it is ended."""
    found = dict(sweep.in_processes(job_of_a_process, ["die", "hang", "one"], 1, seconds=15))
    assert found["die"] == "its process ended with exit code 7"
    assert found["hang"] == "no result within 15 s"
    assert found["one"][0] == "one"


def test_a_process_that_hangs_is_ended():
    # Less than its start takes.
    found = list(sweep.in_processes(job_of_a_process, ["one"], count=1, seconds=0.01))
    assert found == [("one", "no result within 0.01 s")]
