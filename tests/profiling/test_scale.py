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


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_growth_is_the_exponent(exponent):
    several = [2**power for power in range(6, 12)]
    values = [3.7 * length**exponent for length in several]
    slope, error = scale.growth(several, values)
    assert slope == pytest.approx(exponent, abs=1e-12) and error < 1e-7


def length(n, **known):
    """A measured length; what is not given ran out of memory."""
    unknown = dict.fromkeys(scale.MEASURED)
    return {**unknown, "n": n, "mask_bytes": 4 * n, "out_of_memory": False, **known}


def test_growth_is_taken_where_calls_are_long():
    """A constant at the short lengths is left out, and so are lengths without a figure."""
    several = [2**power for power in range(8)]
    rows = [length(n, forward_ms=max(16.0, n * n)) for n in several] + [length(2**8)]
    found = scale.growths(rows)
    assert found["forward_ms"][0] == pytest.approx(2)
    assert found["mask_bytes"][0] == pytest.approx(1)
    assert "train_ms" not in found


def test_noise_is_said():
    """n^2.33 was printed of a busy machine, as if it were a result."""
    several = [2**power for power in range(6, 12)]
    steady = [length(n, forward_ms=n * 1.01 ** (n % 3)) for n in several]
    assert "noisy" not in scale.text(steady)
    jumps = (1, 1, 1, 1, 40, 20)
    noisy = [length(n, forward_ms=float(n * j)) for n, j in zip(several, jumps, strict=True)]
    assert scale.text(noisy).endswith("this machine was too noisy for the growth of: forward ms")
    assert "fewer than three lengths" in scale.text(steady[:2])


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
        assert scale.per_token(row, "peak_bytes") == row["peak_bytes"] / row["n"]
        assert scale.per_token(row, "train_ms") == pytest.approx(1e6 * row["train_ms"] / row["n"])
        assert not row["out_of_memory"]
    record = json.loads(file.read_text())
    assert record["settings"]["window"]["size"] == 32
    assert [found["n"] for found in record["lengths"]] == [128, 256, 512]
    assert record["growth"]["peak_bytes"] == pytest.approx(1, abs=0.3)
    printed = capsys.readouterr().out
    assert f"n^{record['growth']['train_ms']:.2f}" in printed
    assert scale.text(rows) in printed
    assert "| 128 | " in scale.markdown(record)


def test_the_tables_fit_a_terminal_of_80(monkeypatch):
    """With what a GPU measures, of long sequences, one of them without enough memory."""
    figures = {name: 1234.5 if name.endswith("_ms") else 12345678901 for name in scale.MEASURED}
    rows = [length(2**power, **figures) for power in range(18, 21)] + [
        length(2**21, out_of_memory=True)
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = scale.text(rows).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("2097152 ") for line in lines) == 2


def test_the_most_bytes_of_a_call_hold_its_arguments():
    def run():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        return torch.empty(3000, dtype=torch.uint8), torch.empty(2000, dtype=torch.uint8)

    assert scale.most_bytes(run, torch.device("cpu"), 70) == 5070


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
    usual = timing.median_ms

    def short(run, device, seconds):
        if getattr(run, "__name__", "") == "train":
            raise error
        return usual(run, device, seconds)

    monkeypatch.setattr(timing, "median_ms", short)
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
