"""What the compiler makes of every Triton kernel, with no GPU: python -m tilewright.lab.compile.

    python -m tilewright.lab.compile rms_norm attention --arch 80 90     one JSON line a variant
    python -m tilewright.lab.compile --arch 90 --table                   a Markdown table

Each kernel file's variants() is compiled for each architecture, and ptxas asked again about the PTX;
so is, in a checkout and where nvcc is, every entry of csrc/cuda/*.cu.
A function jitted under TRITON_INTERPRET=1 cannot be compiled: this is a process of its own.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
CUDA = Path(__file__).resolve().parents[3] / "csrc/cuda"
WARP_REGISTERS = 256  # registers are given to a warp in lots of this


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor (CUDA C++ programming guide, table of compute capabilities)."""

    warps: int
    blocks: int
    shared: int  # KiB, all blocks together; a block takes 1 KiB more than it asks for
    block_shared: int  # KiB, one block
    matrix: str  # its newest matrix instruction

    def resident_warps(self, warps: int, registers: int, shared: int) -> int:
        """Warps that fit at once, of blocks of `warps`, registers a thread, bytes of shared memory."""
        a_warp = -(-registers * 32 // WARP_REGISTERS) * WARP_REGISTERS
        blocks = min(
            self.blocks,
            self.warps // warps,
            65536 // (a_warp * warps),
            self.shared * 1024 // (shared + 1024),
        )
        return blocks * warps


CHIPS = {
    80: Chip(64, 32, 164, 163, "mma"),
    86: Chip(48, 16, 100, 99, "mma"),
    89: Chip(48, 24, 100, 99, "mma"),
    90: Chip(64, 32, 228, 227, "wgmma"),
    100: Chip(64, 32, 228, 227, "tcgen05"),
    120: Chip(48, 24, 100, 99, "mma"),
}
MATRIX = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync"}


@dataclass(frozen=True)
class Built:
    """One variant on one architecture; bytes, registers a thread, warps a multiprocessor."""

    file: str
    kernel: str
    constants: dict[str, Any]
    options: dict[str, Any]
    arch: int
    types: str = ""  # of what its pointers point to, in order: "bf16 fp32"
    error: str | None = None
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    resident_warps: int = 0
    dot: str | None = None  # operands of tl.dot: bf16, f32 (no tensor core's), tf32, tf32x3, ...
    matrix: str | None = None  # the newest matrix instruction in it
    loads: int = 0  # global loads, asynchronous copies included
    wide_loads: int = 0  # of 16 bytes a thread
    warnings: tuple[str, ...] = ()


def files() -> list[str]:
    """The kernel files that ship variants."""
    paths = sorted(KERNELS.glob("*.py"))
    return [path.stem for path in paths if "def variants(" in path.read_text()]


def cuda_files() -> list[str]:
    """The CUDA C++ sources that can be compiled here, as "quant_linear.cu"."""
    return sorted(path.name for path in CUDA.glob("*.cu")) if shutil.which("nvcc") else []


def _assemble(ptx: str, arch: int) -> tuple[int, int, int, tuple[str, ...]]:
    """Registers, bytes spilled, stack, and warnings, as ptxas says."""
    import triton

    tool = "ptxas-blackwell" if arch >= 100 else "ptxas"
    ptxas = Path(triton.__path__[0], "backends/nvidia/bin", tool)
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name={target[1]}", str(source)]
        done = subprocess.run(
            [*command, "-o", str(Path(folder) / "kernel.cubin")], capture_output=True, text=True
        )
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"ptxas: {said}")
    registers = re.search(r"Used (\d+) registers", said)
    frame = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    assert registers is not None and frame is not None, said
    warnings = tuple(line for line in said.splitlines() if "serializ" in line or "warning" in line)
    return int(registers[1]), int(frame[2]) + int(frame[3]), int(frame[1]), warnings


