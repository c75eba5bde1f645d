"""`tilewright generate | quantize | eval | verify | doctor | bench | inspect | tune`; the last three
are bench/commands.py's.

What a user got wrong is one line on stderr and exit code 2; a fault that `doctor` or `verify` finds
is exit code 1.  Each command imports what it needs, so `--help` and `doctor` work without the
[models] extra.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(
        f"tilewright: the command line needs {error.name}: pip install 'tilewright[cli]'"
    ) from None

from tilewright.bench import commands
from tilewright.bench.commands import JsonOption, ThreadsOption

app = typer.Typer(
    name="tilewright",
    help="Fused kernels for PyTorch, and a language model running on them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Typer 0.12 raises Click's exception, later releases a copy of their own: BadParameter is either's.
_UsageProblem: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Activations(str, Enum):
    float = "float"
    int8 = "int8"
    int8_token = "int8_token"


ModelPath = Annotated[
    Path, typer.Option("--model", "-m", help="A GGUF file or a Hugging Face folder.")
]
DTypeOption = Annotated[
    DType | None, typer.Option("--dtype", help="Of activations and of weights not quantised.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
ActivationsOption = Annotated[
    Activations | None,
    typer.Option(
        "--activations",
        help="Round activations to 8 bits, faster: int8 in blocks of 32 columns, int8_token by token, where "
        "weights are 8 bits by row.",
        show_default="the model's own, else float",
    ),
]


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: {name!r} is not a device such as cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: no {name} here, torch sees {torch.cuda.device_count()} GPUs")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: {name!r} is neither cpu nor cuda")
    return device


class Method(str, Enum):
    rtn = "rtn"
    gptq = "gptq"
    awq = "awq"
    hqq = "hqq"
    smoothquant = "smoothquant"


class Format(str, Enum):
    compressed_tensors = "compressed-tensors"
    gptq = "gptq"
    hqq = "hqq"
    gguf = "gguf"


@contextlib.contextmanager
def _load_bar(what: str = "loading layers") -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; nothing where that is not a terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _load(
    path: Path,
    dtype: DType | None,
    device: str | None,
    activations: Activations | None,
    **kwargs: Any,
) -> Any:
    from tilewright import _native
    from tilewright.models import Llama, Mixtral
    from tilewright.models._tokenizer import read_json

    if _native.fault is not None:
        raise ValueError(_native.fault)
    if not path.exists():
        raise FileNotFoundError(f"--model: no file or folder {path}")
    wanted = None if dtype is None else getattr(torch, dtype.value)
    place = _device(device)
    config = path / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else None
    model = Mixtral if kind in Mixtral.config_type.model_types else Llama
    with _load_bar() as progress:
        return model.from_pretrained(
            path,
            dtype=wanted,
            device=place,
            activations=None if activations is None else activations.value,
            progress=progress,
            **kwargs,
        )


def _implementation(device: torch.device) -> str:
    """What serves the model's ops on `device`, most of them first."""
    import tilewright

    served = [r.implementation for r in tilewright.explain() if r.device == device.type]
    return ", ".join(sorted(set(served), key=served.count, reverse=True)) or "eager PyTorch"


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; put into the chat template.")],
    model: ModelPath,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: all.")] = 0,
    top_p: Annotated[float, typer.Option(max=1.0, help="Above 0; 1: all.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 0; 1: none.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End at this text; may be given again.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go past end of text.")] = False,
    dtype: DTypeOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    activations: ActivationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer PROMPT with a language model, streaming; speed at the end."""
    if threads is not None:
        torch.set_num_threads(threads)
    llama = _load(model, dtype, device, activations)
    tokenizer = llama.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model}: there is no tokeniser beside the weights")
    text = prompt if raw else tokenizer.chat([{"role": "user", "content": prompt}])

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    result = llama.generate(
        tokenizer.encode(text, special=raw),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        stream=None if as_json else show,
    )
    # the prompt's pass yields the first token; an end token costs a step and is not among tokens
    steps = len(result.tokens) - (result.finish != "eos")
    speed = {
        "tokens_per_second": _rate(steps, result.decode_seconds),
        "prefill_tokens_per_second": _rate(result.prompt_tokens, result.prefill_seconds),
    }
    used = {
        "activations": result.activations,
        "dtype": str(llama.dtype).removeprefix("torch."),
        "device": str(llama.device),
        "implementation": _implementation(llama.device),
        "threads": torch.get_num_threads(),
    }
    if as_json:
        typer.echo(json.dumps({"text": result.text, "tokens": result.tokens, **speed, **used}))
        return
    typer.echo()
    typer.echo(
        f"{len(result.tokens)} tokens at {speed['tokens_per_second']:.1f}/s, "
        f"prompt of {result.prompt_tokens} at {speed['prefill_tokens_per_second']:.1f}/s; "
        f"{used['activations']} activations, {used['dtype']}, {used['implementation']}, "
        f"{used['threads']} threads",
        err=True,
    )


def _rate(count: int, seconds: float) -> float:
    """Count a second; 0 where nothing was timed."""
    return count / seconds if count > 0 and seconds > 0 else 0.0


@app.command()
def quantize(
    model: ModelPath,
    out: Annotated[
        Path, typer.Option("--out", help="A folder to be made, or gone on with; a file for gguf.")
    ],
    method: Annotated[Method, typer.Option(help="rtn and hqq need no calibration.")] = Method.gptq,
    bits: Annotated[
        int | None, typer.Option(help="4 or 8.", show_default="4, of smoothquant 8")
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale; -1: a whole row.",
            show_default="128, of gguf 32, of smoothquant -1",
        ),
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="With zero-points.")] = False,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="gptq: large inputs first.")
    ] = False,
    damping: Annotated[float, typer.Option(min=0.0, help="gptq's.")] = 0.01,
    embeddings: Annotated[
        int, typer.Option(help="gguf: 4 or 8 bits for embeddings and head; 0 leaves them.")
    ] = 0,
    calibration: Annotated[
        Path | None, typer.Option(help="A text; gptq, awq and smoothquant need one.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of it, at the most.")] = 64,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    format: Annotated[Format | None, typer.Option(help="Of the files; default: by method.")] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantise a language model's linear layers, one at a time; goes on where it was stopped."""
    from tilewright.bench import perplexity
    from tilewright.models import _quantize
    from tilewright.models.llama import opened
    from tilewright.quant.apply import WITH_INPUTS, QuantConfig

    if threads is not None:
        torch.set_num_threads(threads)
    if not model.exists():
        raise FileNotFoundError(f"--model: no file or folder {model}")
    if group is None:
        group = 32 if format == Format.gguf else 0
    elif group == 0:
        raise ValueError("--group must be 1 or more, or -1 for a whole row, not 0")
    if bits == 0:
        raise ValueError("--bits must be 4 or 8, not 0")
    config = QuantConfig(
        method.value, bits or 0, group, False if asymmetric else None,  # type: ignore[arg-type]
        act_order=act_order, damping=damping, embeddings=embeddings,
    )  # fmt: skip
    if format is None:
        own = {Method.hqq: Format.hqq}.get(method, Format.compressed_tensors)
        format = Format.gptq if act_order else own  # which alone has an order of columns
    ids = None
    if method.value in WITH_INPUTS:
        if calibration is None:
            raise ValueError(f"--calibration: {method.value} needs a text")
        sizes, _, tokenizer = opened(model, torch.float32, torch.device("cpu"), "float")
        ids = perplexity.windows(tokenizer, sizes.context, calibration, window, samples)
    with _load_bar("quantising layers") as progress:
        _quantize.quantize(
            model, out, config, calibration=ids, format=format.value, progress=progress
        )
    size, before = (
        sum(f.stat().st_size for f in (path.glob("*.safetensors") if path.is_dir() else [path]))
        for path in (out, model)
    )
    told = {
        "out": str(out),
        "method": method.value,
        "bits": config.bits,
        "bytes": size,
        "bytes_before": before,
    }
    if as_json:
        typer.echo(json.dumps(told))
        return
    typer.echo(
        f"{out}: {size / 1e6:.1f} MB, of {before / 1e6:.1f}; {method.value}, {config.bits} bits, {format.value}"
    )


