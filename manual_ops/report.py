"""The demo's results as one HTML file, which needs nothing but itself: styles and drawings are inline."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from manual_ops.compare import Comparison, Measurement
from manual_ops.environment import Environment
from manual_ops.train import Training
from manual_ops.verify import Row, Verification


def write_report(
    path: Path,
    verification: Verification,
    training: Training,
    exact_training: Training,
    comparison: Comparison,
    environment: Environment,
) -> None:
    """Write the report.

    Args:
        path: the file; its folder is made.
        verification, training, comparison: the jobs' results.
        exact_training: a short training in float64.
        environment: where they ran.

    Raises:
        OSError: where the file cannot be written.
    """
    sections = (
        _summary(verification, training, comparison),
        _verification(verification),
        _training(training, exact_training),
        _speed(comparison),
        _memory(comparison),
        _environment(environment),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PAGE.replace("{style}", _STYLE).replace("{body}", "\n".join(sections)), encoding="utf-8")


def _summary(verification: Verification, training: Training, comparison: Comparison) -> str:
    passed = sum(row.passed for row in verification.rows)
    operations = len({row.op for row in verification.rows})
    faster = len(comparison.measurements) - len(comparison.slower)
    cards = [
        (
            f"{passed}/{len(verification.rows)}",
            f"checks passed on {operations} operations: value, gradients, second derivatives",
            verification.passed,
        ),
        (
            f"{training.manual_ops.accuracy:.1%}",
            f"of unseen digits right after training (torch.nn: {training.torch.accuracy:.1%})",
            not training.problems(),
        ),
        (
            f"{faster}/{len(comparison.measurements)}",
            "measured layers at least as fast as torch's",
            not comparison.slower,
        ),
        (
            f"{_total(comparison, 'kept_bytes') / max(1, _total(comparison, 'torch_kept_bytes')):.0%}",
            "of the bytes that torch keeps for the backward pass, over those layers",
            not comparison.hungrier,
        ),
    ]
    shown = "".join(
        f'<div class="card {"good" if good else "attention"}"><b>{escape(number)}</b><span>{escape(text)}</span></div>'
        for number, text, good in cards
    )
    return f'<div class="cards">{shown}</div>'


def _total(comparison: Comparison, name: str) -> int:
    return sum(getattr(row, name) for row in comparison.measurements)


def _section(title: str, lead: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{lead}</p>{''.join(content)}</section>"


def _verification(result: Verification) -> str:
    columns = list(dict.fromkeys((row.backend, row.dtype) for row in result.rows))
    by_op: dict[str, dict[tuple[str, str], Row]] = {}
    for row in result.rows:
        by_op.setdefault(row.op, {})[row.backend, row.dtype] = row
    heads = "".join(f"<th>{escape(backend)}<br>{escape(dtype)}</th>" for backend, dtype in columns)
    lines, family = [], None
    for op, rows in by_op.items():
        first = next(iter(rows.values()))
        if first.family != family:
            family = first.family
            lines.append(f'<tr class="family"><th colspan="{len(columns) + 3}">{escape(family)}</th></tr>')
        cells = "".join(_error_cell(rows.get(column)) for column in columns)
        verdicts = "".join(_verdict_cell(getattr(row, check) for row in rows.values()) for check in _CHECKS)
        lines.append(f"<tr><th>{escape(op)}</th>{cells}{verdicts}</tr>")
    problems = [
        *result.problems,
        *(f"{row.op}, {row.backend}, {row.dtype}: {row.problem}" for row in result.rows if row.problem),
    ]
    return _section(
        "Verification",
        "The largest error of value and gradients against torch's own function in float64, divided by the largest "
        "entry (or by 1 if that is more), and torch's <code>gradcheck</code> and <code>gradgradcheck</code>, which "
        f"compare first and second derivatives with finite differences. {result.seconds:.0f} s.",
        _list(problems, "bad"),
        f'<div class="wide"><table class="numbers"><thead><tr><th></th>{heads}<th>gradcheck</th><th>gradgradcheck</th>'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>",
    )


_CHECKS = ("gradcheck", "gradgradcheck")


def _error_cell(row: Row | None) -> str:
    if row is None:
        return "<td></td>"
    text = "0" if row.error == 0 else f"{row.error:.1e}"
    return f'<td class="{"" if row.passed else "bad"}">{text}</td>'


def _verdict_cell(verdicts: Iterable[str]) -> str:
    found = set(verdicts) - {"-"}
    if not found:
        return "<td></td>"
    return '<td class="bad">failed</td>' if "failed" in found else '<td class="good">passed</td>'


def _list(items: Sequence[str], style: str) -> str:
    return f'<ul class="{style}">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>' if items else ""


def _training(training: Training, exact: Training) -> str:
    rows = "".join(
        f"<tr><th>{escape(_PACKAGE[run.package])}</th><td>{run.losses[0]:.6f}</td><td>{run.losses[-1]:.6f}</td>"
        f"<td>{run.accuracy:.2%}</td><td>{_median(run.epoch_seconds):.2f}</td></tr>"
        for run in (training.torch, training.manual_ops)
    )
    repeat = {
        True: "A second run with manual_ops gave the same bits.",
        False: "A second run gave OTHER bits.",
        None: "",
    }
    return _section(
        "Training",
        "The same small CNN on scikit-learn's 1,797 handwritten digits, once with <code>torch.nn</code> and once with "
        "<code>manual_ops.nn</code>, from the same weights and the same batches. In "
        f"{training.dtype} the two losses of a step differ by at most <b>{training.largest_difference:.1e}</b>, and in "
        f"{exact.dtype}, where rounding does not tip a ReLU, by at most <b>{exact.largest_difference:.1e}</b> "
        f"({len(exact.torch.losses)} steps). {repeat[training.repeatable]}",
        _loss_plot(training),
        '<table class="numbers"><thead><tr><th></th><th>first loss</th><th>last loss</th><th>test accuracy</th>'
        f"<th>seconds per epoch</th></tr></thead><tbody>{rows}</tbody></table>",
    )


_PACKAGE = {"torch": "torch.nn", "manual_ops": "manual_ops.nn"}


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _svg(width: float, height: float, label: str, *parts: str) -> str:
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    return f'<div class="wide">{drawing}</div>'


def _text(x: float, y: float, content: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(content)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _bar(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(1.0, width):.1f}" height="{height}" rx="2" class="{style}"/>'


def _loss_plot(training: Training) -> str:
    """Both curves over the steps, loss on a logarithmic axis: torch's wide and pale under ours, thin."""
    width, height, left, right, top, bottom = 860, 320, 56, 848, 12, 280
    steps = len(training.torch.losses)
    logs = [math.log10(max(loss, 1e-12)) for loss in training.torch.losses + training.manual_ops.losses]
    low, high = min(logs), max(max(logs), min(logs) + 0.1)

    def x(step: float) -> float:
        return left + (right - left) * step / max(1, steps - 1)

    def y(log_loss: float) -> float:
        return top + (bottom - top) * (high - log_loss) / (high - low)

    def curve(log_losses: Sequence[float], style: str) -> str:
        points = " ".join(f"{x(step):.1f},{y(log_loss):.1f}" for step, log_loss in enumerate(log_losses))
        return f'<polyline class="{style}" points="{points}"/>'

    grid = ""
    for tick in (digit * 10.0**power for power in range(-6, 3) for digit in (1, 2, 5)):
        if low <= math.log10(tick) <= high:
            height_of_tick = y(math.log10(tick))
            grid += _line(left, height_of_tick, right, height_of_tick, "grid")
            grid += _text(left - 8, height_of_tick + 4, f"{tick:g}", "end")
    for epoch in range(1, steps // training.steps_per_epoch + 1):
        grid += _text(x(epoch * training.steps_per_epoch - 1), bottom + 18, str(epoch), "middle")
    return _svg(
        width,
        height,
        "Training loss of both packages over the epochs",
        grid,
        curve(logs[:steps], "theirs"),
        curve(logs[steps:], "ours"),
        _line(right - 320, 28, right - 290, 28, "theirs") + _text(right - 282, 32, "torch.nn"),
        _line(right - 200, 28, right - 170, 28, "ours") + _text(right - 162, 32, "manual_ops.nn"),
        _text((left + right) / 2, height - 4, "epoch (loss of every step, logarithmic)", "middle"),
    )


def _speed(result: Comparison) -> str:
    slower = [f"{row.layer}: {row.speedup:.2f}x" for row in result.slower]
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    verdict = f"{len(slower)} of {len(result.measurements)} layers are slower than torch's:"
    return _section(
        "Speed",
        f"Forward + backward through autograd, {result.dtype}, {threads}: torch's time divided by ours, the median "
        "over pairs timed in turn. Right of the line manual_ops is faster. "
        + (verdict if slower else "No layer is slower."),
        _list(slower, "attention"),
        _speed_plot(result.measurements),
    )


def _speed_plot(rows: Sequence[Measurement]) -> str:
    """A bar for each layer from 1x, on a logarithmic axis."""
    width, left, right, line, top = 860, 320, 800, 26, 8
    bottom = top + line * len(rows)
    logs = [math.log2(row.speedup) for row in rows]
    low, high = min([*logs, -1.0]), max([*logs, 1.0])

    def x(log_speedup: float) -> float:
        return left + (right - left) * (log_speedup - low) / (high - low)

    drawn = ""
    step = max(1, math.ceil((high - low) / 8))
    for power in range(math.ceil(low), math.floor(high) + 1):
        if power % step == 0:
            drawn += _line(x(power), top, x(power), bottom + 4, "grid" if power else "axis")
            drawn += _text(x(power), bottom + 20, f"{2.0**power:.3g}x", "middle")
    for index, (row, log_speedup) in enumerate(zip(rows, logs, strict=True)):
        y = top + line * index
        start, end = sorted((x(0), x(log_speedup)))
        drawn += _text(left - 12, y + 17, row.layer, "end")
        drawn += _bar(start, y + 4, end - start, line - 9, "ours" if row.speedup >= 1 else "loss")
        drawn += _text(end + 6, y + 17, f"{row.speedup:.2f}x", "value")
    return _svg(width, bottom + 26, "Speed of each layer against torch's", drawn)


def _memory(result: Comparison) -> str:
    more = [f"{row.layer}: {_bytes(row.kept_bytes)}, torch {_bytes(row.torch_kept_bytes)}" for row in result.hungrier]
    return _section(
        "Memory",
        "Bytes that autograd keeps alive between forward and backward, the layer's input and weight included where "
        "they are kept, every storage counted once; the bars of a layer are drawn to torch's bytes. "
        + ("These layers keep more than torch's:" if more else "No layer keeps more than torch's."),
        _list(more, "attention"),
        _memory_plot(result.measurements),
    )


def _memory_plot(rows: Sequence[Measurement]) -> str:
    """For each layer torch's bytes and ours, as shares of torch's."""
    width, left, line, top = 860, 320, 34, 30
    shares = [row.kept_bytes / max(1, row.torch_kept_bytes) for row in rows]
    unit = (width - left - 190) / min(3.0, max([1.0, *shares]))
    drawn = _bar(left, 6, 14, 10, "theirs") + _text(left + 22, 16, "torch")
    drawn += _bar(left + 90, 6, 14, 10, "ours") + _text(left + 112, 16, "manual_ops")
    for index, (row, share) in enumerate(zip(rows, shares, strict=True)):
        y = top + line * index
        drawn += _text(left - 12, y + 18, row.layer, "end")
        drawn += _bar(left, y + 3, unit if row.torch_kept_bytes else 0, 9, "theirs")
        drawn += _bar(left, y + 14, unit * min(share, 3.0), 9, "ours" if share <= 1 else "loss")
        kept = f"{_bytes(row.kept_bytes)} of {_bytes(row.torch_kept_bytes)}"
        drawn += _text(width - 4, y + 18, kept, "value end")
    return _svg(width, top + line * len(rows) + 6, "Bytes that each layer keeps", drawn)


def _bytes(count: int) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _environment(here: Environment) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in here.lines())
    return _section("Environment", "What the numbers above depend on.", f"<dl>{lines}</dl>")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>manual_ops: demo report</title>
