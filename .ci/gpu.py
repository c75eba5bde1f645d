"""`make gpu`: everything a machine with a GPU and no network can tell, in nine minutes, in one file.

In turn, each with what time is left: build; every test on the device; the quick benchmarks with the
peers that are installed; one launch of each op under compute-sanitizer (memcheck, racecheck), where
that is installed.  The file is written anew after every step, so that a run cut short leaves what it
found, and names what it left out.  It goes to benchmarks/results/<device>/gpu.json; without a GPU,
where every step runs on the CPU to try this script itself, only to --output.

python .ci/gpu.py [--minutes 9] [--output FILE]
python .ci/gpu.py --launch OP          one forward and backward of OP, for the sanitizer
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from suite import ROOT, op_tests, ops

BENCHMARKS = ROOT / "benchmarks"
TAIL = 2000  # characters kept of what a failed step said
SHARE = 150.0  # seconds that the tests leave to the rest
PATHS = os.pathsep.join((str(ROOT / "python"), str(ROOT / ".ci")))
LEAST = 20.0  # seconds below which a step is not begun


def environment() -> dict[str, str]:
    modes = ("TRITON_INTERPRET", "TILEWRIGHT_CPU_ISA")
    clean = {key: value for key, value in os.environ.items() if key not in modes}
    return clean | {"PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1"}


class Run:
    """The results so far, the time left, and where they are written."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.results: dict[str, Any] = {"name": "gpu", "quick": True, "left_out": [], "seconds": {}}
        self.path: Path | None = None

    def left(self) -> float:
        return self.end - time.monotonic()

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.results, indent=1) + "\n")
        draft.replace(self.path)

    def leave_out(self, what: str) -> None:
        self.results["left_out"].append(what)

    def step(
        self, name: str, command: list[str], most: float, told: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str] | None:
        """Run it within `most` seconds and what is left; None, and named as left out, where it
        could not begin or end.  What it started ends with it."""
        limit = min(most, self.left())
        if limit < LEAST:
            self.leave_out(f"{name}: no time left")
            return None
        print(f"== {name}", flush=True)
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment() | (told or {}), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            self.leave_out(f"{name}: cut after {limit:.0f} s")
            return None
        finally:
            self.results["seconds"][name] = round(time.monotonic() - start, 1)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def build(run: Run) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    os.environ["TILEWRIGHT_REQUIRE_EXT"] = "1"
    done = run.step("build", command, 200)
    run.results["build"] = None if done is None else done.returncode == 0
    if done is not None and done.returncode:
        run.results["build_said"] = done.stderr[-TAIL:]


