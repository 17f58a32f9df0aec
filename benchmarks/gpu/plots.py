"""Plots for the documents, drawn from kept rows: one SVG for every question the rows can answer.

    python -m benchmarks.gpu.plots benchmarks/results/nvidia-h200-2026-01-31.json docs/plots/

The same rows give the same bytes. Needs matplotlib (`pip install ".[bench]"`); no GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.gpu import results
from benchmarks.rows import Row

# Okabe and Ito's colours, which stay apart for colour-blind readers; so do the markers, and dark from light.
COLORS = {
    "fp32": "#999999",
    "bf16": "#555555",
    "fp8": "#E69F00",
    "int8": "#0072B2",
    "k8v4": "#CC79A7",
    "int4": "#D55E00",
}
MARKERS = {"fp32": "x", "bf16": "o", "fp8": "D", "int8": "s", "k8v4": "v", "int4": "^"}
_OFFSETS = {"fp32": -0.1, "bf16": -0.1, "fp8": -0.1, "int8": 0.0, "k8v4": 0.1, "int4": 0.1}
"""Of a line's height, so that dots of one value show."""
_INK, _FAINT = "#222222", "#B0B0B0"
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "quire",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "figure.facecolor": "white",
}
_WIDTH = 7.2
"""Inches; a line of bars takes `_LINE`."""
_LINE = 0.21

Cells = dict[str, dict[str, Row]]
"""Case without its format → format → row."""


def cells(rows: Sequence[Row], part: str, metric: str) -> Cells:
    """The rows of one metric whose case reads `<part> <format> <rest>`, in their order."""
    found: Cells = {}
    for row in rows:
        kind, policy, *rest = row.case.split(" ", 2)
        if kind == part and row.metric == metric and policy in COLORS:
            found.setdefault(" ".join(rest), {})[policy] = row
    return found


def decode_bandwidth(rows: Sequence[Row]) -> Figure | None:
    """How near decode attention comes to the device's copy, a line a shape."""
    found = cells(rows, "decode", "bandwidth")
    if not found:
        return None
    figure, axes = _dots(found, lambda row: 100 * row.ratio, 100)
    axes.set_xlabel("K and V read a second, % of what a device copy moves\n" + _HEADS)
    _title(figure, "Decode attention: share of the memory's bandwidth")
    return figure


def decode_speedup(rows: Sequence[Row]) -> Figure | None:
    """Draw what fewer bits gain in time, against the fastest library on bf16."""
    found = cells(rows, "decode", "time")
    if not found:
        return None
    figure, axes = _dots(found, lambda row: 1 / row.ratio, 1)
    axes.set_xlabel("times as fast as the fastest library on contiguous bf16\n" + _HEADS)
    _title(figure, "Decode attention: speed against the best library")
    return figure


def prefill(rows: Sequence[Row]) -> Figure | None:
    """Time of a chunk over its history against the library's on bf16, a panel a chunk size."""
    chosen, paged = (_by_history(cells(rows, "prefill", metric)) for metric in ("time", "paged time"))
    sizes = [size for size, lines in chosen.items() if any(len(line) > 1 for line in lines.values())]
    if not sizes:
        return None
    figure, panels = _figure(len(sizes), 3.0, side_by_side=True)
    for axes, size in zip(panels, sizes, strict=True):
        for policy, line in paged[size].items():
            axes.plot(*_points(line), color=COLORS[policy], lw=1, ls=(0, (1, 2)), alpha=0.8)
        for policy, line in chosen[size].items():
            axes.plot(*_points(line), lw=1.6, label=policy, **_style(policy))
        axes.axhline(1, color=_FAINT, lw=0.8, zorder=0)
        histories = _apart({tokens for line in chosen[size].values() for tokens in line})
        axes.set_xticks([tokens / 1024 for tokens in histories], map(_short, histories))
        axes.set_title(f"{size} new tokens", fontsize=9)
        axes.set_xlabel("tokens of history")
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0, top)
    panels[0].set_ylabel("time / best library on bf16")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        frameon=False,
        loc="outside right upper",
        title="dotted:\nthe paged\nkernel alone",
    )
    _title(figure, "Prefill attention: time against the best library on bf16")
    return figure


def step(rows: Sequence[Row]) -> Figure | None:
    """A shard's decode step and, as a mark, the time its bytes take at copy bandwidth."""
    found = cells(rows, "step", "time")
    if not found:
        return None
    figure, (axes,) = _figure(1, 1.1 + _LINE * (sum(map(len, found.values())) + len(found)))
    for place, row in _bars(axes, found):
        axes.plot([row.value / row.ratio] * 2, [place - 0.42, place + 0.42], color=_INK, lw=2)
        axes.annotate(f"{row.value:.1f} ms, {row.ratio:.2f} × floor", (row.value, place), **_BESIDE)
    axes.set_xlim(0, 1.28 * max(row.value for formats in found.values() for row in formats.values()))
    axes.set_xlabel("ms a step; the mark is the floor: weights, K and V at copy bandwidth")
    _title(figure, f"Decode step of one shard: {_model(found)}")
    return figure


