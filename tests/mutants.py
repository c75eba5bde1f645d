"""The mutants of test_mutants.py: each takes one term out of a kernel, and why those that live do."""

import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

from tilewright.bench import harness

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "csrc/cpu"
KILLERS = ROOT / "tests/killers.json"


class Mutant(NamedTuple):
    path: Path
    was: str
    becomes: str
    op: str  # whose tests must notice


def key(mutant: Mutant) -> str:
    """Its name in killers.json."""
    changes = f"{mutant.op}\n{mutant.was}\n{mutant.becomes}"
    return f"{mutant.path.name} {hashlib.sha256(changes.encode()).hexdigest()[:12]}"


def killers() -> dict[str, str]:
    """By key the test that killed the mutant last."""
    return json.loads(KILLERS.read_text()) if KILLERS.is_file() else {}


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
        ("acc = tl.dot(kept.to(v.dtype), v, acc * alpha[:, None], input_precision=\"ieee\")", "acc = tl.dot(kept.to(v.dtype), v, acc, input_precision=\"ieee\")"),
        ("acc = tl.dot(kept.to(v.dtype)", "acc = tl.dot(p.to(v.dtype)"),
        ("        out *= kept_share(dropout)", "        out *= 1.0"),
        ("    return acc, top, l * alpha + tl.sum(p, 1)", "    return acc, top, l + tl.sum(p, 1)"),
        ("lse = tl.where(m == LOWEST, -float(\"inf\"), (m + tl.log2(l)) * LN2)", "lse = (m + tl.log2(l)) * LN2"),
        ("    l = tl.zeros((BLOCK_M,), tl.float32) + l0", "    l = tl.zeros((BLOCK_M,), tl.float32)"),
        ("(m + tl.log2(l)) * LN2", "m * LN2"),
    ),
    *of(
        "attention_decode",
        "attention_decode",
        ("    hi = tl.minimum(length - S + i + 1, length)\n    lo = rows * 0", "    hi = rows * 0 + length\n    lo = rows * 0"),
        ("        lo = tl.maximum(length - S + i - left, 0)\n        #", "        lo = rows * 0\n        #"),
        ("        first = tl.maximum(length - S + first_row // GROUP - left, 0)", "        first = 0"),
        ("    m = tl.where(share == 0, tl.zeros((BLOCK_M,), tl.float32) + m0, LOWEST)", "    m = tl.zeros((BLOCK_M,), tl.float32) + m0"),
        ("        scale = scale * tl.load(k_scale_ptr + g)", "        scale = scale * tl.load(k_scale_ptr)"),
        ("        value_scale = tl.load(v_scale_ptr + g)\n    k_ptr", "        value_scale = 1.0\n    k_ptr"),
        ("        value_scale = tl.load(v_scale_ptr + g)\n    out", "        value_scale = 1.0\n    out"),
        ("            page = tl.minimum(tl.maximum(page, 0), pages - 1)\n", ""),
        ("acc * alpha[:, None], input_precision", "acc, input_precision"),
        ("        m, l = top, l * alpha + tl.sum(p, 1)", "        m, l = top, l + tl.sum(p, 1)"),
        ("        acc = acc * alpha + tl.sum(part", "        acc = acc + tl.sum(part"),
        ("        l = l * alpha + tl.sum(l_part * weight, 0)", "        l = l + tl.sum(l_part * weight, 0)"),
        ("        half = tl.where(size == 0x7F, half | 0x7E00, half)\n", ""),
        ("(size << 7) | ((x & 0x80) << 8)", "(size << 7)"),
        ("        row = cols % PAGE", "        row = cols"),
    ),
    *of(
        "_attention_append",
        "attention_decode",
        ("tl.where(d < R // 2, -1.0, 1.0)", "1.0"),
        ("tl.where(d % 2 == 0, -1.0, 1.0)", "1.0"),
        ("        column = i * 2 if INTERLEAVED and DOUBLED else i", "        column = i"),
        ("    small = (size * 512.0 + 12582912.0)", "    small = (size * 512.0 + 12582913.0)"),
        ("((bits >> 20) & 1)) >> 20)", "1) >> 20)"),
        ("    code = tl.where(x != x, 0x7F, code)\n", ""),
        ("    size = tl.minimum(tl.abs(x), 448.0)", "    size = tl.abs(x)"),
        ("tl.minimum(tl.maximum(y, -128.0), 127.0)", "y"),
        ("                y = tl.div_rn(y, tl.load(v_scale_ptr + g))", "                y = y"),
        ("place = page.to(tl.int64), at % PAGE", "place = page.to(tl.int64), at"),
        ("        kept = there & (at >= 0) & (at < T)", "        kept = there"),
        ("            kept = kept & (page >= 0) & (page < pages)\n", ""),
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
        ('        l = tl.where(l == 0, float("inf"), l)', "        l = l"),
        ("        s += x.to(tl.float32) * LOG2E", "        s += x.to(tl.float32)"),
        ("        at = bias_ptr + b * stride_bb + h * stride_bh", "        at = bias_ptr + h * stride_bh"),
        ("    return (x ^ y ^ (x >> 15)) * 0x846CA68B", "    return (x ^ y) * 0x846CA68B"),
        ("        a = mixed((a ^ (a >> 16)) + low, high)", "        a = mixed((a ^ (a >> 16)) + low, low)"),
        ("            draw = mixed(col[:, None] + a[None, :], b[None, :])", "            draw = mixed(col[:, None] + a[None, :], a[None, :])"),
        ('    return 1.0 / tl.where(p < 1, 1.0 - p, float("inf"))', "    return 1.0 / (1.0 - p)"),
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
        ("        still = (many <= 1) & (not HAS_SINKS)", "        still = (many <= 2) & (not HAS_SINKS)"),
        ("        dp = undropped(dp * kept_share(dropout), words, cols, dropout, False, DROPOUT)", "        dp = dp * kept_share(dropout)"),
        ("    dv = tl.dot(kept.to(dout.dtype)", "    dv = tl.dot(p.to(dout.dtype)"),
        ("        dp = tl.where(kept == 0, 0.0, dp * kept_share(dropout))", "        dp = dp * kept_share(dropout)"),
        ("        dv *= kept_share(dropout)", "        dv *= 1.0"),
    ),
    *of(
        "_attention_dbias",
        "attention_bias",
        ("- mean[:, None]) - drift[:, None])", "- mean[:, None]))"),
        ("    last_row = S if OVER_S else first_row + BLOCK_M", "    last_row = first_row + BLOCK_M"),
        ("        h0 = at.to(tl.int32)\n", "        h0 = 0\n"),
        ("        b0 = at.to(tl.int32)\n", "        b0 = 0\n"),
        ("            if not OVER_T:  # of the keys", "            if True:  # of the keys"),
        ("tl.sum(acc, 0)[None, :]", "acc"),
        ("tl.sum(acc, 1)[:, None]", "acc"),
    ),
    *of("_attention_dbias", "attention_dropout", ("        dp = undropped(dp * kept_share(dropout)", "        dp = undropped(dp")),
    *of(
        "_quant_weight",
        "quant_linear",
        (" - (REST + LESS) * 1.0\n", " - REST * 1.0\n"),
        ("            w -= o\n", "            w -= 0 * o\n"),
        ("            s = tl.where(mask_n, 1.0, 0.0)\n", ""),
        ("        w = tl.load(o_ptr + packed)", "        w = tl.load(o_ptr + (packed ^ 1))"),
        ("            w = s[:, None] * w + o\n", "            w = s[:, None] * w\n"),
        ("            w = tl.interleave(w, _codes(packed, opaque, 4, BITS, LESS))", "            w = tl.interleave(_codes(packed, opaque, 4, BITS, LESS), w)"),
        ("            packed = tl.interleave(packed & 15, packed >> 4)", "            packed = tl.interleave(packed >> 4, packed & 15)"),
    ),
    *of(
        "_quant_weight",
        "quant_linear_rows",
        ("tl.load(block_ptr + at // 256, mask=mask_n, other=0.0)", "tl.load(block_ptr)"),
        (" + tl.load(shift_ptr)\n", "\n"),
        ("    each = blocks.repeat_interleave(256)[: found.numel()]\n", "    each = blocks[0]\n"),
    ),
    *of(
        "_quant_weight",
        "quant_linear_rows",
        ("        theirs = offset if kind == CODEBOOK else offset[rows]\n", "        theirs = offset\n"),
        ('    per_group = triton.cdiv(group, block["BLOCK_K"])\n', '    per_group = max(1, group // block["BLOCK_K"])\n'),
        ("            of_group = group if whole else columns.stop - columns.start\n", "            of_group = group\n"),
        ("        theirs = offset if kind == CODEBOOK else offset[:, groups]\n", "        theirs = offset\n"),
    ),
    *of(
        "quant_linear",
        "quant_linear_rows",
        ("        last = tl.minimum(first + share, tiles)\n", "        last = first + share\n"),
        ("        y_ptr += tl.program_id(2).to(tl.int64) * M * stride_ym\n", ""),
        ("        y += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)\n", "        y += 0.0\n"),
    ),
    *of(
        "quant_linear",
        "quant_linear",
        ("        acc += tl.reshape(s, (1, BLOCK_N, SPLIT)) * part", "        acc = tl.reshape(s, (1, BLOCK_N, SPLIT)) * part"),
        ("        acc += tl.reshape(s, (1, BLOCK_N, SPLIT)) * part", "        acc += part"),
        ("        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]", "        y += 0.0"),
        ("        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]", "        acc += 0.0"),
        ("            mask = mask & (k + j < k_end)[:, None]\n", "            mask = mask\n"),
        ("        top = tl.maximum(top, tl.max(tl.abs(x), axis=1))", "        top = tl.max(tl.abs(x), axis=1)"),
        ('    precision = "tf32x3" if dtype == torch.float32 else "tf32"', '    precision = "tf32"'),
    ),
    *of(
        "_int8",
        "int8_linear",
        ("    scale = tl.where(usable, scale, 0.0)\n", ""),
        ("    return tl.where(size < float(\"inf\"), size, float(\"inf\"))", "    return size"),
        ("    return tl.where(largest < float(\"inf\"), scale, float(\"nan\")), inverse", "    return scale, inverse"),
        ("    code = (x * inverse + 12582912.0) - 12582912.0", "    code = x * inverse"),
        ("    x = tl.where(inverse == 0.0, 0.0, x)\n", ""),
    ),
    *of(
        "int8_linear",
        "int8_linear",
        ("(q ^ 128).to(tl.int8, bitcast=True)", "q.to(tl.int8, bitcast=True)"),
        ("        largest = tl.maximum(largest, size_of(x))", "        largest = size_of(x)"),
        ("    y = acc.to(tl.float32) * scale[:, None] * x_scale[None, :]", "    y = acc.to(tl.float32) * scale[:, None]"),
        ("    y = acc.to(tl.float32) * scale[:, None] * x_scale[None, :]", "    y = acc.to(tl.float32) * x_scale[None, :]"),
        ("            x_mask = x_mask & (start + j < K)[:, None]\n", ""),
        ("        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]", "        y += 0.0"),
    ),
    *of(
        "rms_norm_int8",
        "rms_norm_int8",
        ("    y = h * tl.rsqrt(tl.sum(h * h, axis=1) / N + eps)[:, None]", "    y = h * tl.rsqrt(tl.sum(h * h, axis=1) / N)[:, None]"),
        ("        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset\n        y = y * w[None, :]", "        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)\n        y = y * w[None, :]"),
        ("        h = (h.to(tl.float32) + res.to(tl.float32)).to(h_ptr.dtype.element_ty)\n        tl.store(h_ptr + rows", "        tl.store(h_ptr + rows"),
        ("        squares += h * h\n", "        squares = h * h\n"),
        ("        largest = tl.maximum(largest, size_of(y))", "        largest = size_of(y)"),
        ("        y *= tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset", "        y = y"),
        ("            tl.store(h_ptr + cols, h, mask=cols < N)\n", "            pass\n"),
    ),
    *of("_tune", "int8_linear", ("    if dividing >= 32:\n", "    if True:\n")),
    # offsets in 32 bits
    *of("rms_norm", "addressing", ("    # int64: row * stride passes 2^31 for long, wide activations\n    rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "    rows = tl.program_id(0) * BLOCK_M")),
    *of("rms_norm", "addressing", ("    pid = tl.program_id(0).to(tl.int64)\n    cols = tl.arange(0, BLOCK_N)\n    if HAS_W:", "    pid = tl.program_id(0)\n    cols = tl.arange(0, BLOCK_N)\n    if HAS_W:")),
    *of("add_rms_norm", "addressing", ("    rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "    rows = tl.program_id(0) * BLOCK_M")),
    *of("_glu", "addressing", ("    # int64: row * stride passes 2^31 for long, wide activations\n    rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "    rows = tl.program_id(0) * BLOCK_M")),
    *of("rope", "addressing", ("    row = tl.program_id(0).to(tl.int64) * BLOCK_M", "    row = tl.program_id(0) * BLOCK_M")),
    *of("_tile", "addressing", ("rows.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)", "rows[:, None] * stride + d[None, :], mask=mask, other=0.0)")),
    *of("rms_norm_int8", "addressing", ("    # int64: row * stride passes 2^31 for long, wide activations\n    rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "    rows = tl.program_id(0) * BLOCK_M")),
    *of("moe_route", "addressing", ("):  # fmt: skip\n    rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "):  # fmt: skip\n    rows = tl.program_id(0) * BLOCK_M")),
    *of("moe_route", "addressing", ("    dx = ds s (1 - s), or s (ds - sum ds s).\"\"\"\n    rows = tl.program_id(0).to(tl.int64) * BLOCK_M", "    \"\"\"\n    rows = tl.program_id(0) * BLOCK_M")),
    *of("moe_losses", "addressing", ("    sequence, block = (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64)", "    sequence, block = pid // blocks, pid % blocks")),
    *of("moe_losses", "addressing", ("    sequence, first = (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64) * BLOCK_M", "    sequence, first = pid // blocks, pid % blocks * BLOCK_M")),
    *of("moe_combine", "addressing", ("    row = tl.program_id(0).to(tl.int64)\n    slot", "    row = tl.program_id(0)\n    slot")),
    *of("int8_linear", "addressing", ("    row = tl.program_id(0).to(tl.int64)\n", "    row = tl.program_id(0)\n")),
    *of("int8_linear", "addressing", ("    m = tl.program_id(0).to(tl.int64) * BLOCK_M", "    m = tl.program_id(0) * BLOCK_M")),
    *of("quant_linear", "addressing", ("x_rows = x_ptr + m.to(tl.int64) * stride_xm", "x_rows = x_ptr + m * stride_xm")),
]  # fmt: skip


def listed(file: str) -> list[Mutant]:
    """Those that another file of tests/ lists."""
    changes = harness.load(ROOT / f"tests/{file}.py").CHANGES
    return [mutant for path, op, *texts in changes for mutant in of(path, op, *texts)]


TRITON += listed("mutants_moe")
CPP = listed("mutants_cpp")

# Mutants that live, and why.
SURVIVORS = {
    "tl.where((norm < 0)[None, :], 0.0, dp - mean[None, :])": (
        "a row that sees one key has dP equal to its mean in the interpreter, whose two products"
        " round alike; tensor cores of two tile shapes do not"
    ),
    "seen = visible(cols[None, :], lo[:, None], hi[:, None], T, True) & (rows < S)[:, None]": (
        "a row past the last has zeros for q, dout and its norm, and adds 0 seen or not; the mask keeps"
        " an infinite key from making nan of that"
    ),
    "  const int64_t left = bytes - byte;": (
        "what the mask keeps out is a column no product takes, read past the weight: the sanitizers' to see"
    ),
}


def keep(notes: Path) -> None:
    """Takes what notes say, "key TAB test" a line, into killers.json, and out of it who is no more."""
    told = dict(line.split("\t") for line in notes.read_text().splitlines())
    known = {key(mutant) for mutant in [*TRITON, *CPP]}
    kept = {who: test for who, test in (killers() | told).items() if who in known}
    KILLERS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
