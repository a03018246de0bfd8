"""Where something was measured: the device, the versions, and the folder of results."""

import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
"""Figures worth keeping, as JSON; the tables in docs/ are made of them."""

_PACKAGES = ("torch", "triton", "local-attention", "flash-attn-4", "nvidia-cudnn-frontend")


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many threads torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def record(device: torch.device, **settings: Any) -> dict[str, Any]:
    """What a file of results begins with; ``settings`` are those of the script."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "device_type": device.type,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "settings": settings,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
