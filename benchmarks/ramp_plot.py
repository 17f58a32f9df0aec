"""The plot of `ramp.py`'s rows: users and replicas above, time to first token below.

    python benchmarks/ramp_plot.py benchmarks/results/<file>.json docs/plots/ramp.svg

The same rows give the same bytes. Needs matplotlib (`pip install ".[bench]"`).
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rows import Row

_BLUE, _ORANGE, _FAINT, _INK = "#0072B2", "#D55E00", "#B0B0B0", "#222222"


def draw(rows: Sequence[Row]) -> bytes:
    """An SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": "quire",
        "font.size": 9,
        "text.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _FAINT,
        "figure.facecolor": "white",
    }
    with mpl.rc_context(style):
        figure = Figure((7.2, 4.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        above.step(
            *_line(rows, "users", ratio=True), where="post", color=_FAINT, label="users / places of a replica"
        )
        above.step(
            *_line(rows, "replicas aimed at"), where="post", color=_BLUE, lw=1, ls=":", label="aimed at"
        )
        above.step(*_line(rows, "replicas"), where="post", color=_BLUE, lw=2, label="replicas that run")
        above.set_ylim(0, 3.4)
        above.legend(frameon=False, loc="upper left", ncols=2, bbox_to_anchor=(0, 1.16), borderpad=0)
        below.plot(*_line(rows, "first token p90 of target"), color=_ORANGE, marker="o", ms=3.5)
        target_s = next(r.value / r.ratio for r in rows if r.baseline == "target")
        below.axhline(target_s, color=_FAINT, lw=0.8)
        below.annotate("target", (0, target_s), xytext=(2, 3), textcoords="offset points", color=_INK)
        below.set_ylim(bottom=0)
        below.set_ylabel("first token, s (p90)")
        below.set_xlabel("seconds")
        figure.suptitle(
            "A load ramp: first tokens are late while a replica starts, and in time when it has come",
            x=0.01,
            ha="left",
            fontsize=10.5,
        )
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _line(rows: Sequence[Row], metric: str, *, ratio: bool = False) -> tuple[list[float], list[float]]:
    found = [(re.fullmatch(r"ramp at (\d+) s", row.case), row) for row in rows if row.metric == metric]
    points = [(float(at[1]), row.ratio if ratio else row.value) for at, row in found if at]
    return [at for at, _ in points], [value for _, value in points]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("plot", type=Path)
    args = parser.parse_args()
    args.plot.write_bytes(draw([Row(**fields) for fields in json.loads(args.rows.read_text())]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