def engine(rows: Sequence[Row]) -> Figure | None:
    """Output tokens a second: prompts included, and decoding alone."""
    both = [cells(rows, "engine", metric) for metric in ("rate", "decode rate")]
    if not all(both):
        return None
    lines = sum(map(len, both[0].values())) + len(both[0])
    figure, panels = _figure(2, 1.3 + _LINE * lines, side_by_side=True, width=9.6)
    for axes, found, title in zip(panels, both, ("all, prompts included", "decoding alone"), strict=True):
        for place, row in _bars(axes, found):
            load = row.case.split(" ", 2)[2]
            gain = row.value / found[load]["bf16"].value if "bf16" in found[load] else 1.0
            axes.annotate(f"{row.value:.0f}" + f"  {gain:.2f} ×" * (gain != 1), (row.value, place), **_BESIDE)
        axes.set_xlim(0, 1.3 * max(row.value for formats in found.values() for row in formats.values()))
        axes.set_xlabel("output tokens a second")
        axes.set_title(title, fontsize=9)
    panels[1].set_yticklabels([])
    _title(figure, f"Engine: {_model(both[0])} (× our bf16)")
    return figure


def capacity(rows: Sequence[Row]) -> Figure | None:
    """Sessions of 128K tokens on one card, and what they decode together."""
    sessions, rates = cells(rows, "capacity", "sessions"), cells(rows, "capacity", "rate")
    if not sessions or not rates:
        return None
    lines = sum(map(len, sessions.values())) + len(sessions)
    figure, panels = _figure(2, 1.1 + _LINE * lines, side_by_side=True)
    for axes, found, label in zip(panels, (sessions, rates), ("sessions", "tokens a second"), strict=True):
        for place, row in _bars(axes, found):
            axes.annotate(f"{row.value:.0f}", (row.value, place), **_BESIDE)
        axes.set_xlim(0, 1.15 * max(row.value for formats in found.values() for row in formats.values()))
        axes.set_xlabel(label)
    panels[1].set_yticklabels([])
    _title(figure, f"Sessions of 128K tokens on one card: {_model(sessions)}")
    return figure


def fetch(rows: Sequence[Row]) -> Figure | None:
    """Draw TTFT of a prompt that a peer holds, one panel for each link speed."""
    ways = {way: cells(rows, "fetch", f"{way}_ms") for way in WAYS}
    links: dict[str, dict[str, dict[int, float]]] = {}
    for way, found in ways.items():
        for case, formats in found.items():
            link, tokens = re.fullmatch(r"(.+) (\d+) tokens", case).groups()  # type: ignore[union-attr]
            for policy, row in formats.items():
                line = links.setdefault(f"{link}, {policy}", {}).setdefault(way, {})
                line[int(tokens)] = row.value
    if not links:
        return None
    figure, panels = _figure(len(links), 3.0, side_by_side=True, width=max(_WIDTH, 2.6 * len(links)))
    values = [ms for lines in links.values() for line in lines.values() for ms in line.values()]
    quickest_first = sorted(links.items(), key=lambda link: max(link[1].get("fetch", {0: 0.0}).values()))
    for axes, (link, lines) in zip(panels, quickest_first, strict=True):
        for way, line in lines.items():
            axes.plot(sorted(line), [line[n] for n in sorted(line)], label=way, **WAYS[way])
        lengths = sorted({n for line in lines.values() for n in line})
        axes.set(xscale="log", yscale="log", xlabel="tokens of prompt")
        axes.set_title(link, fontsize=9)
        axes.set_xticks(lengths, map(_short, lengths))
        axes.minorticks_off()
        axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
    panels[0].set_ylabel("time to first token, ms")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    _title(figure, "A prompt whose blocks a peer holds: fetched, recomputed, as chosen")
    return figure


WAYS: Mapping[str, dict[str, Any]] = {
    "recompute": {"color": "#D55E00", "marker": "^", "ms": 5, "lw": 1.4},
    "fetch": {"color": "#0072B2", "marker": "s", "ms": 5, "lw": 1.4},
    "chosen": {"color": _INK, "marker": "o", "ms": 8, "mfc": "none", "ls": ""},
}


PLOTS: Mapping[str, Callable[[Sequence[Row]], Figure | None]] = {
    "decode-bandwidth": decode_bandwidth,
    "decode-speedup": decode_speedup,
    "prefill": prefill,
    "step": step,
    "engine": engine,
    "capacity": capacity,
    "fetch": fetch,
}


def draw(file: Path, folder: Path) -> list[Path]:
    """Write `<plot>.svg` for every plot that the rows of `file` can fill; returns what was written."""
    rows = results.load(file)
    card, date = file.stem[: -len("-2026-01-31")], file.stem[-len("2026-01-31") :]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(_STYLE):
        for name, plot in PLOTS.items():
            figure = plot(rows)
            if figure is None:
                continue
            figure.supxlabel(f"{card.replace('-', ' ').upper()}, {date}", x=0.99, ha="right", fontsize=7)
            written.append(folder / f"{name}.svg")
            figure.savefig(written[-1], metadata={"Date": None, "Creator": None})
    return written


