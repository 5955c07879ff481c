"""What `gpu.py` makes of its numbers: shares of the ceilings, targets met and missed, a summary, plots."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of the copy bandwidth, for passes that only move bytes.
TARGET_SHARE = 0.85
OURS, THEIRS, BAR = "manual_ops", "torch", 0.2


def passes(document: dict[str, Any], *parts: str) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """(row, name of the pass, its numbers) of every measured pass of these parts."""
    for part in parts:
        for row in document["parts"].get(part, {}).get("rows", []):
            for name, told in row.get("passes", {}).items():
                yield row, name, told


def add_shares(document: dict[str, Any]) -> None:
    """Of each pass of ours: the share of the copy bandwidth, and of the product's rate, measured in the same run.

    Bytes are the fewest that the pass must move, and operations those of the direct algorithm. TF32 is off, so that a
    float32 product is compared with a float32 one.
    """
    ceilings = {row["case"]: row for row in document["parts"].get("ceilings", {}).get("rows", [])}
    copy = ceilings.get("copy", {}).get("bytes_per_second")
    for row, _, told in passes(document, "operations", "compiled", "peers"):
        product = ceilings.get(f"product {row['dtype']}", {}).get("flops_per_second")
        told["share_of_copy"], told["share_of_product"] = {}, {}
        for name, time in told["times"].items():
            if not isinstance(time, dict):
                continue
            seconds = 1e-6 * time["microseconds"]
            if copy and "bytes" in told:
                told["share_of_copy"][name] = told["bytes"] / seconds / copy
            if product and "flops" in told:
                told["share_of_product"][name] = told["flops"] / seconds / product


def wrong(document: dict[str, Any]) -> list[str]:
    """The cases whose result is not torch's."""
    return [
        row["case"]
        for part in ("operations", "compiled", "peers")
        for row in document["parts"].get(part, {}).get("rows", [])
        if "errors" in row and not _small(row["errors"].get(OURS), row["largest_error"])
    ]


def _small(error: Any, limit: float) -> bool:
    return isinstance(error, (int, float)) and error <= limit


def missed(document: dict[str, Any]) -> list[str]:
    """Passes that only move bytes and are slower than TARGET_SHARE of a copy, and passes slower than torch's."""
    found = []
    for row, name, told in passes(document, "operations"):
        share = told.get("share_of_copy", {}).get(OURS)
        if share is not None and "flops" not in told and share < TARGET_SHARE:
            found.append(f"{share:.0%} of the copy bandwidth: {row['case']}, {name}")
        speedup = told.get("speedup", {}).get(THEIRS)
        if speedup is not None and speedup < 1:
            found.append(f"{speedup:.2f}x torch: {row['case']}, {name}")
    return found


def geometric_means(document: dict[str, Any]) -> list[str]:
    """A line for each family, dtype, layout and pass: how often faster than each peer, on the geometric mean."""
    groups: dict[str, list[float]] = {}
    for row, name, told in passes(document, "operations", "compiled", "peers"):
        layout = " channels_last" if row["channels_last"] else ""
        for peer, speedup in told.get("speedup", {}).items():
            groups.setdefault(f"{peer}: {row['family']}, {row['dtype']}{layout}, {name}", []).append(speedup)
    lines = [f"{statistics.geometric_mean(values):5.2f}x {key} ({len(values)})" for key, values in groups.items()]
    for row, name, told in passes(document, "networks", "compiled networks"):
        lines += [f"{value:5.2f}x {peer}: {row['case']}, {name}" for peer, value in told.get("speedup", {}).items()]
    return lines