def about(run: Run, output: Path | None) -> None:
    """Facts, in a process of its own: the extension it loads was built a moment ago."""
    code = (
        "import json; from pathlib import Path; from tilewright.bench.facts import facts;"
        f"print(json.dumps(facts(Path({str(BENCHMARKS)!r}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    run.results |= json.loads(done.stdout.splitlines()[-1])
    run.path = output or BENCHMARKS / "results" / run.results["device"] / "gpu.json"


def test(run: Run) -> None:
    """Every test, the ops' first, as many at a time as xdist and the processors allow."""
    first = op_tests()
    others = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*.py"))
    files = [*first, *(path for path in others if path not in first)]
    # the benchmarks and the sanitizer have their share of the time
    limit = max(run.left() - SHARE, run.left() / 2)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "outcomes"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "outcomes"]
        if importlib.util.find_spec("xdist"):
            workers = max(1, (os.cpu_count() or 1) * 3 // 4)
            command += ["-n", str(workers), "--maxschedchunk", "4"]
        done = run.step("tests", [*command, *files], limit, {"OUTCOMES": str(log)})
        lines = log.read_text().splitlines() if log.exists() else []
    found, not_run = outcomes(lines, files)
    run.results["tests"] = found
    for name, tests in not_run.items():
        run.leave_out(f"{name}: {tests} tests not run")
    if done is not None and done.returncode not in (0, 1):
        run.results["tests_said"] = (done.stdout + done.stderr)[-TAIL:]
    passed = []
    stems = [Path(path).stem for path in files]
    for op in ops():
        mine = [n for n in stems if n == f"test_{op}" or n.startswith(f"test_{op}_")]
        told = [found[n] for n in mine if n in found]
        if told and not any(n in not_run for n in mine) and not any(t["failed"] for t in told):
            passed.append(op)
    run.results["tests_passed"] = passed if run.results["gpu"] else []


def outcomes(
    lines: list[str], files: list[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Of what outcomes.py wrote, cut short or not: by test file how many ran and which failed, and how many
    did not run.  A file of which nothing is known is not in the first, and counts 1 in the second where
    not even its tests were collected."""
    told = []
    for line in lines:
        try:
            told.append(json.loads(line))
        except json.JSONDecodeError:  # the last, half written
            break
    collected = next((entry["collected"] for entry in told if "collected" in entry), None)
    ran: dict[str, set[str]] = {}
    failed: dict[str, list[str]] = {}
    for entry in told:
        if "test" not in entry:
            continue
        path, _, name = entry["test"].partition("::")
        ran.setdefault(Path(path).stem, set()).add(name)
        if entry["outcome"] == "failed":
            failed.setdefault(Path(path).stem, []).append(f"{name}: {entry['said']}")
    found = {n: {"tests": len(ran[n]), "failed": failed.get(n, [])} for n in sorted(ran)}
    if collected is None:
        return found, {Path(path).stem: 1 for path in files if Path(path).stem not in ran}
    wanted: dict[str, set[str]] = {}
    for test in collected:
        path, _, name = test.partition("::")
        wanted.setdefault(Path(path).stem, set()).add(name)
    missing = {n: len(tests - ran.get(n, set())) for n, tests in wanted.items()}
    return found, {n: count for n, count in missing.items() if count}


def bench(run: Run) -> None:
    rows: list[dict[str, Any]] = []
    run.results["rows"] = rows
    for op in ops():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tilewright.cli", "bench", op, "--quick"]
            done = run.step(f"bench {op}", [*command, "--output", folder], 90)
            if done is None:
                continue
            if done.returncode:
                run.results.setdefault("bench_failed", {})[op] = done.stderr[-TAIL:]
            for path in Path(folder).rglob(f"{op}.json"):
                rows += [{"op": op, **row} for row in json.loads(path.read_text())["rows"]]
        run.write()


def sanitize(run: Run) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None or run.results["gpu"] is None:
        run.leave_out("compute-sanitizer: not installed, or no GPU")
        return
    found: dict[str, str] = {}
    run.results["sanitizer"] = found
    for check in ("memcheck", "racecheck"):
        for op in ops():
            command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__]
            done = run.step(f"{check} {op}", [*command, "--launch", op], 60)
            if done is not None:
                clean = done.returncode == 0
                found[f"{check} {op}"] = "clean" if clean else (done.stdout + done.stderr)[-TAIL:]
            run.write()


def launch(op: str) -> None:
    """One forward and backward at the op's smallest benchmark."""
    import torch

    from tilewright.bench import harness

    (definition,) = harness.discover(BENCHMARKS, [op])
    dtype = definition.DTYPES[-1]
    sizes = harness.smallest(definition, dtype)
    inputs = definition.inputs(dtype, harness.device(), **sizes)
    for x in inputs.values():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    outputs = definition.PROVIDERS["tilewright"](**inputs)
    live = [y for y in outputs if y.requires_grad]
    torch.autograd.backward(live, [torch.ones_like(y) for y in live])
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--launch", metavar="OP", choices=ops())
    options = parser.parse_args()
    if options.launch:
        launch(options.launch)
        return 0
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes} is no time")
    import torch

    if options.output is None and not torch.cuda.is_available():
        parser.error("there is no GPU here: give --output FILE to try it on the CPU")
    run = Run(options.minutes)
    build(run)
    about(run, options.output)
    run.write()
    for step in (test, bench, sanitize):
        step(run)
        run.write()
    failed = [n for n, found in run.results["tests"].items() if found["failed"]]
    print(f"tests failed: {', '.join(failed) or 'none'}")
    print(f"left out: {'; '.join(run.results['left_out']) or 'nothing'}")
    print(f"written to {run.path}")
    return int(
        bool(failed)
        or "tests_said" in run.results
        or run.results["build"] is False
        or "bench_failed" in run.results
    )


if __name__ == "__main__":
    sys.exit(main())
