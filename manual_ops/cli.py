"""The command line: argument checking and printing around the jobs."""

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import distributed

from manual_ops import compare as comparing
from manual_ops import kernel, modes
from manual_ops import train as training
from manual_ops import verify as verifying
from manual_ops.environment import available_backends, environment
from manual_ops.networks import NETWORKS
from manual_ops.registry import OPERATIONS
from manual_ops.steps import Setting, compare_steps

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}

# The network is so small that a second thread costs more than it does, and on a busy machine many times as much.
TRAINING_THREADS = 1

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="CNN layers for PyTorch whose backward passes are derived by hand: check them, train with them, time them.",
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

ThreadsOption = Annotated[int, typer.Option(min=1, help="Threads that torch may use.")]


def mistake(message: str) -> NoReturn:
    """End with one line about a mistake in the command."""
    errors.print(f"manual-ops: {message}", style="red", soft_wrap=True, markup=False)
    raise typer.Exit(2)


def in_a_folder(path: Path | None) -> Path | None:
    """Refuse a file that could not be written before the work is done, not after."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        mistake(f"--json {path}: name a file in a folder that exists")
    return path


JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the results to FILE as JSON.", callback=in_a_folder),
]


def one_of(kind: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    mistake(f"no {kind} {name!r}; {hint}")


def chosen_backends(names: Sequence[str]) -> list[str]:
    for name in names:
        one_of("backend", name, ("native", "python"))
        if name not in available_backends():
            mistake(f"no native kernels: {kernel.native_library_problem()}")
    return list(names) or list(available_backends())


def chosen_device(name: str) -> str:
    if one_of("device", name, ("cpu", "cuda")) == "cuda" and not torch.cuda.is_available():
        mistake("torch finds no usable GPU; run `manual-ops info`")
    return name


@contextmanager
def torchruns_group(device: str) -> Iterator[None]:
    """The process group that torchrun wants, if torchrun started this process."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def write_json(path: Path | None, **parts: Any) -> None:
    if path is None:
        return
    document = {"environment": environment(), **parts}
    try:
        path.write_text(json.dumps(document, default=_to_json, indent=1) + "\n")
    except OSError as error:
        mistake(f"--json {path}: {error.strerror}")


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        for name in ("passed", "largest_difference"):
            if hasattr(value, name):
                found[name] = getattr(value, name)
        found.pop("weights", None)
        return found
    raise TypeError(f"no JSON for {type(value).__name__}")


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def finish(problems: Sequence[str]) -> None:
    """Print what went wrong, if anything, and end with the matching exit code."""
    for problem in problems:
        console.print(f"[red]FAILED[/] {problem}", soft_wrap=True)
    if problems:
        raise typer.Exit(1)


@app.command()
def info(json_file: JsonOption = None) -> None:
    """Versions, processor, threads, and which kernels are there, with the reason where some are not."""
    table = Table("", "", show_header=False, box=None)
    for name, value in environment().lines():
        table.add_row(f"[bold]{name}", value)
    console.print(table)
    write_json(json_file)