def plot(folder: Path, document: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("agg")
    for dtype in ("float16", "float32"):
        rows = [row for row in document["parts"].get("operations", {}).get("rows", []) if row.get("dtype") == dtype]
        if rows:
            _plot_operations(folder / f"operations-{dtype}.png", dtype, rows)
    if any(True for _ in passes(document, "networks", "compiled networks")):
        _plot_networks(folder / "networks.png", document)


def _plot_operations(path: Path, dtype: str, rows: list[dict[str, Any]]) -> None:
    """Left torch's time over ours for each layer and pass, right our share of the ceiling that is nearer."""
    from matplotlib import pyplot

    labels = list(dict.fromkeys(row["layer"] for row in rows))[::-1]
    figure, (speed, share) = pyplot.subplots(
        1, 2, figsize=(14, 1.5 + 0.24 * len(labels)), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    marks = {
        ("forward", False): ("o", "#0f766e"),
        ("backward", False): ("s", "#0f766e"),
        ("forward", True): ("o", "#b45309"),
        ("backward", True): ("s", "#b45309"),
    }
    for (name, channels_last), (marker, colour) in marks.items():
        told = [
            (labels.index(row["layer"]), row["passes"][name])
            for row in rows
            if row["channels_last"] == channels_last and name in row.get("passes", {})
        ]
        style = {"marker": marker, "color": colour, "s": 22, "alpha": 0.8}
        label = f"{name}{', channels_last' * channels_last}"
        faster = [(place, one["speedup"][THEIRS]) for place, one in told if THEIRS in one.get("speedup", {})]
        speed.scatter([value for _, value in faster], [place for place, _ in faster], label=label, **style)
        shares = [
            (place, max(one[ceiling].get(OURS, 0) for ceiling in ("share_of_copy", "share_of_product")))
            for place, one in told
            if OURS in one.get("share_of_copy", {})
        ]
        share.scatter([value for _, value in shares], [place for place, _ in shares], **style)
    speed.set_xscale("log", base=2)
    speed.axvline(1, color="black", linewidth=0.8)
    speed.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    speed.set_yticks(range(len(labels)), labels, fontsize=7)
    speed.set_xlabel("torch's time / ours")
    speed.legend(fontsize=7)
    share.axvline(TARGET_SHARE, color="black", linewidth=0.8, linestyle=":")
    share.set_xlim(left=0)
    share.set_xlabel("share of the nearer ceiling, copy or product")
    for axes in (speed, share):
        axes.grid(axis="both", linewidth=0.3)
    figure.suptitle(f"operations, {dtype}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_networks(path: Path, document: dict[str, Any]) -> None:
    """The time of a training step, and its peak memory, of each contestant."""
    from matplotlib import pyplot

    rows = {row["case"]: row for row, _, _ in passes(document, "networks", "compiled networks")}
    labels = list(rows)[::-1]
    figure, (time, memory) = pyplot.subplots(
        1, 2, figsize=(13, 1.5 + 0.8 * len(labels)), sharey=True, layout="constrained"
    )
    colours = {THEIRS: "#94a3b8", "torch.compile": "#475569", OURS: "#5eead4", "fused": "#0f766e", "lean": "#134e4a"}
    for place, label in enumerate(labels):
        row = rows[label]
        bars: dict[str, tuple[Any, int | None]] = {}
        for name, told in row["passes"].items():
            for who, one in told["times"].items():
                kind = name.split()[-1] if who == OURS and name != "training step" else who
                bars[kind] = one, row["peak_bytes"].get(name.replace("training step", OURS) if who == OURS else who)
        for offset, (kind, (one, peak)) in enumerate(bars.items()):
            at = place - BAR * (offset - (len(bars) - 1) / 2)
            if isinstance(one, dict):
                time.barh(at, one["microseconds"] / 1e3, BAR, color=colours[kind])
            memory.barh(at, (peak or 0) / 2**30, BAR, color=colours[kind])
    time.set_yticks(range(len(labels)), labels)
    time.set_xlabel("a training step, ms")
    memory.set_xlabel("peak memory, GiB")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    memory.legend(handles, [THEIRS, "torch.compile", OURS, "fused", "fused and lean"], fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
