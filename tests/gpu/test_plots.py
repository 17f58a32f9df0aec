"""Plots of kept rows. Needs matplotlib, no GPU."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib", reason='plots need `pip install ".[bench]"`')

ROOT = Path(__file__).parents[2]
LLAMA = "Llama-3.1-8B(random weights)"


@pytest.fixture
def plots(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.gpu.plots")


def row(case, metric, value=2.0, ratio=0.5):
    return {
        "case": case,
        "metric": metric,
        "value": value,
        "unit": "",
        "baseline": "",
        "ratio": ratio,
    }


def save(folder, rows):
    file = folder / "some-card-2026-01-31.json"
    file.write_text(json.dumps(rows))
    return file


ROWS = {
    "decode-bandwidth": [row("decode int4 32/8/128 B=1 L=8192 P=64", "bandwidth")],
    "decode-speedup": [row("decode int4 32/8/128 B=1 L=8192 P=64", "time")],
    "prefill": [
        row(f"prefill int8 32/8/128 B=1 L={length} P=64 rows=512", metric)
        for length in (512, 1024)
        for metric in ("time", "paged time")
    ],
    "step": [row(f"step bf16 {LLAMA} B=1 L=8192", "time")],
    "engine": [row(f"engine int4 {LLAMA} in=256 out=8 requests=3", m) for m in ("rate", "decode rate")],
    "capacity": [row(f"capacity int4 {LLAMA} L=131072", m) for m in ("sessions", "rate")],
    "fetch": [row("fetch int8 1 Gb/s 512 tokens", f"{way}_ms") for way in ("fetch", "recompute", "chosen")],
}


@pytest.mark.parametrize("plot", ROWS)
def test_each_plot_is_drawn_from_its_own_rows_alone(plots, plot, tmp_path):
    ceiling = row("ceiling device copy", "bandwidth")
    written = plots.draw(save(tmp_path, [ceiling, *ROWS[plot]]), tmp_path / "plots")
    assert written == [tmp_path / "plots" / f"{plot}.svg"]


def test_every_plot_there_is_has_been_tried(plots):
    assert set(plots.PLOTS) == set(ROWS)


def test_rows_of_nothing_known_draw_nothing(plots, tmp_path):
    assert plots.draw(save(tmp_path, [row("decode fp3 32/8/128 B=1 L=8 P=64", "bandwidth")]), tmp_path) == []


def test_the_same_rows_give_the_same_bytes(plots, tmp_path):
    file = save(tmp_path, [r for rows in ROWS.values() for r in rows])
    first = [svg.read_bytes() for svg in plots.draw(file, tmp_path / "a")]
    assert first == [svg.read_bytes() for svg in plots.draw(file, tmp_path / "b")]
    assert not any(re.search(rb"<dc:date>", svg) for svg in first)


def test_cells_group_formats_of_one_case(plots):
    rows = [plots.Row(f"step {kv} m B=1", "time", 1.0, "ms", "floor", 1.0) for kv in ("bf16", "int4")]
    found = plots.cells([*rows, plots.Row("step bf16 m B=1", "host", 1.0, "ms", "x", 1.0)], "step", "time")
    assert {case: list(formats) for case, formats in found.items()} == {"m B=1": ["bf16", "int4"]}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("32/8/128 B=32 L=8192 P=64", "B=32 L=8K"),
        ("64/8/128 B=1 L=131072 P=32", "B=1 L=128K tokens a page=32 heads=64/8/128"),
        (f"{LLAMA} B=1 L=512", "B=1 L=512"),
    ],
)
def test_a_case_is_said_briefly(plots, case, words):
    assert plots.brief(case) == words


def test_committed_results_can_be_drawn(plots, tmp_path):
    for file in plots.results.RESULTS.glob("nvidia-*-????-??-??.json"):
        assert plots.draw(file, tmp_path / file.stem)
