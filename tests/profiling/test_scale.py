"""How the script measures growth with the length."""

import json

import pytest
import torch

from flexlocal import LocalAttention, Window
from flexlocal.masks import block_mask
from profiling import lengths, machine, scale

TINY = ["--window", "32", "--heads", "2", "--seconds", "0.001"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The same measurements with a GPU and without."""
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cpu"))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_growth_is_the_exponent(exponent):
    several = [2**power for power in range(6, 12)]
    values = [3.7 * length**exponent for length in several]
    assert lengths.growth(several, values) == pytest.approx(exponent, abs=1e-12)


def length(n, **known):
    """A measured length; what is not given ran out of memory."""
    unknown = dict.fromkeys(lengths.MEASURED)
    return lengths.Length(**unknown | {"n": n, "mask_bytes": 4 * n, "out_of_memory": False} | known)


def test_growth_is_taken_where_calls_are_long():
    """A constant at the short lengths is left out, and so are lengths without a figure."""
    several = [2**power for power in range(8)]
    rows = [length(n, forward_ms=max(16.0, n * n)) for n in several] + [length(2**8)]
    found = lengths.growths(rows)
    assert found["forward_ms"] == pytest.approx(2)
    assert found["mask_bytes"] == pytest.approx(1)
    assert "train_ms" not in found


def test_lengths_are_measured_and_written(tmp_path, capsys):
    file, plot = tmp_path / "scale.json", tmp_path / "scale.png"
    flags = [*TINY, "--least", "7", "--most", "9", "--json", str(file), "--plot", str(plot)]
    rows = scale.main([*flags, "--rotary"])
    assert [row.n for row in rows] == [128, 256, 512]
    for row in rows:
        assert row.forward_ms > 0
        assert row.train_ms > 0
        assert row.mask_ms > 0
        tensor = 2 * row.n * 64 * 4
        assert row.peak_bytes > 8 * tensor  # q, k, v, the output and the gradient of each
        assert row.per_token["peak_bytes"] == row.peak_bytes / row.n
        assert not row.out_of_memory
    record = json.loads(file.read_text())
    assert record["settings"]["window"]["size"] == 32
    assert [found["n"] for found in record["lengths"]] == [128, 256, 512]
    assert record["growth"]["peak_bytes"] == pytest.approx(1, abs=0.3)
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"n^{record['growth']['train_ms']:.2f}" in printed
    assert lengths.line(rows[0]) in printed


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
    mask = block_mask(Window(32, causal=True, exact=True), row.n, row.n)
    lists = ("kv", "full_kv", "q", "full_q")
    tensors = [
        getattr(mask, f"{name}_{kind}") for name in lists for kind in ("num_blocks", "indices")
    ]
    assert row.mask_bytes == sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_running_out_of_memory_is_reported(monkeypatch, capsys, error):
    usual = scale.median_ms

    def short(run, device, seconds):
        if run.__name__ == "train":
            raise error
        return usual(run, device, seconds)

    monkeypatch.setattr(scale, "median_ms", short)
    (row,) = scale.main([*TINY, "--least", "6", "--most", "6"])
    assert row.out_of_memory
    assert row.forward_ms > 0
    assert row.train_ms is None
    assert "out of memory" in capsys.readouterr().out


def test_other_errors_are_not_hidden(monkeypatch):
    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(scale, "median_ms", broken)
    with pytest.raises(RuntimeError, match="something else"):
        scale.main([*TINY, "--least", "6", "--most", "6"])
