"""The compiled extension `_C`, where one is here, fits this torch, and may be used.

`_C` holds the CPU kernels.  Loading it registers them with torch's dispatcher, so this module is
imported before any operator is looked up.  It never raises for a missing or foreign build: ops then
run on their references, and `status` says why (`tilewright doctor` prints it).
"""

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_INFO = Path(__file__).with_name("_build_info.json")


def _load() -> tuple[ModuleType | None, str]:
    if INTERPRET:
        return None, "not loaded: TRITON_INTERPRET=1 puts the Triton kernels on the CPU"
    if not any(_INFO.parent.glob("_C.*")):
        return None, "not built"
    info: dict[str, Any] = json.loads(_INFO.read_text()) if _INFO.is_file() else {}
    built_for = info.get("torch")
    if built_for != torch.__version__:
        # torch's C++ ABI is not stable across releases: loading could crash, not only fail
        return None, f"built for torch {built_for}, this is torch {torch.__version__}: not used"
    try:
        return importlib.import_module("tilewright._C"), "loaded"
    except ImportError as error:
        return None, f"could not be loaded: {error}"


def _at_level(build: ModuleType | None, level: str | None) -> str | None:
    """Run `build` at this instruction-set level; what is wrong with it, if it cannot be had."""
    try:
        if build is not None and level:
            build.set_isa(level)
    except ValueError as error:
        return str(error)
    return None


C, status = _load()
# an unknown TILEWRIGHT_CPU_ISA: every op on the CPU says so, and the import still succeeds, so that
# `doctor` can tell and the command line need not end in a traceback
fault = _at_level(C, os.environ.get("TILEWRIGHT_CPU_ISA"))


def cpu_isa() -> str | None:
    """The instruction-set level the CPU kernels run at, or None without the extension."""
    return None if C is None else C.isa()
