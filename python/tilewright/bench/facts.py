"""What a result must say about where it came from."""

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import tilewright
from tilewright import _native
from tilewright.doctor import cpu_model, package_version


def device_name() -> str:
    """The GPU's name, or the CPU's with its cores: one folder of results a device."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{cpu_model()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "")).strip("-")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def facts(directory: Path) -> dict[str, Any]:
    """Machine, versions, commit of the checkout at `directory`, date (UTC)."""
    return {
        "device": device_name(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _native.cpu_isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "llama_cpp": package_version("llama_cpp_python"),
        "tilewright": tilewright.__version__,
        "commit": _git(directory, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git(directory, "status", "--porcelain")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
