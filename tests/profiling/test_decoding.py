"""The script that times a step of decoding: what it compares, and what it prints."""

import json

import pytest
import torch

from profiling import decoding

SMALL = ["--batch", "2", "--heads", "4", "--kv-heads", "2", "--head-size", "16", "--window", "24"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(decoding.machine, "default_device", lambda: torch.device("cpu"))


@pytest.fixture
def at_once(monkeypatch):
    """Nothing is timed: each call is made once, and taken for a millisecond."""

    def one_call(run, *_):
        run()
        return 1.0

    monkeypatch.setattr(decoding, "median_ms", one_call)


@pytest.mark.usefixtures("at_once")
def test_it_prints_and_keeps_every_cache(capsys, tmp_path):
    file = tmp_path / "run.json"
    assert decoding.main([*SMALL, "--prompt", "50", "--piece", "20", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    names = {"flexlocal", "by hand", "Transformers, dynamic", "Transformers, static"}
    assert set(record["host"]) == names
    assert set(record["prompt"]) == {"in pieces", "in one"}
    assert record["settings"]["window"] == 24
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert "1.00x (1.00-1.00)" in printed


def test_a_wrong_step_ends_it(monkeypatch):
    monkeypatch.setattr(decoding, "ours", lambda k, v, **_: lambda q, k, v: torch.zeros_like(q))
    with pytest.raises(SystemExit, match="not timed, flexlocal is wrong"):
        decoding.main(SMALL)
