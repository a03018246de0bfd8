"""How a candidate is tried: a right one is timed; one that is wrong or raises is not."""

from dataclasses import replace

import pytest
import torch
from test_candidates import KINDS, candidate

from flexlocal import Window
from profiling import conditions, trial
from profiling.candidates import stock
from profiling.peers import REFERENCE
from profiling.problems import Problem
from profiling.trial import Trial, attempt

CPU = torch.device("cpu")
SMALL = Problem("small", 3, 4, 256, 16, Window(64, causal=True))


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
