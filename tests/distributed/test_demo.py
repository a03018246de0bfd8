"""``python -m flexlocal demo --shard``."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flexlocal.cli import shard
from flexlocal.cli.main import main

ROOT = Path(__file__).parents[2]


def started(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_the_demo_of_two_processes_has_the_losses_of_one():
    done = started(2, "flexlocal", "demo", "--shard", "--steps", "3", "--window", "48")
    assert done.returncode == 0, done.stderr
    assert "[264, 264] tokens of each sequence" in done.stdout  # 11 windows of 48
    losses = re.findall(r"^ +\d+ +([\d.]+) +([\d.]+) ", done.stdout, re.MULTILINE)
    assert len(losses) == 2 and float(losses[1][0]) < float(losses[0][0])
    assert all(one == pytest.approx(float(other), abs=1e-4) for one, other in
               ((float(a), b) for a, b in losses))  # fmt: skip
    assert "the losses are equal: at most" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "argument --shard: processes are started by torchrun --nproc-per-node 2 -m flexlocal"),
        (["--seconds", "3"], "argument --seconds: not with --shard, which goes by --steps"),
    ],
)
def test_what_cannot_be_shared_is_said(arguments, said, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--shard", *arguments])
    assert ended.value.code == 2
    assert f"demo: error: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"), [("abacus", "must be cpu or cuda"), ("cuda", "0 GPUs are too few")]
)
def test_a_device_that_processes_cannot_have(name, said, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(shard.CannotRun, match=said):
        shard._device(name, 1)
