"""What every test shares: how long hypothesis may search, and how exact float32 is.

The profile is derandomised so that a failure in CI is the same failure at the desk; set
HYPOTHESIS_PROFILE=search for a longer, random hunt.
"""

import builtins
import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch._inductor import codecache
from torch.nn.attention import flex_attention

from flexlocal import decoding, dispatch
from flexlocal.flex import compile as compiling
from flexlocal.flex import support

settings.register_profile(
    "ci",
    deadline=None,  # the first call of a torch operator is slow, and says nothing
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "search",
    deadline=None,
    max_examples=1000,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def exact_float32():
    """float32 means float32: TF32 would hide errors four digits wide."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session", autouse=True)
def headers_of_fused_kernels():
    """Inductor precompiles the headers of a fused kernel too, not of any kernel alone."""
    with pytest.MonkeyPatch.context() as replacing:
        header = str(Path(__file__).with_name("fused_kernel.h"))
        replacing.setattr(
            codecache,
            "_get_cpp_prefix_header",
            lambda device: header if device.startswith("cpu") else None,
            raising=False,  # a torch without it only takes longer
        )
        yield


@pytest.fixture
def fresh_compiler():
    """Nothing is compiled, and nothing counted against a limit."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's own interpreter runs our kernels, on the CPU."""
    version = pytest.importorskip("triton").__version__
    if not version.startswith(("3.7.", "3.8.")):  # 3.6's fails with numpy 2.4
        pytest.skip(f"the interpreters of Triton 3.7 and 3.8 alone run the kernel, got {version}")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with patch.dict(sys.modules):
        for name in ("dense_kernel", "flash_tail"):
            sys.modules.pop(f"flexlocal.flex.{name}", None)  # is decorated for the GPU, if it is
        yield


@pytest.fixture
def dense_on_the_cpu(monkeypatch):
    """The flex path takes gradients on the CPU: FlexAttention's dense operators have them."""
    monkeypatch.setattr(support, "refusal", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.fixture
def graphs_without_code(monkeypatch):
    """Graphs are traced and then run as they are: what is asked is which ones there are."""
    compile_as_it_is = torch.compile

    def traced(function, **options):
        return compile_as_it_is(function, **{**options, "backend": "eager"})

    def forget():
        for kept in (compiling._compiled, decoding._compiled):
            kept.cache_clear()
        for known in (dispatch._PREPARED, decoding._CHECKED):
            known.clear()

    monkeypatch.setattr(torch, "compile", traced)
    forget()
    yield
    forget()


@pytest.fixture
def no_matplotlib(monkeypatch):
    """An environment in which matplotlib is not installed."""
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.fixture
def no_limit_is_hit():
    """torch raises where it would give up compiling, in any graph."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The tensors here are small: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
