"""Each mutant takes one term out of a kernel; its op's tests must fail.  Those of the Triton kernels
run in the interpreter, those of the C++ kernels natively, at the level in use.

A mutant is a file, a text in it (found once) and what replaces it.  That the texts are there is tested
always, the mutants themselves in the slow tests.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils import cpp_extension

from tilewright import _native

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python/tilewright"
CPU = ROOT / "csrc/cpu"


class Mutant(NamedTuple):
    path: Path
    was: str
    becomes: str
    op: str  # whose tests must notice


def of(file: str, op: str, *changes: tuple[str, str]) -> list[Mutant]:
    """Of a file of csrc/cpu, or of a Triton kernel's, which goes without its ending."""
    path = CPU / file if "." in file else ROOT / f"kernels/{file}.py"
    return [Mutant(path, was, becomes, op) for was, becomes in changes]


TRITON = [
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
        ("lse = tl.where(m == LOWEST, -float(\"inf\"), (m + tl.log2(l)) * LN2)", "lse = (m + tl.log2(l)) * LN2"),
        ("    l = tl.zeros((BLOCK_M,), tl.float32) + l0", "    l = tl.zeros((BLOCK_M,), tl.float32)"),
        ("(m + tl.log2(l)) * LN2", "m * LN2"),
    ),
    *of(
        "_tile",
        "attention",
        ("hi = rows + (T - S) + right + 1", "hi = rows + right + 1"),
        ("lo = rows + (T - S) - left", "lo = rows + (T - S) - left + 1"),
        ("    seen = (cols < T) & (cols < hi)", "    seen = cols < T"),
        ("        seen = seen & (cols >= lo)", "        seen = seen"),
        ("tl.load(begin_ptr + b * S + rows", "tl.load(begin_ptr + rows"),
        ("tl.load(end_ptr + b * S + rows", "tl.load(end_ptr + rows"),
        ("return tl.minimum(hi, T) - tl.maximum(lo, 0)", "return tl.minimum(hi, T) - lo"),
        ("    begin = tl.min(tl.where(rows < S, lo, T), 0) // BLOCK_N * BLOCK_N", "    begin = tl.max(tl.where(rows < S, lo, 0), 0) // BLOCK_N * BLOCK_N"),
        ("    open = tl.cdiv(tl.max(tl.where(rows < S, lo, 0), 0), BLOCK_N) * BLOCK_N", "    open = begin"),
        ("    seen = tl.min(tl.where(rows < S, hi, T), 0)", "    seen = tl.max(tl.where(rows < S, hi, 0), 0)"),
        ("    end = tl.max(tl.where(rows < S, hi, 0), 0)", "    end = tl.min(tl.where(rows < S, hi, T), 0)"),
        ("        seen = min(max(here + right + 1, 0), T)", "        seen = min(max(here + right + BLOCK_M, 0), T)"),
        ("        end = min(max(here + right + BLOCK_M, 0), T)", "        end = T"),
        ("        begin = max(here - left, 0) // BLOCK_N * BLOCK_N", "        begin = 0"),
        ("open = tl.cdiv(max(here + BLOCK_M - 1 - left, 0), BLOCK_N) * BLOCK_N", "open = begin"),
        ('        l = tl.where(seen_by(lo, hi, T) <= 0, float("inf"), l)', "        l = l"),
        ("    s = t * (softcap * LOG2E)", "    s = t * LOG2E"),
        ("    slope = tl.where(near, 1.0 - small * small, 4.0 * e / ((1.0 + e) * (1.0 + e)))", "    slope = 1.0"),
        ("    return tl.where(near, small, tl.where(x < 0, -large, large)), slope", "    return tl.where(x < 0, -large, large), slope"),
        ("tl.load(sinks_ptr + h)", "tl.load(sinks_ptr)"),
    ),
    *of(
        "_attention_bwd",
        "attention",
        ("    ds = p * (dp - now[:, None])\n", "    ds = p * dp\n"),
        ("    excess = excess * alpha - shift * kept + tl.sum(ds, 1)", "    excess = excess * alpha - shift * kept"),
        ("    dq = dq * alpha[:, None] - pk * (shift * alpha)[:, None]", "    dq = dq * alpha[:, None]"),
        ("    dq = (dq - drift[:, None] * pk) *", "    dq = dq *"),
        ("dp - mean[None, :]) - drift[None, :])", "dp - mean[None, :]))"),
        ("        drift -= tl.load(dlse_ptr", "        drift += tl.load(dlse_ptr"),
        ("    pk = tl.dot((p * slope).to", "    pk = tl.dot(p.to"),
        ("    ds = p * slope *", "    ds = p *"),
        ("(start - m).exp2() * norm * (mean + drift)", "(start - m).exp2() * norm * mean"),
        ("(start - m).exp2() * norm * (mean + drift)", "(start - m).exp2() * norm * drift"),
        ("    dk = (dk * scale).to", "    dk = dk.to"),
        ("        begin, open, whole, end = spans(first, T, S, right, left,", "        begin, open, whole, end = spans(first, T, S, left, right,"),
        ("    ends = end.cummax(1).values", "    ends = end.contiguous()"),
        ("    begins = begin.flip(1).cummin(1).values.flip(1)", "    begins = begin.contiguous()"),
        ("begin, end = tl.min(earliest, 0) //", "begin, end = tl.min(tl.where(cols < T, earliest, 0) + 20, 0) //"),
        ("* BLOCK_M, tl.max(latest, 0)", "* BLOCK_M, tl.min(latest, 0)"),
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

CPP = [
    *of(
        "rms_norm_row.h",
        "rms_norm",
        ("sqrt(sum_squares / double(n) + double(eps))", "sqrt(sum_squares / double(n))"),
        ("    total += reduce_add((a + b) + (c + d));", "    total = reduce_add((a + b) + (c + d));"),
        ("    if (j < end) b = tail(j, int(end - j), b);", ""),
        ("put(y + j, load(x + j) * r * load(scale + j), past)", "put(y + j, load(x + j) * r, past)"),
    ),
    *of(
        "rms_norm.cpp",
        "rms_norm",
        ("store(scale + j, load(w + j) + o)", "store(scale + j, load(w + j))"),
        ("      Vec v = r * fma(xhat, mean, d * load(scale + j));", "      Vec v = r * (d * load(scale + j));"),
        ("store(dw + j, fma(d, xhat, load(dw + j)))", "store(dw + j, d * xhat)"),
        ("sum = sum + load(partial + b * n + j)", "sum = load(partial + b * n + j)"),
    ),
    *of(
        "rms_norm.cpp",
        "add_rms_norm",
        ("      if (RESIDUAL) v = v + load(residual + j);", ""),
    ),
    *of(
        "add_rms_norm.cpp",
        "add_rms_norm",
        ("          const Vec v = load(h + j);\n", "          const Vec v = load(x + j) + load(residual + j);\n"),
        ("store(h + j, load(x + j) + load(residual + j))", "store(h + j, load(x + j))"),
    ),
    *of(
        "glu_rows.h",
        "swiglu",
        ("Act::value(load(gate + i)) * load(up + i)", "Act::value(load(gate + i))"),
        ("      put(dup + i, d * value, past);", "      put(dup + i, value, past);"),
        ("const int64_t row = at / a.cols, col = at % a.cols;\n    const int64_t n = a.cols - col < end - at ? a.cols - col : end - at;\n    const T* gate", "const int64_t row = at / a.cols, col = 0;\n    const int64_t n = a.cols - col < end - at ? a.cols - col : end - at;\n    const T* gate"),
    ),
    *of("swiglu.cpp", "swiglu", ("slope = s * fma(g, set1(1.f) - s, set1(1.f))", "slope = s")),
    *of(
        "geglu.cpp",
        "geglu",
        ("    slope = fma(g, density, phi);", "    slope = phi;"),
        ("fma(square, set1(3 * B), set1(A))", "set1(A)"),
        ("const Vec near = min(set1(64.f), max(set1(-64.f), g))", "const Vec near = g"),
        ("g * fma(g * g, set1(B), set1(A))", "g * set1(A)"),
        ("const Vec other = min(set1(3e38f), e) * s", "const Vec other = e * s"),
    ),
    *of(
        "rope.cpp",
        "rope",
        ("fma(first, c, (zero - second) * s)", "first * c"),
        ("  const Vec sign = set1(a.inverse ? -1.f : 1.f);", "  const Vec sign = set1(1.f);"),
        ("    if (rest) __builtin_memcpy", "    if (false) __builtin_memcpy"),
        ("a.positions[batch * a.stride_positions + index]", "a.positions[index]"),
        ("from_float<T>(second * c + first * s)", "from_float<T>(second * c)"),
    ),
    *of(
        "attention.cpp",
        "attention",
        ("fma(load(l + c * W), a, sum)", "load(l + c * W) + sum"),
        ("    const Vec a = exp(old - top);\n    Vec sum", "    const Vec a = set1(1.f);\n    Vec sum"),
        ("int64_t j = most(0, least(a.to(b, i) - j0, count))", "int64_t j = count"),
        ("j < least(a.from(b, i) - j0, vectors)", "j < 0"),
        ("j0 = a.earliest + c * CHUNK", "j0 = c * CHUNK"),
        ("last = most(last, a.to(b, (row + r) / R))", "last = a.to(b, (row + r) / R)"),
        ("(c == 0 ? first_sum(a) * exp(start - m[r]) : 0.f)", "0.f"),
        ("first_score(a, g * R + (row + r) % R);", "LOWEST;"),
        ("top == LOWEST ? -INF : top + __builtin_logf(sum)", "top + __builtin_logf(sum)"),
        ("    if (a.softcap != 0.f) cap(scores, nullptr, count, x.vectors, a.softcap);", ""),
        ("    sum += part[1] * weight;", "    sum += part[1];"),
        ("const float weight = exp(part[0] - top)", "const float weight = 1.f"),
    ),
    *of(
        "attention_tile.h",
        "attention",
        ("lane < least(L, begin)", "lane < 0"),
        ("int64_t lane = most(0, end)", "int64_t lane = L"),
        ("slope = select_positive(near, one - small * small, set1(4.f) * e / (sum * sum))", "slope = one"),
        ("    if (lo < hi) x.from = least(x.from, lo), x.to = most(x.to, hi);", "    if (lo < hi) x.from = lo, x.to = most(x.to, hi);"),
        ("(j >= x.lo[lane]) & (j < x.hi[lane])", "(j < x.hi[lane])"),
        ("(j >= x.lo[lane]) & (j < x.hi[lane])", "(j >= x.lo[lane])"),
        ("  if (j0 >= x.open && j0 + count <= x.whole) return;", "  if (j0 >= x.open) return;"),
        ("  if (j0 >= x.open && j0 + count <= x.whole) return;", "  if (j0 + count <= x.whole) return;"),
        ("!a.sinks || a.sinks[h] < LOWEST ?", "!a.sinks || !(a.sinks[h] >= LOWEST) ?"),
        ("      if (MODE == SHIFT) acc[i][n] =", "      if (false) acc[i][n] ="),
        ("      if (MODE == ADD) acc[i][n] = load(C + at) + acc[i][n];", ""),
        ("    if (lo < hi) x.from = least(x.from, lo), x.to = most(x.to, hi);", "    if (lo < hi) x.from = least(x.from, lo), x.to = hi;"),
    ),
    *of(
        "attention_bwd.cpp",
        "attention",
        ("drift = stats.excess[lane] * norm - ", "drift = -"),
        (" - (a.dlse ? a.dlse[flat] : 0.f)", ""),
        ("      times(p, slopes, count, x.vectors);", ""),
        ("least(a.S, first + keys - offset + a.left)", "least(a.S, first - offset + a.left)"),
        ("      if (!meets(a, b, i, count, first, keys)) continue;", "      if (!meets(a, b, i, 1, first, keys)) continue;"),
        ("      if (a.softcap != 0.f) times(ds, slopes, count, vectors);", ""),
        ("store(dj, prob * ((load(dj) - mean) - drift))", "store(dj, prob * load(dj))"),
        ("transpose_out(dkt, at<T>(a.dk, b, g, first + lane), lane, D, a.scale, q_space)", "transpose_out(dkt, at<T>(a.dk, b, g, first + lane), lane, D, 1.f, q_space)"),
        ("for (int64_t h = g * R; h < (g + 1) * R; ++h)", "for (int64_t h = g * R; h < g * R + 1; ++h)"),
        ("fma(load(x.excess + at), a, excess) - shift * kept", "excess"),
    ),
    *of(
        "quant_codes.h",
        "quant_linear",
        ("bias ? value + scalar_at(bias, dtype, n) : value", "value"),
        ("scalar_at(w.minima, w.scale_dtype, at) + centre * s", "scalar_at(w.minima, w.scale_dtype, at)"),
        ("constexpr int L = GROUP / PER_LANE;", "constexpr int L = 16;"),
    ),
    *of(
        "quant_fixed.cpp",
        "quant_linear",
        ("MOST = 127 * 65536 + 127 * 256 + 126", "MOST = 128 * 65536"),
        ("    if (_mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q)) return false;", ""),
        ("      group_sum = 0.f;\n", ""),
        ("              if (i > 0) acc = _mm512_slli_epi32(acc, 8);", ""),
        ("fma(fma(s, centre, load_tail(minima + g, left)), load_tail(sums + g, left), acc)", "fma(load_tail(minima + g, left), load_tail(sums + g, left), acc)"),
    ),
    *of(
        "quant_linear.cpp",
        "quant_linear",
        ("finish(out[m][r] + offset[m][r], bias,", "finish(out[m][r], bias,"),
        ("    if (zero != 0.f) gemv_exact", "    if (false) gemv_exact"),
        ("    if (n + NR > end) n = end - NR;", ""),
    ),
    *of(
        "quant_gemm.cpp",
        "quant_linear",
        ("store(to, load(static_cast<const float*>(to)) + acc[r][v])", "store(to, acc[r][v])"),
        ("bias ? load(out + c) + load(bias + c) : load(out + c)", "load(out + c)"),
        ("_mm512_set1_epi32(-(isums[r * s_stride + b] * (1 << shift)))", "_mm512_setzero_si512()"),
        ("        if constexpr (OFFSET) {", "        if constexpr (false) {"),
        ("sum = fma(scale[r][i], line[i], sum)", "sum = scale[r][i] * line[i]"),
        ("unpack_rows(w, n0, nc, k0, columns, panel, NB);\n      micro_rows(int(a.M), a.x + n0,", "unpack_rows(w, n0, nc, k0, columns, panel, NB);\n      micro_rows(int(a.M), a.x,"),
    ),
]  # fmt: skip

# Mutants that live, and why.
SURVIVORS = {
    "tl.where((norm < 0)[None, :], 0.0, dp - mean[None, :])": (
        "a row that sees one key has dP equal to its mean in the interpreter, whose two products"
        " round alike; tensor cores of two tile shapes do not"
    ),
}


MUTANTS = [*TRITON, *CPP]


def name(mutant: Mutant) -> str:
    return f"{mutant.path.name}: {(mutant.becomes or mutant.was).strip()[:60]}"


def test_survivors_are_still_there():
    kernels = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert all(kernels.count(text) == 1 for text in SURVIVORS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=name)
def test_a_mutant_changes_its_file(mutant: Mutant):
    assert mutant.was != mutant.becomes
    assert mutant.path.read_text().count(mutant.was) == 1


def linked(folder: Path, *but: str) -> Path:
    """The package under `folder`, its entries linked, but for those that begin with one of `but`."""
    package = folder / "tilewright"
    package.mkdir()
    for entry in PACKAGE.iterdir():
        if not entry.name.startswith(("__pycache__", *but)):
            (package / entry.name).symlink_to(entry)
    return package


def mutated(mutant: Mutant, folder: Path) -> Path:
    """A copy of the mutant's folder, as `folder`, with its one file changed: that file."""
    shutil.copytree(mutant.path.parent, folder)
    path = folder / mutant.path.name
    path.write_text(path.read_text().replace(mutant.was, mutant.becomes))
    return path


def assert_killed(mutant: Mutant, folder: Path, suites: list[list[str]], **mode: str) -> None:
    """One of these choices of tests fails on the package under `folder`."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TILEWRIGHT_CPU_ISA")
    }
    told = ""
    for wanted in suites:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *wanted],
            env=clean | {"PYTHONPATH": str(folder), "TILEWRIGHT_SHUFFLE": "1"} | mode,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        told += done.stdout[-2000:] + done.stderr[-2000:]
        if (
            done.returncode == 1 or done.returncode < 0
        ):  # below nought: killed by a signal, as it were
            return
        assert done.returncode in (0, 5), told  # 5: nothing chosen; else not a test that failed
    pytest.fail(f"survived: {mutant}\n{told}")


def suite_of(op: str) -> list[str]:
    return sorted(str(path) for path in ROOT.glob(f"tests/test_{op}*.py"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("mutant", TRITON, ids=name)
def test_a_mutant_is_killed(mutant: Mutant, tmp_path: Path):
    mutated(mutant, linked(tmp_path, "kernels") / "kernels")
    # what moves too much is right: the traffic is what tells
    suites = [suite_of(mutant.op), ["tests/test_traffic.py", "-k", mutant.op]]
    assert_killed(mutant, tmp_path, suites, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension's object files, csrc/cpu's in units/."""
    folder = tmp_path_factory.mktemp("objects")
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-t", str(folder), "-b", str(folder / "lib")],
        env=os.environ | {"TILEWRIGHT_REQUIRE_EXT": "1"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr[-4000:]
    return folder


def units_with(path: Path) -> list[Path]:
    """The files of csrc/cpu that are compiled and include `path`, or it itself."""
    if path.suffix == ".cpp":
        return [path]
    users = [p for p in CPU.iterdir() if f'#include "{path.name}"' in p.read_text()]
    return sorted({unit for user in users for unit in units_with(user)})


@pytest.mark.slow
@pytest.mark.xdist_group("objects")  # one worker: they are built once
@pytest.mark.skipif(torch.version.cuda is not None, reason="links what a CPU build is made of")
@pytest.mark.parametrize("mutant", CPP, ids=name)
def test_a_cpp_mutant_is_killed(mutant: Mutant, objects: Path, tmp_path: Path):
    level = _native.cpu_isa()
    folder = mutated(mutant, tmp_path / "cpu").parent
    instead = {}
    for unit in units_with(mutant.path):
        was, becomes = objects / f"units/{unit.stem}.{level}.o", tmp_path / f"{unit.stem}.o"
        ninja = ["ninja", "-C", str(was.parent), "-t", "commands", str(was)]
        command = subprocess.run(ninja, capture_output=True, text=True, check=True).stdout.strip()
        command = command.splitlines()[-1].replace(str(was), str(becomes))
        command = command.replace(str(unit), str(folder / unit.name))
        subprocess.run(command, shell=True, check=True, capture_output=True)
        instead[was] = becomes
    package = linked(tmp_path, "_C.")
    (extension,) = PACKAGE.glob("_C.*.so")
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    linked_objects = [str(instead.get(path, path)) for path in sorted(objects.rglob("*.o"))]
    subprocess.run(
        ["g++", "-shared", "-fopenmp", *linked_objects, *libraries, "-o", package / extension.name,
         "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert_killed(mutant, tmp_path, [suite_of(mutant.op)], TILEWRIGHT_CPU_ISA=level)
