"""What can run on this machine, why the rest cannot, and what to install for it.

``python -m flexlocal doctor`` prints the table; with ``--run`` it tries each path that should
work on a small problem and compares it with the eager path in float64 on the CPU.
"""

import importlib.metadata
import platform
import shutil
import time

import torch

from .. import LocalAttention, __version__
from ..flex import flash
from ..spec import BackendName
from ..torch_limits.kernels import cpp_compiler, unavailable

Row = tuple[str, str]

# distribution, what it is for, the command that brings it
EXTRAS = (
    ("matplotlib", "pictures of masks", "pip install 'flexlocal[inspect]'"),
    ("tensorboard", "profiles in the browser", "pip install 'flexlocal[profile]'"),
    ("torch-tb-profiler", "its plugin for profiles", "pip install 'flexlocal[profile]'"),
    ("transformers", "its models on flexlocal", "pip install 'flexlocal[transformers]'"),
    ("flash-attn-4", "FlashAttention 4's kernels", "pip install 'flexlocal[flash]'"),
)


def report() -> list[Row]:
    """The rows of the table: what, and what was found."""
    compiler = cpp_compiler()
    rows = [
        ("flexlocal", __version__),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {_build()}"),
        ("triton", _version("triton") or "not installed"),
        ("C++ compiler", shutil.which(compiler) or f"{compiler} not found"),
        ("GPU", "; ".join(_gpus()) or "none that torch can use"),
        ("eager", "yes, on every device, for training too"),
        ("flex on CPU", _flex("cpu", "yes, for inference; training takes the eager path")),
        ("flex on CUDA", _flex("cuda", "yes, for training too")),
    ]
    for distribution, purpose, command in EXTRAS:
        found = _version(distribution)
        missing = f"not installed (optional, {purpose}): {command}"
        rows.append((distribution, f"{found}, {purpose}" if found else missing))
    fault = flash.broken() if flash.installed() else None
    if fault is not None:
        rows.append(("FlashAttention 4", f"not taken: {fault}"))
    return rows


def trials() -> list[tuple[BackendName, torch.device]]:
    """The paths that should work here, each with a device."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    found: list[tuple[BackendName, torch.device]] = [("eager", device) for device in devices]
    found += [("flex", device) for device in devices if not unavailable(device)]
    return found


def attempt(backend: BackendName, device: torch.device) -> str:
    """Run one path on a small problem and say how it went.

    Raises:
        RuntimeError: the result is wrong.
    """
    trains = backend == "eager" or device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 64, generator=generator).to(device) for _ in range(3))
    q.requires_grad_(trains)
    layer = LocalAttention(64, causal=True, dim=64, dropout=0.0, backend=backend).to(device)
    started = time.perf_counter()
    out = layer(q, k, v)
    if trains:
        out.sum().backward()
    result = out.detach().cpu()
    seconds = time.perf_counter() - started
    layer.backend = "eager"
    exact = layer.cpu()(*(x.detach().cpu().double() for x in (q, k, v)))
    apart = (result - exact).abs().max().item()
    if not apart < 1e-2:  # also when it is not a number; TF32 stays below
        raise RuntimeError(f"its result is off by {apart:.1e}")
    did = "forward and backward" if trains else "forward"
    return f"works: {did} in {seconds:.1f} s, off by {apart:.0e}"


def run(*, run: bool = False) -> int:
    """Print the table and return the exit status.

    Args:
        run: try each path that should work here; it compiles.

    Returns:
        0, or 1 when a path that was tried did not work.
    """
    _print(report())
    if not run:
        return 0
    failed = False
    print("\neach path on a small problem")
    for backend, device in trials():
        try:
            said = attempt(backend, device)
        except Exception as error:  # whatever went wrong is what the reader wants to see
            first = next(iter(str(error).strip().splitlines()), "")
            said, failed = f"FAILED: {type(error).__name__}: {first}", True
        _print([(f"{backend}, {device.type}", said)])
    return int(failed)


def _print(rows: list[Row]) -> None:
    for name, text in rows:
        print(f"{name:<18} {text}", flush=True)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build() -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return "built without CUDA"


def _gpus() -> list[str]:
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        found.append(f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {memory:.0f} GiB")
    return found


def _flex(device: str, yes: str) -> str:
    reason = unavailable(torch.device(device))
    return f"no: {reason}" if reason else yes