@app.command("eval")
def evaluate(
    model: ModelPath,
    text: Annotated[Path, typer.Option("--perplexity", help="A text to be predicted.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    most: Annotated[int | None, typer.Option(min=1, help="Windows at the most.")] = None,
    dtype: DTypeOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    activations: ActivationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a model's perplexity on a text."""
    from tilewright.bench import perplexity

    if threads is not None:
        torch.set_num_threads(threads)
    if not text.is_file():
        raise FileNotFoundError(f"--perplexity: no file {text}")
    llama = _load(model, dtype, device, activations)
    ids = perplexity.windows(llama.tokenizer, llama.context, text, window, most)
    with _load_bar("windows") as progress:
        found = perplexity.perplexity(llama, ids, progress)
    if as_json:
        told = {"perplexity": found, "windows": len(ids), "window": window, "tokens": ids.numel()}
        typer.echo(json.dumps(told))
        return
    typer.echo(f"{len(ids)} windows of {window} tokens, perplexity {found:.4f}")


@app.command()
def verify(
    model: ModelPath,
    tokens: Annotated[int, typer.Option(min=2, help="Positions whose logits to compare.")] = 256,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare our logits with transformers' on the same weights; exit 1 where they differ."""
    from tilewright.bench import verify as check

    if not model.exists():
        raise FileNotFoundError(f"--model: no file or folder {model}")
    found = check.verify(model, tokens=tokens, threads=threads or torch.get_num_threads())
    if as_json:
        typer.echo(json.dumps(found))
    else:
        Console().print(check.table(found))
    if not found["passed"]:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine offers, what is wrong, and how to mend it; exit 1 on a fault."""
    from tilewright import doctor as surgery

    report = surgery.report()
    if as_json:
        typer.echo(json.dumps(report))
    else:
        table = Table("", "", show_header=False, box=None)
        for name, value in report["facts"].items():
            table.add_row(name, str(value))
        console = Console()
        console.print(table)
        for note in report["notes"]:
            console.print(f"note: {note}", markup=False)
        for fault in report["faults"]:
            console.print(f"FAULT: {fault['fault']}\n  fix: {fault['fix']}", markup=False)
        console.print(f"{len(report['faults'])} faults")
    if report["faults"]:
        raise typer.Exit(1)


app.command()(commands.bench)
app.command()(commands.inspect)
app.command()(commands.tune)


def _one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 for a fault it found, 2 for what the user can mend."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="tilewright", standalone_mode=False)
    except _UsageProblem as problem:
        message, code = _one_line_of_usage(problem), 2
    except ModuleNotFoundError as problem:
        message = f"{problem.name} is not installed: pip install 'tilewright[verify]'"
        code = 2
    except BrokenPipeError:
        # the reader went away: keep Python from complaining again while it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message, code = "", 1
    except (ValueError, OSError, torch.OutOfMemoryError) as problem:
        message, code = _one_line(problem), 2
    except (KeyboardInterrupt, typer.Abort):
        message, code = "stopped", 130
    else:
        message = ""
    if message:
        print(f"tilewright: {message}", file=sys.stderr)
    sys.exit(code)


def _one_line_of_usage(problem: Any) -> str:
    return " ".join(problem.format_message().split())


if __name__ == "__main__":
    main()
