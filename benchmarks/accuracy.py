"""The rounding errors of convolutions: of precision "fast", "strict" and torch, against float64.

    python benchmarks/accuracy.py [conv3x3 conv1x1 ...]

Of the output and of both gradients: the largest error, over the largest value. Writes results/cpu/accuracy.json, and as
a table accuracy.md.
"""

import json
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_map

import manual_ops
from manual_ops.compare import Layer, arguments
from manual_ops.registry import OPERATIONS
from run import RESULTS, provenance
from suites import CONVOLUTIONS

# float64 has nothing to be measured against.
SUITES = [name for name, suite in CONVOLUTIONS.items() if suite.dtype != "float64"]
console = Console(soft_wrap=True, highlight=False)


def main(
    suites: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(SUITES)}; all by default")] = None,
) -> None:
    """Measure, print and write; suites that the file has already stay in it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "accuracy.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"suites": {}}
    for name in suites or SUITES:
        suite = CONVOLUTIONS[name]
        dtype = getattr(torch, suite.dtype)
        document["suites"][name] = {
            **provenance(),
            "layers": {layer.name: errors(layer, dtype, suite.channels_last) for layer in suite.layers},
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
        console.print(table({name: document["suites"][name]}))
    path.with_suffix(".md").write_text(f"{__doc__.splitlines()[0]}\n\n{table(document['suites'])}\n")


def errors(layer: Layer, dtype: torch.dtype, channels_last: bool) -> dict[str, dict[str, float]]:
    """By the name of a result, the error of each contestant."""
    operation = OPERATIONS[layer.op]
    args, kwargs = arguments(layer, operation, dtype, channels_last)

    def wide(value: Any) -> Any:
        return value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    exact = _results(operation.reference, *tree_map(wide, (args, kwargs)))
    found = {"torch": _results(operation.reference, args, kwargs)}
    for precision in ("fast", "strict"):
        with manual_ops.precision(precision):
            found[precision] = _results(operation.function, args, kwargs)
    return {
        result: {who: _error(found[who][result], value) for who in ("fast", "strict", "torch")}
        for result, value in exact.items()
    }


def _results(function: Any, args: Any, kwargs: Any) -> dict[str, Tensor]:
    output = function(*args, **kwargs)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator).to(output.dtype)
    named = {"input gradient": args[0], "weight gradient": kwargs["weight"]}
    named = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(output, list(named.values()), cotangent)
    return {"output": output.detach(), **dict(zip(named, gradients, strict=True))}


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def table(suites: dict[str, Any]) -> str:
    """As Markdown; ours is set in bold where it is more than torch's."""
    lines = ["| suite | layer | of the | fast | strict | torch |", "|---|---|---|---:|---:|---:|"]
    for name, told in suites.items():
        for layer, results in told["layers"].items():
            for result, found in results.items():
                ours = (f"**{e:.1e}**" if e > found["torch"] else f"{e:.1e}" for e in (found["fast"], found["strict"]))
                lines.append(f"| {name} | {layer} | {result} | {' | '.join(ours)} | {found['torch']:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