def _operands(asm: dict[str, Any]) -> str | None:
    """Of what products are taken."""
    if "ttir" not in asm:  # Gluon's
        dots = re.findall(r"warp_group_dot .*? : .*?x(b?f\d+)[,>]", asm["ttgir"])
        return str(dots[0]) if dots else None
    ttir = asm["ttir"]
    dots = re.findall(r"tt\.dot (.*?) : tensor<[\dx]*x(\w+)>", ttir)
    if not dots:
        return None
    for kind in ("tf32x3", "tf32"):
        if any(kind in said and operand == "f32" for said, operand in dots):
            return kind
    return str(dots[0][1])


def _is_wide(name: str, constants: dict[str, Any]) -> bool:
    # FULL False: a group that no power of two divides
    return name.startswith("stride_") or (
        name in ("N", "K", "E", "R", "group", "width") and constants.get("FULL", True)
    )


def compiled(variant: tuple[Any, ...], arch: int, divisible: Collection[str] | None = None) -> Any:
    """Triton's compiled kernel of a variant (kernel, signature, constants, options).

    `divisible` names the arguments that are multiples of 16; None: every pointer, row stride and
    width, as for wide tensors.  ValueError where the variant does not fit the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, options = variant
    # every argument that is not a constant is listed, and nothing else
    missing = [n for n in kernel.arg_names if n not in signature and n not in constants]
    extra = [n for n in (*signature, *constants) if n not in kernel.arg_names]
    if missing or extra:
        raise ValueError(f"variants() lacks {missing} and gives unknown {extra}")
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    if divisible is None:
        divisible = [
            name
            for name, t in types.items()
            if t.startswith("*") or (t != "constexpr" and _is_wide(name, constants))
        ]
    wide = {(j,): [["tt.divisibility", 16]] for j, name in enumerate(types) if name in divisible}
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource(kernel, types, constants, wide)
    else:
        source = ASTSource(kernel, types, constants, wide)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def build(
    file: str, variant: tuple[Any, ...], arch: int, divisible: Collection[str] | None = None
) -> Built:
    """Compile one variant (see compiled); what went wrong is in `error`."""
    kernel, signature, constants, options = variant
    pointees = dict.fromkeys(
        re.findall(r"^(?:\*|tensordesc<)(\w+)", "\n".join(signature.values()), re.M)
    )
    about: dict[str, Any] = {
        "file": file,
        "kernel": kernel.__name__,
        "constants": {
            k: v if isinstance(v, (int, str)) else str(v)
            for k, v in constants.items()
            if v is not None  # a pointer that the launch has none for
        },
        "options": options,
        "arch": arch,
        "types": " ".join(pointees),
    }
    try:
        built = compiled(variant, arch, divisible)
        ptx = built.asm["ptx"]
        assembled = _assemble(ptx, arch)
    except Exception as error:  # the compiler's own kinds are not public
        return Built(**about, error=f"{type(error).__name__}: {error}"[:2000])
    registers, spills, stack, warnings = assembled
    shared, warps = built.metadata.shared, built.metadata.num_warps
    return Built(
        **about,
        registers=registers,
        spills=spills,
        stack=stack,
        shared=shared,
        resident_warps=CHIPS[arch].resident_warps(warps, registers, shared),
        dot=_operands(built.asm),
        matrix=next((name for name, text in MATRIX.items() if re.search(text, ptx)), None),
        **_loads(ptx),
        warnings=warnings,
    )


def _loads(ptx: str) -> dict[str, Any]:
    copies = r"ld\.global|cp\.async\.c[ag]|cp\.async\.bulk\.tensor\S*\.shared::cluster\.global"
    loads = re.findall(rf"^.*\b(?:{copies})\S*.*$", ptx, re.M)
    wide = r"cp\.async\.bulk|\.v4\.[bfu]32|\.v2\.[bu]64|, 0x10\b|, 16\b"
    return {"loads": len(loads), "wide_loads": sum(bool(re.search(wide, x)) for x in loads)}


def build_cuda(file: str, arch: int) -> list[Built]:
    """Every kernel of a CUDA source; what went wrong is in `error`, of a row of its own."""
    target = f"{arch}a" if arch >= 90 else str(arch)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-cubin", "-Xptxas", "-v",
             f"-gencode=arch=compute_{target},code=sm_{target}", "--keep", "--keep-dir", folder,
             str(CUDA / file), "-o", f"{folder}/unit.cubin"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            said = f"nvcc: {done.stdout}{done.stderr}"[:2000]
            return [Built(file=file, kernel=file, constants={}, options={}, arch=arch, error=said)]
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    log, rows = done.stdout + done.stderr, []
    for name, text in re.findall(r"\.entry (\w+)\((.*?)(?=\.entry |\Z)", ptx, re.S):
        said = log[log.index(f"Function properties for {name}\n") :]
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
        )
        used = re.search(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", said)
        threads = re.search(r"\.maxntid (\d+)", text)
        assert frame is not None and used is not None, said
        warps = int(threads[1]) // 32 if threads else 32
        shared = int(used[2] or 0)
        rows.append(
            Built(
                file=file,
                kernel=_demangled(name),
                constants={},
                options={"num_warps": warps},
                arch=arch,
                registers=int(used[1]),
                spills=int(frame[2]) + int(frame[3]),
                stack=int(frame[1]),
                shared=shared,
                resident_warps=CHIPS[arch].resident_warps(warps, int(used[1]), shared),
                matrix=next((kind for kind, t in MATRIX.items() if re.search(t, text)), None),
                **_loads(text),
            )
        )
    return rows


def _demangled(name: str) -> str:
    """kernel<float, 1, true> of its mangled name, namespaces and arguments left out."""
    done = subprocess.run(["c++filt", name], capture_output=True, text=True)
    text = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", done.stdout.strip() or name)
    return re.sub(r"^void |\([^()]*\)$", "", re.sub(r"\(\w+\)(?=\d)|\(bool\)(?=\d)", "", text))


def built(names: Sequence[str], archs: Sequence[int], bf16: bool = False) -> Iterator[Built]:
    """Every variant of the named kernel files, and kernel of CUDA sources, on each architecture.

    bf16: of the kernel files' variants those alone that take bfloat16.
    """
    for name in names:
        if name.endswith(".cu"):
            for arch in archs:
                yield from build_cuda(name, arch)
            continue
        kernels = importlib.import_module(f"tilewright.kernels.{name}")
        for variant in kernels.variants():
            if bf16 and "*bf16" not in variant[1].values():
                continue
            for arch in archs:
                if arch in getattr(kernels, "ARCHS", archs):
                    yield build(name, variant, arch)


HEAD = (
    "kernel",
    "types",
    "constants",
    "sm",
    "registers",
    "spills",
    "shared",
    "warps",
    "matrix",
    "16-byte loads",
)


def table(rows: Sequence[Built]) -> str:
    """Markdown, a line a variant and architecture."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for row in rows:
        constants = " ".join(f"{k}={v}" for k, v in row.constants.items())
        lines.append(
            (
                f"`{row.kernel}`",
                row.types,
                constants,
                str(row.arch),
                str(row.registers),
                str(row.spills),
                f"{row.shared / 1024:.1f} KiB",
                f"{row.resident_warps} of {CHIPS[row.arch].warps}",
                row.matrix or ("none" if row.dot else ""),
                f"{row.wide_loads} of {row.loads}",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tilewright.lab.compile", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="FILE", help="of kernels/; default: all")
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90, 100], choices=list(CHIPS))
    parser.add_argument("--bf16", action="store_true", help="variants that take bfloat16 alone")
    parser.add_argument("--table", action="store_true", help="Markdown instead of JSON lines")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1: what it jits cannot be compiled")
    there = [*files(), *cuda_files()]
    unknown = sorted(set(options.names) - set(there))
    if unknown:
        parser.error(f"no kernels/{unknown[0]}.py with variants(); there are {', '.join(there)}")
    rows = []
    for row in built(options.names or there, options.arch, options.bf16):
        rows.append(row)
        if not options.table:
            print(json.dumps(asdict(row)), flush=True)
    if options.table:
        print(table(rows))
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
