"""The script times whole models, and none whose result is wrong."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="the script times its models")

from flexlocal.integrations.transformers import mask, unregister  # noqa: E402
from profiling import machine  # noqa: E402
from profiling import transformers_models as script


@pytest.fixture
def small(monkeypatch):
    """One tiny model on the CPU, by the two implementations that train there."""
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cpu"))
    kept = {name: script.IMPLEMENTATIONS[name] for name in (script.OURS, "sdpa")}
    monkeypatch.setattr(script, "IMPLEMENTATIONS", kept)
    yield ["--tiny", "--model", "Mistral-like", "--seconds", "0.001"]
    unregister()


def test_a_model_is_timed_by_each_implementation(small, tmp_path, capsys):
    file = tmp_path / "run.json"
    assert script.main([*small, "--json", str(file)]) == 0
    (model,) = json.loads(file.read_text())["models"]
    assert [row["implementation"] for row in model["rows"]] == [script.OURS, "sdpa"]
    assert all(row["ms"] > 0 and len(row["rounds"]) == 7 for row in model["rows"])
    assert model["rows"][1]["off"] == 0 and model["rows"][0]["off"] < 0.2
    assert "a mask for 131072 tokens" in capsys.readouterr().out


def test_packed_rows_are_timed(small, monkeypatch, capsys):
    told, step_of = [], script.step_of
    monkeypatch.setattr(
        script,
        "step_of",
        lambda name, model, given: told.append(given) or step_of(name, model, given),
    )
    assert script.main([*small, "--packed"]) == 0
    for given in told:
        assert given["position_ids"][0].eq(0).nonzero()[:, 0].tolist() == (
            given["cu_seq_lens_q"][:-1].tolist()
        )
        assert len(given["cu_seq_lens_q"]) > 3
    assert {given["input_ids"].shape for given in told} == {(1, 96), (1, 128)}


def test_a_wrong_result_is_not_timed(small, monkeypatch, capsys):
    real = mask._window
    monkeypatch.setattr(
        mask, "_window", lambda config, size, causal: real(config, 2 * size, causal)
    )
    assert script.main(small) == 1
    ours = next(line for line in capsys.readouterr().out.splitlines() if line[:9] == "flexlocal")
    assert "1 x 128" in ours and ours.split()[4] == "-"


def test_an_implementation_that_is_missing_is_left_out_with_the_reason():
    rows = [
        {
            "shape": (1, 8),
            "implementation": script.OURS,
            "off": 0.1,
            "ms": 2.0,
            "rounds": [2.0] * 7,
        },
        {"shape": (1, 8), "implementation": "other", "off": "no GPU", "ms": None, "rounds": None},
    ]
    *_, ours, other = script.text(rows).splitlines()
    assert ours.split()[-4:] == ["2.00", "1.00x", "(1.00-1.00)", "0.10"]
    assert other.split() == ["other", "1", "x", "8", "-", "-", "no", "GPU"]


def test_the_table_fits_80_columns_of_a_pipe():
    rows = [
        {"implementation": name, "shape": (1, 16384), "ms": 123.4, "off": off, "rounds": [1.0, 1.2]}
        for name, off in (
            (script.OURS, 0.31),
            ("FlashAttention 4", "RuntimeError: some words " * 9),
        )
    ]
    text = script.text(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("words") == 9
