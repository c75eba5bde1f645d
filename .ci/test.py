"""Every pass of `make test`, each in a process of its own, and one closing total.

natively, everything; the op tests, drawn ones too, under TRITON_INTERPRET=1, and at the instruction
sets avx2 and scalar.  --full adds the tests marked slow, more draws, float16 under the interpreter, and the
instruction sets between.  --only names passes of these, to run them in turns.
As many tests at a time as there are processors.  Exit 1 where any pass failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from suite import ROOT, op_tests, testsuite

MODES = ("TRITON_INTERPRET", "TILEWRIGHT_CPU_ISA")
# Each test may use all processors: a thread that waits must leave its own to another's.
SHARED = {"OMP_WAIT_POLICY": "PASSIVE"}


def present(*names: str) -> list[str]:
    """tests/test_<name>.py of those that are there."""
    return [f"tests/test_{name}.py" for name in names if Path(f"tests/test_{name}.py").is_file()]


def passes(full: bool) -> dict[str, tuple[dict[str, str], list[str]]]:
    """Name -> environment, and what pytest is asked for."""
    from tilewright import _native

    ops = op_tests()
    tests = [*ops, *present("properties", "addressing")]
    interpreted = [*tests, *present("interpreter", "traffic", "tune", "llama")]
    quick = ["-m", "not slow", *(["--hypothesis-profile=full"] if full else [])]
    found: dict[str, tuple[dict[str, str], list[str]]] = {"native": ({}, quick)}
    if full:
        found["slow"] = ({}, ["-m", "slow"])
    if ops:
        found["interpreter"] = ({"TRITON_INTERPRET": "1"}, [*quick, *interpreted])
    levels = [] if _native.C is None or not ops else _native.C.isas()
    for level in levels[:-1]:
        if full or level in ("avx2", "scalar"):
            found[level] = ({"TILEWRIGHT_CPU_ISA": level}, [*quick, *tests])
    return found


def run(name: str, environment: dict[str, str], asked: list[str]) -> dict[str, int]:
    """Counts of one pass; a pytest that could not even report counts as one failure."""
    clean = {key: value for key, value in os.environ.items() if key not in MODES}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        print(f"== {name}: {' '.join(f'{k}={v}' for k, v in environment.items())}", flush=True)
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rs", "-n", "logical", "--dist", "loadgroup",
             f"--junit-xml={report}", *asked],
            env=clean | SHARED | environment,
            cwd=ROOT,
        ).returncode  # fmt: skip
        suite = testsuite(report)
    total, failed, skipped = (
        (0, 0, 0)
        if suite is None
        else (
            int(suite.get("tests", 0)),
            int(suite.get("failures", 0)) + int(suite.get("errors", 0)),
            int(suite.get("skipped", 0)),
        )
    )
    if code and not failed:  # also 5, a pass that found no test
        failed, total = failed + 1, total + 1
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the tests marked slow too")
    parser.add_argument(
        "--only", nargs="+", metavar="PASS", help="native, slow, interpreter, avx2, ..."
    )
    options = parser.parse_args()
    os.chdir(ROOT)
    chosen = passes(options.full)
    if options.only:
        unknown = [name for name in options.only if name not in chosen]
        if unknown:
            parser.error(f"--only: {', '.join(unknown)} are none of {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in options.only}
    totals = {"passed": 0, "failed": 0, "skipped": 0}
    lines = []
    for name, (environment, asked) in chosen.items():
        start = time.perf_counter()
        counts = run(name, environment, asked)
        totals = {key: totals[key] + counts[key] for key in totals}
        told = ", ".join(f"{count} {key}" for key, count in counts.items())
        lines.append(f"{name}: {told} in {time.perf_counter() - start:.0f} s")
    print("\n".join(lines))
    print(", ".join(f"{count} {key}" for key, count in totals.items()))
    sys.exit(1 if totals["failed"] else 0)


if __name__ == "__main__":
    main()