# ---- what the plots share

_HEADS = "32 query heads, 8 kv heads, 128 channels unless named"

_BESIDE: dict[str, Any] = {
    "xytext": (4, 0),
    "textcoords": "offset points",
    "va": "center",
    "fontsize": 8,
}
"""A bar's figure, right of its end."""


def _figure(
    panels: int, height: float, *, side_by_side: bool = False, width: float = _WIDTH
) -> tuple[Figure, list[Axes]]:
    figure = Figure((width, height), layout="constrained")
    grid = (1, panels) if side_by_side else (panels, 1)
    return figure, list(figure.subplots(*grid, squeeze=False).flat)


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=_STYLE["axes.titlesize"])


def _bars(axes: Axes, found: Cells) -> list[tuple[float, Row]]:
    """A bar for every row, named after its format and grouped under its case; returns where they stand."""
    places: list[tuple[float, Row]] = []
    names: dict[float, str] = {}
    at = 0
    for case, formats in found.items():
        names[at] = brief(case)
        for policy, row in formats.items():
            at += 1
            axes.barh(at, row.value, height=0.8, color=COLORS[policy])
            names[at] = policy
            places.append((at, row))
        at += 1
    axes.set_yticks(list(names), list(names.values()))
    for label in axes.get_yticklabels():
        label.set_fontweight("normal" if label.get_text() in COLORS else "bold")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(at - 0.4, -0.7)
    return places


def _dots(found: Cells, figure_of: Callable[[Row], float], mark: float) -> tuple[Figure, Axes]:
    """A line for every case with a dot for every format, and an upright line at `mark`."""
    figure, (axes,) = _figure(1, 1.1 + 1.3 * _LINE * len(found))
    for place, formats in enumerate(found.values()):
        values = {policy: figure_of(row) for policy, row in formats.items()}
        ends = [min(values.values()), max(values.values())]
        axes.plot(ends, [place, place], color="#E8E8E8", lw=4, solid_capstyle="round", zorder=1)
        for policy, value in values.items():
            axes.plot(value, place + _OFFSETS[policy], ls="", **_style(policy), zorder=2)
    axes.axvline(mark, color=_FAINT, lw=0.8, zorder=0)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(found)), map(brief, found))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(found) - 0.4, -0.6)
    used = [policy for policy in COLORS if any(policy in formats for formats in found.values())]
    axes.legend(
        handles=[Line2D([], [], ls="", label=policy, **_style(policy)) for policy in used],
        frameon=False,
        ncols=len(used),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderpad=0,
        handletextpad=0.1,
        columnspacing=1.2,
    )
    return figure, axes


def _style(policy: str) -> dict[str, Any]:
    return {"color": COLORS[policy], "marker": MARKERS[policy], "ms": 5.5, "mec": "white", "mew": 0.6}


def _by_history(found: Cells) -> dict[int, dict[str, dict[int, float]]]:
    """New tokens → format → tokens of history → ratio, from `... L=<all> P=.. rows=<new>`."""
    sizes: dict[int, dict[str, dict[int, float]]] = {}
    for case, formats in found.items():
        numbers = {name: int(n) for name, n in re.findall(r"\b(\w+)=(\d+)", case)}
        for policy, row in formats.items():
            line = sizes.setdefault(numbers["rows"], {}).setdefault(policy, {})
            line[numbers["L"] - numbers["rows"]] = row.ratio
    return sizes


def _points(line: Mapping[int, float]) -> tuple[list[float], list[float]]:
    return [tokens / 1024 for tokens in sorted(line)], [line[tokens] for tokens in sorted(line)]


def _apart(numbers: Collection[int]) -> list[int]:
    """In order, without those too near to the one before for both to be labelled."""
    kept = [min(numbers)]
    for number in sorted(numbers):
        if number - kept[-1] >= max(numbers) / 5:
            kept.append(number)
    return kept


def brief(case: str) -> str:
    """A case as a reader says it: without the model, which the title names, and what is usual."""
    case = re.sub(r"^\S+\([^)]*\) ", "", case).replace(" P=64", "").replace("P=", "tokens a page=")
    case = re.sub(r"^(\d+/\d+/\d+) (.*)", r"\2 heads=\1", case).replace(" heads=32/8/128", "")
    return re.sub(r"=(\d+)", lambda m: f"={_short(int(m[1]))}", case)


def _short(number: int) -> str:
    return f"{number // 1024}K" if number >= 1024 and number % 1024 == 0 else str(number)


def _model(found: Cells) -> str:
    """The model that the cases begin with: `<name>(random weights)`."""
    name, _, rest = next(iter(found)).partition("(")
    return f"{name}, {rest.partition(')')[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, help="a file of benchmarks/results")
    parser.add_argument("folder", type=Path, help="where the plots go")
    args = parser.parse_args()
    print(*draw(args.rows, args.folder), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
