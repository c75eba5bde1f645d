"""What this machine offers tilewright, what is wrong with it, and how to mend that."""

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tilewright
from tilewright import _native

TORCH_NEEDED = (2, 11)
MODEL_PACKAGES = ("gguf", "jinja2", "numpy", "safetensors", "tokenizers")
BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def cpu_model() -> str:
    """The CPU's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu"."""
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


def _fault(fault: str, fix: str) -> dict[str, str]:
    return {"fault": fault, "fix": fix}


def _extension_faults() -> list[dict[str, str]]:
    if _native.fault is not None:
        return [_fault(_native.fault, "unset TILEWRIGHT_CPU_ISA, or give a level of this machine")]
    if _native.C is not None or _native.INTERPRET:
        return []
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        fix = f"install a C++17 compiler ({compiler} is not on PATH), then {BUILD}"
    else:
        fix = f"in a checkout of tilewright: {BUILD}"
    return [_fault(f"extension {_native.status}; on the CPU every op runs on its reference", fix)]


def _gpu_faults(has_driver: bool) -> list[dict[str, str]]:
    faults = []
    if has_driver and torch.version.cuda is None and torch.version.hip is None:
        faults.append(
            _fault(
                f"there is an NVIDIA driver, but torch {torch.__version__} is a CPU build",
                "install the CUDA build of torch for this driver, then build tilewright again",
            )
        )
    elif has_driver and not torch.cuda.is_available():
        faults.append(
            _fault(
                f"torch (CUDA {torch.version.cuda}) cannot use the GPU that nvidia-smi belongs to",
                "check nvidia-smi, CUDA_VISIBLE_DEVICES, and that the driver is new enough",
            )
        )
    if torch.cuda.is_available() and package_version("triton") is None:
        faults.append(
            _fault("triton is not installed; GPU ops run on their references", "pip install triton")
        )
    return faults


def report() -> dict[str, Any]:
    """Facts, notes and faults, ready for JSON; every fault comes with its fix."""
    has_driver = shutil.which("nvidia-smi") is not None
    triton, numpy = package_version("triton"), package_version("numpy")
    build = _native.C
    facts: dict[str, Any] = {
        "tilewright": tilewright.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "extension": _native.status,
        "compiler": None if build is None else build.compiler,
        "instruction_set": _native.cpu_isa(),
        "instruction_sets": [] if build is None else build.isas(),
        "cuda": torch.version.cuda,
        "gpus": [
            "{0.name}, sm_{0.major}{0.minor}".format(torch.cuda.get_device_properties(i))
            for i in range(torch.cuda.device_count())
        ],
        "llama_cpp": package_version("llama_cpp_python"),
        "transformers": package_version("transformers"),
    }
    faults = [*_extension_faults(), *_gpu_faults(has_driver)]
    if _release(torch.__version__) < TORCH_NEEDED:
        faults.append(_fault(f"torch {torch.__version__} is too old", "pip install 'torch>=2.11'"))
    if importlib.util.find_spec("tilewright.kernels") is None:
        faults.append(
            _fault(
                "the package has no kernels: its link to kernels/ did not survive a copy",
                "install from git or an sdist, not from a zip",
            )
        )
    missing = [name for name in MODEL_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        faults.append(
            _fault(
                f"models need {', '.join(missing)}",
                "pip install 'tilewright[models]'",
            )
        )
    if _native.INTERPRET and numpy and _release(numpy) >= (2, 4) and triton == "3.6.0":
        faults.append(
            _fault(
                f"Triton {triton}'s interpreter breaks on numpy {numpy}", "pip install 'numpy<2.4'"
            )
        )
    return {"facts": facts, "notes": _notes(facts), "faults": faults}


def _notes(facts: dict[str, Any]) -> list[str]:
    notes = []
    if _native.INTERPRET:
        notes.append("TRITON_INTERPRET=1: ops run in Triton's interpreter, for tests only")
    if not facts["gpus"]:
        notes.append("no GPU: Triton kernels compile and are interpreted here, but do not run")
    if facts["triton"] is None:
        notes.append("triton is not installed: there are no GPU kernels")
    levels = facts["instruction_sets"]
    if levels and facts["instruction_set"] != levels[-1]:
        notes.append(
            f"kernels run at {facts['instruction_set']}, this CPU has {levels[-1]}: "
            "TILEWRIGHT_CPU_ISA is set"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores and facts["threads"] < cores:
        notes.append(f"torch uses {facts['threads']} threads of {cores} cores (OMP_NUM_THREADS)")
    return notes
