"""How the script counts compiles and tells what caused them."""

import json
from functools import partial

import pytest
import torch
from compilers import needs_compiled_kernels_on_the_cpu

from profiling import compiles, machine


def test_a_cause_is_told_in_the_compilers_words():
    @torch.compile(backend="eager")
    def times(x, factor):
        return x * factor

    def watched(*arguments):
        run = partial(times, *arguments)
        call = compiles.watch(run, torch.device("cpu"))
        return call["compiles"], call["causes"]

    torch.compiler.reset()
    assert watched(torch.ones(2), 1.5) == (1, [compiles.FIRST])
    size = "tensor 'x' size mismatch at index 0. expected 2, actual 3"
    assert watched(torch.ones(3), 1.5) == (1, [size])
    assert watched(torch.ones(4), 1.5) == (0, [])
    dtype = "tensor 'x' dtype mismatch. expected Float, actual Double"
    assert watched(torch.ones(3, dtype=torch.float64), 1.5) == (1, [dtype])


def test_layers_that_compile_are_counted_by_name(monkeypatch, tmp_path, capsys):
    """By a compiler that takes the graph as it is; the next test has kernels compiled."""
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cpu"))

    def layers_of(options):
        return [torch.compile(Sum(), backend="eager") for _ in range(options.layers)]

    class Sum(torch.nn.Module):
        def forward(self, q, k, v):
            return q + k + v

    monkeypatch.setattr(compiles, "layers_of", layers_of)
    file = tmp_path / "compiles.json"
    made = compiles.main(["--layers", "2", "--lengths", "8", "8", "--json", str(file)])
    assert [(call["name"], call["compiles"]) for call in made][2:] == [
        ("layer 0", 0),
        ("layer 1", 0),
    ]
    assert made[0]["causes"] == [compiles.FIRST] and made[0]["seconds"] > 0
    slow = sum(call["compiles"] > 0 for call in made)
    assert f"4 calls, of which {slow} compiled" in capsys.readouterr().out
    assert json.loads(file.read_text())["calls"] == made


@pytest.mark.slow
@needs_compiled_kernels_on_the_cpu
def test_compiles_are_counted(monkeypatch, tmp_path, capsys):
    """One layer at one length compiles once, and the second call nothing."""
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cpu"))
    file = tmp_path / "compiles.json"
    flags = ["--layers", "1", "--lengths", "256", "256"]
    first, second = compiles.main([*flags, "--json", str(file)])
    assert (first["compiles"], first["causes"]) == (1, [compiles.FIRST])
    assert (second["compiles"], second["causes"]) == (0, [])
    assert first["seconds"] > 0
    assert "2 calls, of which 1 compiled 1 graphs" in capsys.readouterr().out
    assert [call["compiles"] for call in json.loads(file.read_text())["calls"]] == [1, 0]