<style>{style}</style>
</head>
<body>
<header><h1>manual_ops</h1><p>CNN layers for PyTorch whose backward passes are derived by hand: are they right,
do they train, how fast are they, what do they keep?</p></header>
{body}
</body>
</html>
"""

_STYLE = """
:root { --paper: #fbfaf8; --ink: #22252b; --quiet: #676d78; --line: #dedbd5; --panel: #fff;
        --ours: #0f766e; --theirs: #d8a657; --good: #15803d; --bad: #b91c1c; --attention: #b45309; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181d; --ink: #e6e4df; --quiet: #9aa0ab; --line: #33373f; --panel: #1d2027;
          --ours: #2dd4bf; --theirs: #a9803a; --good: #4ade80; --bad: #f87171; --attention: #fbbf24; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 960px; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 2rem; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 1.3rem; margin: 3rem 0 .3rem; }
header p, section > p { color: var(--quiet); margin: .2rem 0 1rem; max-width: 75ch; }
section > p b { color: var(--ink); }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .8rem; margin-top: 1.5rem; }
.card { background: var(--panel); border: 1px solid var(--line); border-top: 3px solid var(--good); border-radius: 8px;
        padding: .9rem 1rem; }
.card.attention { border-top-color: var(--attention); }
.card b { display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card span { color: var(--quiet); font-size: .86rem; line-height: 1.35; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: 400; }
thead th { color: var(--quiet); vertical-align: bottom; }
tbody th { text-align: left; font-family: ui-monospace, "DejaVu Sans Mono", monospace; white-space: nowrap; }
tr.family th { font: 600 .8rem system-ui, sans-serif; color: var(--quiet); padding-top: 1rem; }
td.good { color: var(--good); } td.bad, ul.bad { color: var(--bad); font-weight: 600; }
ul.attention { color: var(--attention); }
ul { margin: .2rem 0 1rem; padding-left: 1.2rem; columns: 2 20rem; font-size: .9rem; }
svg { display: block; width: 100%; min-width: 640px; height: auto; margin: .6rem 0 1rem; }
svg text { fill: var(--quiet); font-size: 12.5px; font-family: inherit; }
svg text.end { text-anchor: end; } svg text.middle { text-anchor: middle; } svg text.value { fill: var(--ink); }
line.grid { stroke: var(--line); } line.axis { stroke: var(--quiet); }
polyline, line.ours, line.theirs { fill: none; stroke-linejoin: round; }
polyline.theirs, line.theirs { stroke: var(--theirs); stroke-width: 6; }
polyline.ours, line.ours { stroke: var(--ours); stroke-width: 1.8; }
rect.ours { fill: var(--ours); } rect.theirs { fill: var(--theirs); } rect.loss { fill: var(--attention); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; font-size: .92rem; margin: 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
"""
