"""Threads that call at once with nothing compiled, as DataParallel and servers do."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import pytest
import torch
from compilers import needs_compiled_kernels_on_the_cpu

from flexlocal import LocalAttention, Window, dispatch, local_attention
from flexlocal.flex import compile as compiling
from flexlocal.flex.threads import Gate

THREADS = 4


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    """Nothing is prepared, and nothing compiled."""
    monkeypatch.setattr(dispatch, "_PREPARED", {})
    monkeypatch.setattr(compiling, "_compiled", lru_cache(compiling._compiled.__wrapped__))


def at_once(work):
    """``work(number)`` in some threads that begin together; raises what they raise."""
    barrier = threading.Barrier(THREADS)

    def begin(number):
        barrier.wait(timeout=60)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


class FussyCompiler:
    """In the place of what is compiled: a first call of a shape must be alone."""

    def __init__(self):
        self.inside, self.together, self.seen, self.lock = 0, 0, set(), threading.Lock()

    def __call__(self, lists, q, *inputs):
        with self.lock:
            self.inside += 1
            cold = q.shape not in self.seen
            self.seen.add(q.shape)
            self.together = max(self.together, self.inside)
        alone = not cold or self.inside == 1
        time.sleep(0.02)
        alone = alone and (not cold or self.inside == 1)
        with self.lock:
            self.inside -= 1
        assert alone, "compiled while others ran"
        return q


def test_what_compiles_is_alone_and_what_is_compiled_is_not(monkeypatch):
    fussy = FussyCompiler()
    monkeypatch.setattr(compiling, "_compiled", lambda *_: fussy)

    def work(number):
        with torch.no_grad():
            for n in [16 * (1 + number), *range(16, 16 * 6, 16), *[16] * 5]:
                q = torch.randn(1, 2, n, 32)
                local_attention(q, q, q, Window(8, causal=True), backend="flex")

    at_once(work)
    assert fussy.together > 1


def test_a_failure_leaves_the_gate_open():
    gate = Gate()
    for way in (gate.alone, gate.together, gate.alone):
        with pytest.raises(ZeroDivisionError):
            way(lambda: 1 // 0)
        assert way(lambda: 3) == 3


@pytest.mark.slow
@needs_compiled_kernels_on_the_cpu
@pytest.mark.usefixtures("fresh_compiler")
def test_four_threads_with_cold_caches():
    """Two windows, and lengths that differ."""

    def work(number):
        layer = LocalAttention(8 + number // 3, causal=True, autopad=True, dropout=0.0)
        for n in (64 + number, 100) if number < 3 else (64, 64):
            q = torch.randn(1, 2, n, 32)
            with torch.no_grad():
                layer.backend = "flex"
                found = layer(q, q, q)
                layer.backend = "eager"
                torch.testing.assert_close(found, layer(q, q, q), rtol=1e-4, atol=1e-5)

    at_once(work)


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
def test_four_threads_train_on_a_gpu():
    def work(number):
        layer = LocalAttention(64 + number % 2, causal=True, autopad=True, dropout=0.0)
        q, k, v = (torch.randn(1, 2, 300 + number, 32, device="cuda") for _ in range(3))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        runs = []
        for backend in ("flex", "eager"):
            layer.backend = backend
            out = layer(*leaves)
            runs.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for fused, eager in zip(*runs, strict=True):
            torch.testing.assert_close(fused, eager, rtol=1e-3, atol=1e-3)

    at_once(work)
