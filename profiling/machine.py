"""Where something was measured, and the JSON that keeps it."""

import datetime
import importlib.metadata
import json
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "local-attention", "flash-attn-4", "nvidia-cudnn-frontend")


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many threads torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(models or [name])[0]}, {torch.get_num_threads()} threads"


def record(device: torch.device, **settings: Any) -> dict[str, Any]:
    """What a file of results begins with."""
    versions = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": device_name(device),
        "device_type": device.type,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "settings": settings,
    }


def write(record: dict[str, Any], file: Path | None) -> None:
    """Writes a record, where a file was asked for."""
    if file:
        file.write_text(json.dumps(record, indent=2) + "\n")
