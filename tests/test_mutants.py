"""Each mutant takes one term out of a kernel; its op's tests, run in the interpreter, must fail.

A mutant is a file of kernels/, a text in it (found once) and what replaces it.  That the texts are
there is tested always, the mutants themselves in the slow tests.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python/tilewright"


class Mutant(NamedTuple):
    file: str
    was: str
    becomes: str
    op: str  # whose tests must notice


def of(file: str, op: str, *changes: tuple[str, str]) -> list[Mutant]:
    return [Mutant(file, was, becomes, op) for was, becomes in changes]


MUTANTS = [
    *of(
        "rms_norm",
        "rms_norm",
        ("rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)", "rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N)"),
        ("rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)", "rstd = tl.rsqrt(tl.sum(x * x, axis=1) + eps)"),
        ("        squares += x * x\n", "        squares = x * x\n"),
        ("rstd = tl.rsqrt(tl.sum(squares, axis=0) / N + eps)", "rstd = tl.rsqrt(tl.sum(squares, axis=0) / N)"),
        ("    y = x * rstd[:, None]\n    if HAS_W:", "    y = x * rstd[:, None]\n    if False:"),
        ("other=0.0).to(tl.float32) + offset\n        y = y * w[None, :]", "other=0.0).to(tl.float32)\n        y = y * w[None, :]"),
        ("            dw += tl.sum(g * xhat, axis=0)", "            dw = tl.sum(g * xhat, axis=0)"),
        ("            g = g * w[None, :]\n", "            g = g\n"),
        ("dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=1) / N)[:, None])", "dx = rstd * g"),
        ("        dx = rstd * (g - xhat * mean)", "        dx = rstd * g"),
        ("        dots += g * (tl.load", "        dots = g * (tl.load"),
        ("        dw += dy * (x * tl.load(rstd_ptr + row))", "        dw += dy * x"),
        ("        dw += dy * (x * tl.load(rstd_ptr + row))", "        dw = dy * (x * tl.load(rstd_ptr + row))"),
    ),
    *of(
        "rms_norm",
        "add_rms_norm",
        ("            dx += tl.load(dres_ptrs, mask=mask, other=0.0).to(tl.float32)", "            dx += 0.0"),
        ("            dx += tl.load(dres_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)", "            dx += 0.0"),
    ),
    *of(
        "add_rms_norm",
        "add_rms_norm",
        ("    h = (x.to(tl.float32) + res.to(tl.float32)).to(h_ptr.dtype.element_ty)", "    h = x.to(tl.float32).to(h_ptr.dtype.element_ty)"),
        ("    tl.store(h_ptr + rows[:, None] * N + cols[None, :], h, mask=mask)\n    h = h.to(tl.float32)", "    h = x.to(tl.float32) + res.to(tl.float32)\n    tl.store(h_ptr + rows[:, None] * N + cols[None, :], h, mask=mask)"),
        ("        h = (x + res).to(h_ptr.dtype.element_ty).to(tl.float32)", "        h = x"),
        ("        squares += h * h", "        squares = h * h"),
    ),
    *of(
        "_glu",
        "swiglu",
        ("    y = value * up\n", "    y = value\n"),
        ("slope = s * (1.0 + g * (1.0 - s))", "slope = s"),
        ("dgate, dup = dy * up * slope, dy * value", "dgate, dup = dy * slope, dy * value"),
        ("dgate, dup = dy * up * slope, dy * value", "dgate, dup = dy * up * slope, value"),
    ),
    *of(
        "_glu",
        "geglu",
        ("z = near * (1.5957691216057308 + 0.07135481627260025 * square)", "z = near * 1.5957691216057308"),
        ("slope = s + g * s * tl.sigmoid(-z)", "slope = g * s * tl.sigmoid(-z)"),
        ("        slope = phi + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)", "        slope = phi"),
        ("near = tl.where(g > 64.0, 64.0, tl.where(g < -64.0, -64.0, g))", "near = g"),
    ),
    *of(
        "rope",
        "rope",
        ("        sn = -sn\n", "        sn = sn\n"),
        ("tl.store(to, (first * c - second * sn).to(dtype), mask=mask)", "tl.store(to, (first * c).to(dtype), mask=mask)"),
        ("tl.join(first * c - second * sn, second * c + first * sn)", "tl.join(first * c - second * sn, second * c)"),
        ("        position = tl.minimum(tl.maximum(position, 0), table_rows - 1)\n", ""),
        ("tl.load(position_ptr + b * stride_position_b + s", "tl.load(position_ptr + s"),
        ("        tl.store(y_ptrs[:, None] + j[None, :], rest, mask=mask_rest)", "        pass"),
        ("        h, s = row % H, row // H % S", "        h, s = row % H, row // H"),
    ),
    *of(
        "attention",
        "attention",
        ("    top = tl.maximum(m, tl.max(s, 1))", "    top = tl.max(s, 1)"),
        ("acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=\"ieee\")", "acc = tl.dot(p.to(v.dtype), v, acc, input_precision=\"ieee\")"),
        ("    return acc, top, l * alpha + tl.sum(p, 1)", "    return acc, top, l + tl.sum(p, 1)"),
        ("    factor = scale * LOG2E\n", "    factor = scale\n"),
    ),
    *of(
        "_tile",
        "attention",
        ("return (cols < T) & (cols <= rows + T - S) if CAUSAL", "return (cols < T) & (cols <= rows) if CAUSAL"),
        ("        seen = min(max(first + T - S + 1, 0), T)", "        seen = min(max(first + BLOCK_M + T - S, 0), T)"),
        ("        end = min(max(first + BLOCK_M + T - S, 0), T)", "        end = T"),
        ('return tl.where(blind, float("inf"), l)', "return l"),
    ),
    *of(
        "_attention_bwd",
        "attention",
        ("    ds = p * (dp - now[:, None])\n", "    ds = p * dp\n"),
        ("    excess = excess * alpha - shift * kept + tl.sum(ds, 1)", "    excess = excess * alpha - shift * kept"),
        ("    dq = dq * alpha[:, None] - pk * (shift * alpha)[:, None]", "    dq = dq * alpha[:, None]"),
        ("    dq = (dq - drift[:, None] * pk) * tl.where", "    dq = dq * tl.where"),
        ("    ds = p * ((dp - mean[None, :]) - drift[None, :])", "    ds = p * (dp - mean[None, :])"),
        ("    dk = (dk * scale).to", "    dk = dk.to"),
        ("        for start in range(begin, clear, BLOCK_M):", "        for start in range(0, clear, BLOCK_M):"),
    ),
    *of(
        "quant_linear",
        "quant_linear",
        ("        return s * (code - (1 << (BITS - 1)))", "        return s * code"),
        ("        return s * (code - o)\n", "        return s * code\n"),
        ("    return s * code + o\n", "    return s * code\n"),
        ("        acc += tl.sum(w * x[:, None, :, :], axis=3)", "        acc = tl.sum(w * x[:, None, :, :], axis=3)"),
        ("        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]", "        y += 0.0"),
        ("        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]", "        acc += 0.0"),
        ("            mask = mask & (k + j < k_end)[:, None]\n", "            mask = mask\n"),
        ("        packed = tl.interleave(packed & 15, packed >> 4)", "        packed = tl.interleave(packed >> 4, packed & 15)"),
        ("        top = tl.maximum(top, tl.max(tl.abs(x), axis=1))", "        top = tl.max(tl.abs(x), axis=1)"),
        ('    precision = "tf32x3" if dtype == torch.float32 else "tf32"', '    precision = "tf32"'),
    ),
    # offsets in 32 bits
    *of("rms_norm", "addressing", ("    # int64: row * stride passes 2^31 for long, wide activations\n    rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "    rows = tl.program_id(0) * BLOCK_M")),
    *of("rms_norm", "addressing", ("    pid = tl.program_id(0).to(tl.int64)\n    cols = tl.arange(0, BLOCK_N)\n    if HAS_W:", "    pid = tl.program_id(0)\n    cols = tl.arange(0, BLOCK_N)\n    if HAS_W:")),
    *of("add_rms_norm", "addressing", ("    rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "    rows = tl.program_id(0) * BLOCK_M")),
    *of("_glu", "addressing", ("    # int64: row * stride passes 2^31 for long, wide activations\n    rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "    rows = tl.program_id(0) * BLOCK_M")),
    *of("rope", "addressing", ("    row = tl.program_id(0).to(tl.int64) * BLOCK_M", "    row = tl.program_id(0) * BLOCK_M")),
    *of("_tile", "addressing", ("rows.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)", "rows[:, None] * stride + d[None, :], mask=mask, other=0.0)")),
    *of("quant_linear", "addressing", ("x_rows = x_ptr + m.to(tl.int64) * stride_xm", "x_rows = x_ptr + m * stride_xm")),
]  # fmt: skip

# Mutants that live, and why.
SURVIVORS = {
    "ds = tl.where(_still(rows, S, T, CAUSAL)[None, :], 0.0, ds)": (
        "a row that sees one key has dP equal to its mean in the interpreter, whose two products"
        " round alike; tensor cores of two tile shapes do not"
    ),
}


def test_survivors_are_still_there():
    kernels = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert all(kernels.count(text) == 1 for text in SURVIVORS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.was.strip()[:60]}")
def test_a_mutant_changes_its_file(mutant: Mutant):
    assert mutant.was != mutant.becomes
    assert (ROOT / f"kernels/{mutant.file}.py").read_text().count(mutant.was) == 1


def tree(folder: Path, mutant: Mutant) -> Path:
    """The package with one kernel file changed, everything else linked."""
    package = folder / "tilewright"
    package.mkdir()
    for entry in PACKAGE.iterdir():
        if entry.name not in ("kernels", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "kernels", package / "kernels")
    path = package / f"kernels/{mutant.file}.py"
    path.write_text(path.read_text().replace(mutant.was, mutant.becomes))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.becomes.strip()[:60]}")
def test_a_mutant_is_killed(mutant: Mutant, tmp_path: Path):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(tree(tmp_path, mutant)),
        "OMP_NUM_THREADS": "1",
    }
    tests = sorted(str(p) for p in ROOT.glob(f"tests/test_{mutant.op}*.py"))
    told = ""
    # what moves too much is right: the traffic is what tells
    for wanted in (tests, ["tests/test_traffic.py", "-k", mutant.op]):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *wanted],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        told += done.stdout[-2000:] + done.stderr[-2000:]
        if done.returncode == 1:
            return
        assert done.returncode in (0, 5), told  # 5: nothing chosen; else not a test that failed
    pytest.fail(f"survived: {mutant}\n{told}")
