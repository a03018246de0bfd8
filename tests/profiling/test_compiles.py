"""How the script counts compiles and tells what caused them."""

import json
import logging

import torch
from compilers import needs_compiled_kernels_on_the_cpu

from profiling import compiles, machine


def test_guards_are_told_without_the_code_they_stand_in():
    message = """Recompiling function f in here.py:6
    triggered by the following guard failure(s):
    - 0/1: n == 1.5                               # def f(x, n): return x * n  # here.py:7 in f
    - User stack trace:
    -     def f(x, n): return x * n
    - 0/0: tensor 'x' dtype mismatch. expected Float, actual Double
    - 0/0: tensor 'x' dtype mismatch. expected Float, actual Double"""
    dtype = "tensor 'x' dtype mismatch. expected Float, actual Double"
    assert compiles.guards(message) == ["n == 1.5", dtype]


def test_a_cause_is_told_in_the_compilers_words(capfd):
    """Told, instead of printed, and only while it is asked for."""

    @torch.compile(backend="eager")
    def times(x, factor):
        return x * factor

    torch.compiler.reset()
    with compiles.recompile_causes() as causes:
        times(torch.ones(2), 1.5)
        assert causes == []
        times(torch.ones(3), 1.5)
        assert causes == ["tensor 'x' size mismatch at index 0. expected 2, actual 3"]
        causes.clear()
        times(torch.ones(3, dtype=torch.float64), 1.5)
        assert "tensor 'x' dtype mismatch. expected Float, actual Double" in causes
    collected = list(causes)
    times(torch.ones(3, 1), 1.5)
    assert causes == collected
    assert "Recompiling" not in capfd.readouterr().err
    assert not logging.getLogger("torch._dynamo.guards.__recompiles").filters


@needs_compiled_kernels_on_the_cpu
def test_compiles_are_counted(monkeypatch, tmp_path, capsys):
    """One layer at one length compiles once, and the second call nothing."""
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cpu"))
    file = tmp_path / "compiles.json"
    flags = ["--layers", "1", "--lengths", "256", "256", "--heads", "2", "--dim", "16"]
    first, second = compiles.main([*flags, "--dtypes", "fp32", "--json", str(file)])
    assert (first.compiles, first.causes) == (1, (compiles.FIRST,))
    assert (second.compiles, second.causes) == (0, ())
    assert first.seconds > 0
    assert "2 calls, of which 1 compiled 1 graphs" in capsys.readouterr().out
    assert [call["compiles"] for call in json.loads(file.read_text())["calls"]] == [1, 0]
