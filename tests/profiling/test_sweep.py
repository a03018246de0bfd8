"""How a candidate is tried, in which order, and in processes that may die."""

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compilers import needs_compiled_kernels_on_the_cpu
from test_candidates import KINDS, candidate, usual

from flexlocal import Window, local_attention
from flexlocal.flex import compile as flex
from flexlocal.flex import support, tuning
from profiling import sweep, timing, tune
from profiling.candidates import Outcome, flash, stock, winner_of
from profiling.peers import PEERS, REFERENCE
from profiling.problems import PROBLEMS, Problem
from profiling.sweep import Final, Trial, attempt

CPU = torch.device("cpu")
SMALL = Problem("small", 3, 4, 256, 16, Window(64, causal=True))


def try_on_cpu(monkeypatch, tmp_path, attend, kind="training"):
    monkeypatch.setattr(sweep, "attention", lambda problem, tuning: attend)
    one = Trial(candidate(kind, 64, 4), SMALL, torch.float32, 0.001, tmp_path / "lock", device=CPU)
    return attempt(one)


def test_a_candidate_takes_the_forward_options_given_to_it(monkeypatch, tmp_path):
    seen = []

    def attention(problem, tuning):
        seen.append(tuning)
        return right

    monkeypatch.setattr(sweep, "attention", attention)
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


def test_a_call_takes_the_tuning_that_is_tried(monkeypatch):
    """The public function by its fused path, with the candidate's sparse blocks and options."""
    seen = []

    def local_attention(q, k, v, window, backend):
        seen.append((window, backend, tuning.overridden()))
        return v

    monkeypatch.setattr(sweep, "local_attention", local_attention)
    one = candidate("forward", 64, 8).tuning()
    sweep.attention(SMALL, one)(*torch.zeros(3, 1, 1, 2, 2))
    assert seen == [(SMALL.window, "flex", one)]
    assert tuning.overridden() is None


def test_an_overriding_tuning_is_what_the_kernel_gets(monkeypatch):
    """Also for calls whose like were made before, with the table's."""
    got = []

    def prepared(spec, inputs, flash):
        got.append(tuning.tuning_of(spec, inputs, flash))
        return lambda inputs: inputs.q

    monkeypatch.setattr(flex, "prepared", prepared)
    monkeypatch.setattr(support, "refusal", lambda *_: None)
    q, k, v = torch.zeros(3, 1, 2, 130, 8)
    one, other = (candidate("forward", 64, warps).tuning() for warps in (4, 8))
    run = partial(local_attention, q, k, v, SMALL.window, backend="flex")
    run()
    for each in (one, other):
        with tuning.overriding(each):
            run()
    run()
    assert got == [tuning.STOCK, one, other]


def test_the_final_times_both_passes_of_each_tuning_in_turns(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(sweep, "attention", lambda problem, tuning: right)
    one = Trial(stock("forward"), SMALL, torch.float32, 0.001, tmp_path / "lock", device=CPU)
    found = sweep.in_the_end(Final({"a": tuning.STOCK, "b": tuning.FLASH}, one))
    assert {kind: list(rounds) for kind, rounds in found.items()} == {
        "forward": ["a", "b"],
        "training": ["a", "b"],
    }
    assert all(len(rounds) == 3 for of_kind in found.values() for rounds in of_kind.values())


@pytest.mark.slow
@needs_compiled_kernels_on_the_cpu
def test_a_candidate_runs_the_fused_path(tmp_path):
    # Kernels of the CPU want as many columns in the block lists as there are blocks: all here.
    one = Trial(stock("forward"), SMALL, torch.float32, 0.001, tmp_path / "lock", device=CPU)
    outcome = attempt(one)
    assert outcome.status == "measured", outcome.reason
    assert outcome.error < 1e-5


# The order of a sweep.


def in_place_of_processes(outcome_of, tried):
    """Calls ``outcome_of`` in place of a GPU, and keeps what was tried."""

    def in_processes(work, jobs, count):
        tried.extend(jobs)
        return [(job, outcome_of(job)) for job in reversed(jobs)]

    return in_processes


@pytest.fixture
def swept(monkeypatch):
    def run(outcome_of, *arguments):
        tried = []
        monkeypatch.setattr(sweep, "in_processes", in_place_of_processes(outcome_of, tried))
        options = tune.read(["--problem", "slide256", *arguments])
        return list(sweep.sweep(options.problems[0], options, 4, Path("lock"))), tried

    return run


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


def test_training_takes_the_fastest_forward_options_of_its_layout(swept):
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


def test_without_forward_options_a_layout_is_not_trained(swept):
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
def test_flash_is_measured_where_it_is_installed(monkeypatch, swept, missing):
    monkeypatch.setitem(PEERS, "FlashAttention 4", PEERS["FlashAttention 4"])
    monkeypatch.setattr(type(PEERS["FlashAttention 4"]), "missing", lambda peer: missing)
    found, _ = swept(timed, "--limit", "2")
    assert len(found) == 2 * (2 + (2 if missing is None else 1))
    assert (flash("training") in {o.candidate for o in found}) is (missing is None)
    found, _ = swept(timed, "--limit", "2", "--dtype", "fp32")
    assert flash("training") not in {o.candidate for o in found}


def test_a_lost_process_is_a_failed_candidate(swept):
    found, _ = swept(lambda trial: "its process ended with status 7", "--limit", "1")
    assert {(o.status, o.reason) for o in found if o.candidate.kind == "forward"} == {
        ("failed", "its process ended with status 7")
    }


@pytest.mark.parametrize(("asked", "memory", "count"), [(4, 80e9, 4), (15, 30e9, 11), (4, 1e9, 1)])
def test_as_many_processes_as_fit(monkeypatch, asked, memory, count):
    """Of slide256, with 12 tensors of 2 ** 26 numbers in 16 bits, and a context of 2 ** 30."""
    properties = SimpleNamespace(total_memory=int(memory))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    options = tune.read(["--problem", "tiny", "slide256", "--workers", str(asked)])
    fit = max(1, int(memory // (12 * 2**26 * 2 + 2**30)))
    assert sweep.most_workers(options.problems, options) == min(asked, fit) == count


# The processes.


def job_of_a_process(job):
    threads = torch._inductor.config.compile_threads
    if job == "die":
        os._exit(6 + threads)
    return job, os.getpid(), threads


def test_a_process_that_dies_says_how():
    """A thread each is left for compiling, since the other processes compile as well."""
    found = list(sweep.in_processes(job_of_a_process, ["die"], count=1, seconds=120))
    assert found == [("die", "its process ended with status 7")]


@pytest.mark.slow
def test_a_process_that_dies_costs_its_own_job_only():
    found = dict(sweep.in_processes(job_of_a_process, ["one", "die", "two"], 1, seconds=120))
    assert found["die"] == "its process ended with status 7"
    assert [found[job][0] for job in ("one", "two")] == ["one", "two"]
    assert len({found["one"][1], found["two"][1], os.getpid()}) == 3


def test_a_process_that_hangs_is_ended():
    # Less than its start takes.
    found = list(sweep.in_processes(job_of_a_process, ["one"], count=1, seconds=0.01))
    assert found == [("one", "no result within 0.01 s")]