@app.command()
def verify(
    op: Annotated[list[str], typer.Option(help="Verify this operation only; may be repeated.")] = [],  # noqa: B006
    backend: Annotated[list[str], typer.Option(help="native or python; by default both. May be repeated.")] = [],  # noqa: B006
    dtype: Annotated[
        list[str],
        typer.Option(help="float64, float32, bfloat16 or float16; by default the first two. May be repeated."),
    ] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Check values, gradients and second derivatives of every operation; exit code 1 if any is wrong."""
    ops = [one_of("operation", name, OPERATIONS) for name in op] or None
    dtypes = [DTYPES[one_of("dtype", name, DTYPES)] for name in dtype or ("float64", "float32")]
    result = run_verify(ops, chosen_backends(backend), dtypes, chosen_device(device))
    print_verification(result)
    write_json(json_file, verification=result)
    finish(verification_problems(result))


def run_verify(
    ops: list[str] | None, backends: list[str], dtypes: list[torch.dtype], device: str = "cpu"
) -> verifying.Verification:
    with progress() as bar:
        task = bar.add_task("verify", total=len(ops or OPERATIONS) * len(backends) * len(dtypes))

        def advance(row: verifying.Row) -> None:
            bar.update(task, advance=1, description=f"verify {row.op}")

        return verifying.verify(ops, backends=backends, dtypes=dtypes, device=device, on_row=advance)


def print_verification(result: verifying.Verification) -> None:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for heading in ("operation", "backend", "dtype"):
        table.add_column(heading, no_wrap=True)
    table.add_column("error", justify="right")
    for heading in ("gradcheck", "gradgradcheck"):
        table.add_column(heading, no_wrap=True)
    for row in sorted(result.rows, key=lambda row: list(OPERATIONS).index(row.op)):
        verdicts = (row.gradcheck, row.gradgradcheck)
        style = None if row.passed else "red"
        table.add_row(row.op, row.backend, row.dtype, f"{row.error:.1e}", *verdicts, style=style)
    console.print(table)
    failed = sum(not row.passed for row in result.rows)
    console.print(f"{len(result.rows) - failed} rows passed, {failed} failed, in {result.seconds:.0f} s")


def verification_problems(result: verifying.Verification) -> list[str]:
    rows = [f"{row.op}, {row.backend}, {row.dtype}: {row.problem}" for row in result.rows if not row.passed]
    return [*result.problems, *rows]


@app.command()
def train(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = training.EPOCHS,
    backend: Annotated[str, typer.Option(help="native or python; by default native where it is built.")] = "",
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: ThreadsOption = TRAINING_THREADS,
    repeat: Annotated[bool, typer.Option("--repeat", help="Train twice and compare the bits.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Train a small CNN on handwritten digits with torch.nn and with manual_ops.nn, from the same weights.

    In several processes, which share each batch:  torchrun --nproc-per-node 2 -m manual_ops train
    """
    console.quiet = errors.quiet = not is_first_process()
    chosen = chosen_backends([backend] if backend else [])[0]
    torch_dtype = DTYPES[one_of("dtype", dtype, DTYPES)]
    device = chosen_device(device)
    torch.set_num_threads(threads)
    with modes.backend(chosen), torchruns_group(device):  # type: ignore[arg-type]
        result = run_train(epochs, dtype=torch_dtype, device=device, repeat=repeat)
    if not is_first_process():
        return  # the first one speaks, and decides on the exit code
    print_training(result)
    write_json(json_file, training=result)
    # A short run has no time to learn; the default one has.
    finish(result.problems() if epochs >= training.EPOCHS else result.problems(accuracy=0))


def run_train(epochs: int, **options: Any) -> training.Training:
    with progress() as bar:
        task = bar.add_task("train")

        def advance(package: str, step: int, steps: int, loss: float) -> None:
            bar.update(task, total=steps, completed=step, description=f"train {package}, loss {loss:.4f}")

        return training.train(epochs, on_step=advance, **options)


def print_training(result: training.Training) -> None:
    table = Table("package", box=None, pad_edge=False)
    for heading in ("first loss", "last loss", "test accuracy", "seconds per epoch"):
        table.add_column(heading, justify="right")
    for run in (result.torch, result.manual_ops):
        table.add_row(
            run.package,
            f"{run.losses[0]:.6f}",
            f"{run.losses[-1]:.6f}",
            f"{run.accuracy:.2%}",
            f"{sorted(run.epoch_seconds)[len(run.epoch_seconds) // 2]:.2f}",
        )
    console.print(table)
    if result.processes > 1:
        console.print(f"manual_ops trained in {result.processes} processes, torch in one, on whole batches")
    console.print(f"largest difference between the two losses of a step: {result.largest_difference:.1e}")
    if result.repeatable is not None:
        console.print(f"manual_ops trained a second time: {'the same bits' if result.repeatable else 'OTHER BITS'}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compare(
    context: typer.Context,
    op: Annotated[str, typer.Option(help="Measure this operation only.")] = "",
    input: Annotated[
        str,
        typer.Option(metavar="N,C,...", help="Input shape of a layer of your own; its options follow as name=value."),
    ] = "",
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
    threads: ThreadsOption = 1,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Use the channels_last memory format.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the short table of layers, with less time for each.")
    ] = False,
    backend: Annotated[str, typer.Option(help="native or python; by default native where it is built.")] = "",
    model: Annotated[
        str,
        typer.Option(
            help=f"Measure a training step of this network: {', '.join(NETWORKS)}, or package.module:function."
        ),
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Images of a training step.")] = 8,
    image: Annotated[int, typer.Option(min=1, help="Side of a training step's images, in pixels.")] = 224,
    json_file: JsonOption = None,
) -> None:
    """Time forward + backward of typical layers, and count the bytes kept in between, against torch's own.

    One layer of your own:  manual-ops compare --op max_pool2d --input 32,64,112,112 --kernel-size 3 --stride 2

    A whole training step:  manual-ops compare --model resnet18 --batch 8

    Options that a weight's shape follows from: out_channels and kernel_size (convolutions), out_features (linear).
    """
    if model:
        if op or input or quick or context.args:
            mistake("--model measures a whole network: it goes without --op, --input, --quick and a layer's options")
        with modes.backend(chosen_backends([backend] if backend else [])[0]):  # type: ignore[arg-type]
            return compare_model(
                Setting(model, batch, image, DTYPES[one_of("dtype", dtype, DTYPES)], threads, channels_last), json_file
            )
    layers = chosen_layers(op, input, context.args, quick)
    settings = {
        "dtype": DTYPES[one_of("dtype", dtype, DTYPES)],
        "threads": threads,
        "channels_last": channels_last,
        "backend": chosen_backends([backend] if backend else [])[0],
        "seconds_per_layer": 0.5 if quick else 2.0,
    }
    try:
        result = run_compare(layers, **settings)
    except (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError) as error:
        if not input:
            raise
        mistake(str(error).strip().splitlines()[0])
    print_comparison(result)
    write_json(json_file, comparison=result)
    finish(comparison_problems(result))


def compare_model(setting: Setting, json_file: Path | None) -> None:
    with progress() as bar:
        task = bar.add_task(f"compare {setting.network}", total=None)
        try:
            steps = compare_steps(
                setting, on_variant=lambda name: bar.update(task, description=f"compare {setting.network}, {name}")
            )
        except ValueError as error:
            mistake(str(error))
    table = Table(box=None, pad_edge=False)
    table.add_column("a training step with", ratio=1)
    for heading in ("ms", "speedup", "MB kept", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in steps:
        table.add_row(
            step.variant,
            f"{step.milliseconds:.1f}",
            f"[{'green' if step.speedup >= 1 else 'red'}]{step.speedup:.2f}x",
            f"{step.kept_bytes / 1e6:.1f}",
            "unknown" if step.peak_bytes is None else f"{step.peak_bytes / 1e6:.0f}",
        )
    console.print(table)
    name = str(setting.dtype).removeprefix("torch.")
    layout = ", channels_last" * setting.channels_last
    console.print(f"{setting.batch} images of {setting.image}x{setting.image}, {name}{layout}")
    write_json(json_file, setting={**dataclasses.asdict(setting), "dtype": name}, steps=steps)
    limit = comparing.LARGEST_ERROR[setting.dtype]
    finish([f"{step.variant}: loss differs by {step.loss_error:.1e}" for step in steps if not step.loss_error <= limit])


def chosen_layers(op: str, shape: str, words: list[str], quick: bool) -> list[comparing.Layer]:
    if op:
        one_of("operation", op, OPERATIONS)
    if not shape:
        if words:
            mistake(
                f"{words[0]!r} describes a layer, which also needs --op and --input (see `manual-ops compare --help`)"
            )
        layers = [layer for layer in comparing.LAYERS if op in ("", layer.op) and (layer.quick or not quick)]
        if not layers:
            mistake(f"the table of layers has no {op}; describe one with --input N,C,... and name=value options")
        return layers
    if not op:
        mistake("--input needs --op, the operation's name")
    try:
        sizes = tuple(int(size) for size in shape.replace("x", ",").split(","))
    except ValueError:
        mistake(f"--input {shape!r}: sizes are whole numbers between commas, for example 32,64,56,56")
    try:
        return [comparing.Layer(op, sizes, comparing.parse_options(words))]
    except ValueError as error:
        mistake(str(error))


def run_compare(layers: list[comparing.Layer], **options: Any) -> comparing.Comparison:
    with progress() as bar:
        task = bar.add_task("compare", total=len(layers))

        def advance(row: comparing.Measurement) -> None:
            bar.update(task, advance=1, description=f"compare {row.op}")

        return comparing.compare(layers, on_row=advance, **options)


def print_comparison(result: comparing.Comparison) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", ratio=1)
    for heading in ("ms", "torch ms", "speedup", "MB", "torch MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.measurements:
        table.add_row(
            row.layer,
            f"{row.milliseconds:.3f}",
            f"{row.torch_milliseconds:.3f}",
            f"[{'green' if row.speedup >= 1 else 'red'}]{row.speedup:.2f}x",
            f"{row.kept_bytes / 1e6:.2f}",
            f"{row.torch_kept_bytes / 1e6:.2f}",
        )
    console.print(table)
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    console.print(f"{result.dtype}, {threads}, {result.backend} kernels, in {result.seconds:.0f} s")
    console.print(losses_line(result), soft_wrap=True)


def losses_line(result: comparing.Comparison) -> str:
    """Where we lose, in words."""
    slower = ", ".join(f"{row.layer} ({row.speedup:.2f}x)" for row in result.slower) or "none"
    hungrier = ", ".join(row.layer for row in result.hungrier) or "none"
    return f"slower than torch: {slower}\nkeep more memory than torch: {hungrier}"


def comparison_problems(result: comparing.Comparison) -> list[str]:
    return [f"{row.layer}: result differs from torch's by {row.error:.1e}" for row in result.wrong]


@app.command()
def demo(
    report: Annotated[Path, typer.Option(help="Where to write the report.")] = Path("report/index.html"),
    json_file: JsonOption = None,
) -> None:
    """Verify, train, compare, and write a report, in under three minutes; exit code 1 if anything fails."""
    from manual_ops.report import write_report

    if not kernel.native_library_loaded():
        finish([f"the C++ kernels are not there: {kernel.native_library_problem()}"])
    problems = []

    def job(title: str, run: Callable[[], Any], show: Callable[[Any], None], check: Callable[[Any], list[str]]) -> Any:
        console.rule(f"[bold]{title}", align="left")
        result = run()
        show(result)
        problems.extend(check(result))
        return result

    dtypes = [torch.float64, torch.float32]
    verification = job(
        "1. Every operation against torch's autograd and finite differences",
        lambda: run_verify(None, list(available_backends()), dtypes),
        print_verification,
        verification_problems,
    )
    torch.set_num_threads(TRAINING_THREADS)
    trained = job(
        "2. The same CNN trained with torch.nn and with manual_ops.nn",
        lambda: run_train(training.EPOCHS, repeat=True),
        print_training,
        lambda result: result.problems(),
    )
    exact = job(
        "   and in float64, where rounding cannot part them",
        lambda: run_train(2, dtype=torch.float64),
        print_training,
        lambda result: result.problems(accuracy=0),
    )
    comparison = job(
        "3. Speed and memory against torch",
        lambda: run_compare([layer for layer in comparing.LAYERS if layer.quick], seconds_per_layer=0.5),
        print_comparison,
        comparison_problems,
    )
    try:
        write_report(report, verification, trained, exact, comparison, environment())
    except OSError as error:
        mistake(f"--report {report}: {error.strerror}")
    write_json(json_file, verification=verification, training=trained, exact_training=exact, comparison=comparison)
    console.rule("[bold]Done" if not problems else "[bold red]Failed", align="left")
    console.print(f"report: {report.resolve()}", soft_wrap=True)
    finish(problems)


if __name__ == "__main__":
    sys.exit(app())
