"""What a result must say about where it came from."""

import os
import platform
import re
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import tilewright
from tilewright import _native
from tilewright.doctor import cpu_model, package_version


def device_name() -> str:
    """The GPU's name, or the CPU's with its instruction set and cores: one folder of results a device."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{cpu_model()} {_native.cpu_isa() or ''} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "")).strip("-")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def busy_cores(seconds: float = 0.5) -> float | None:
    """Cores at work now, on whatever, over `seconds`; None where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None

    def jiffies() -> tuple[int, int]:
        numbers = [int(n) for n in stat.read_text().splitlines()[0].split()[1:9]]
        return sum(numbers) - numbers[3] - numbers[4], sum(numbers)  # idle, waiting for a disk

    busy, every = jiffies()
    time.sleep(seconds)
    busy_after, every_after = jiffies()
    return (os.cpu_count() or 1) * (busy_after - busy) / max(1, every_after - every)


def clock_mhz() -> float | None:
    """The GPU's clock, or the CPU's, now."""
    if torch.cuda.is_available():
        command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return float(done.stdout.split()[torch.cuda.current_device()])
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
            return None
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return None
    clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*: ([\d.]+)", info.read_text(), re.M)]
    return sum(clocks) / len(clocks) if clocks else None


def facts(directory: Path) -> dict[str, Any]:
    """Machine, versions, commit of the checkout at `directory`, date (UTC)."""
    return {
        "device": device_name(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _native.cpu_isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "clock_mhz": clock_mhz(),
        "busy_cores_before": busy_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "llama_cpp": package_version("llama_cpp_python"),
        "tilewright": tilewright.__version__,
        "commit": _git(directory, "rev-parse", "HEAD"),
        # records just written, of ops measured before this one, change nothing that is measured
        "uncommitted_changes": bool(
            _git(directory, "status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
        ),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
