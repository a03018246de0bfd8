"""How the script measures growth with the length."""

import json

import pytest
import torch

from flexlocal import LocalAttention, Window
from flexlocal.masks import block_mask
from profiling import machine, scale, timing

TINY = ["--window", "32", "--heads", "2", "--seconds", "0.001"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The same measurements with a GPU and without."""
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(timing, "ROUNDS", 3)


def length(n, **known):
    """A measured length; what is not given ran out of memory."""
    unknown = dict.fromkeys(scale.MEASURED)
    return {**unknown, "n": n, "mask_bytes": 4 * n, "out_of_memory": False, **known}


def test_noise_is_said():
    """n^2.33 was printed of a busy machine, as if it were a result."""
    steady = length(64, forward_ms=1.0, rounds={"forward_ms": [1.0, 1.01, 1.02]})
    assert "noisy" not in scale.text([steady])
    noisy = length(128, forward_ms=2.0, rounds={"forward_ms": [1.0, 2.0, 3.0]})
    said = "this machine was too noisy for forward_ms at 128 tokens"
    assert scale.text([steady, noisy]).endswith(said)


def test_lengths_are_measured_and_written(tmp_path, capsys):
    file = tmp_path / "scale.json"
    rows = scale.main([*TINY, "--least", "7", "--most", "9", "--json", str(file), "--rotary"])
    assert [row["n"] for row in rows] == [128, 256, 512]
    for row in rows:
        assert row["forward_ms"] > 0
        assert row["train_ms"] > 0
        assert row["mask_ms"] > 0
        tensor = 2 * row["n"] * 64 * 4
        assert row["peak_bytes"] > 8 * tensor  # q, k, v, the output and the gradient of each
        assert not row["out_of_memory"]
    record = json.loads(file.read_text())
    assert record["settings"]["window"]["size"] == 32
    assert [found["n"] for found in record["lengths"]] == [128, 256, 512]
    printed = capsys.readouterr().out
    assert scale.text(rows) in printed
    row = length(200, forward_ms=1.0, train_ms=3.0, kernels_ms=2.0, peak_bytes=4 * 10**9)
    table = scale.markdown({"lengths": [row]})
    assert table.endswith("| 200 | 1.00 | 3.00 | 15000 | 10000 | 4.00 | 20000000 |")


def test_the_table_fits_a_terminal_of_80(monkeypatch):
    """With what a GPU measures, of long sequences, one of them without enough memory."""
    figures = {name: 1234.5 if name.endswith("_ms") else 12345678901 for name in scale.MEASURED}
    rows = [length(2**power, **figures) for power in range(18, 21)] + [
        length(2**21, out_of_memory=True)
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = scale.text(rows).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("2097152 ") for line in lines) == 1
    assert lines[-1] == "out of memory at 2097152 tokens"


def test_the_most_bytes_of_a_call_hold_its_arguments():
    def run():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        return torch.empty(3000, dtype=torch.uint8), torch.empty(2000, dtype=torch.uint8)

    assert timing.peak_bytes(run, torch.device("cpu"), 70) == 5070


def test_a_wrong_result_is_not_measured(monkeypatch):
    right = LocalAttention.forward

    def off(layer, *args, **more):
        out = right(layer, *args, **more)
        return out if layer.backend == "eager" else 1.01 * out

    monkeypatch.setattr(LocalAttention, "forward", off)
    with pytest.raises(SystemExit, match="the result is wrong: off: the output by 1.0e-02"):
        scale.main([*TINY, "--least", "6", "--most", "6"])


def test_bytes_of_the_mask_are_those_of_its_lists():
    (row,) = scale.main([*TINY, "--least", "9", "--most", "9"])
    mask = block_mask(Window(32, causal=True, exact=True), row["n"], row["n"])
    lists = ("kv", "full_kv", "q", "full_q")
    tensors = [
        getattr(mask, f"{name}_{kind}") for name in lists for kind in ("num_blocks", "indices")
    ]
    assert row["mask_bytes"] == sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_running_out_of_memory_is_reported(monkeypatch, capsys, error):
    def short():
        raise error

    monkeypatch.setattr(scale, "training_of", lambda layer, tensors: short)
    (row,) = scale.main([*TINY, "--least", "6", "--most", "6"])
    assert row["out_of_memory"]
    assert row["forward_ms"] > 0
    assert row["train_ms"] is None
    assert "out of memory" in capsys.readouterr().out


def test_other_errors_are_not_hidden(monkeypatch):
    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(timing, "median_ms", broken)
    with pytest.raises(RuntimeError, match="something else"):
        scale.main([*TINY, "--least", "6", "--most", "6"])
