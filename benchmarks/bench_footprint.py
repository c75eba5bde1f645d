"""What tilewright costs to hold and to import: peak resident memory of `generate` on the GGUF,
mapped pages counted, and the time of `import tilewright` after `import torch`."""

import statistics
import subprocess
import sys

from tilewright.bench.peers import smollm2

# VmHWM is this process image's own; ru_maxrss would start from the parent's
PEAK = """
print([l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')][0], file=sys.stderr)
"""
GENERATE = """
import sys
from tilewright.cli import main
try:
    main(["generate", "--model", sys.argv[1], "What is the capital of France?",
          "--max-new-tokens", "64", "--activations", sys.argv[2]])
except SystemExit as end:
    assert end.code in (0, None), end.code
"""
IMPORT = """
import sys, time, torch
start = time.perf_counter()
import tilewright
print(time.perf_counter() - start, file=sys.stderr)
"""


def _last_number(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return float(done.stderr.splitlines()[-1])


def measure(quick):
    rounds = 2 if quick else 5
    model = smollm2()
    size = model.stat().st_size / 1e6

    def megabytes(code, *arguments):
        return statistics.median(
            _last_number(code + PEAK, *arguments) * 1024 / 1e6 for _ in range(rounds)
        )

    torch_alone = megabytes("import sys, torch")
    rows = [
        {"what": "model file", "megabytes": size},
        {"what": "peak resident, import torch", "megabytes": torch_alone},
    ]
    for activations in ("float", "int8"):
        peak = megabytes(GENERATE, str(model), activations)
        rows.append(
            {
                "what": f"peak resident, generate, {activations} activations",
                "megabytes": peak,
                "over_torch_and_file": peak - torch_alone - size,
                "bound": 150,
            }
        )
    seconds = statistics.median(_last_number(IMPORT) for _ in range(2 * rounds + 1))
    rows.append({"what": "import tilewright after torch", "seconds": seconds, "bound": 0.5})
    return rows
