"""Kept benchmark rows and the search for regressions. Needs no GPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.gpu.results")


def row(results, case, value, unit="ms", baseline="copy", ratio=1.0):
    return results.Row(case, "figure", value, unit, baseline, ratio)


def test_a_later_row_of_a_case_replaces_the_earlier(results, tmp_path):
    file = results.file_for("NVIDIA H200", "2026-02-01", tmp_path)
    assert file.name == "nvidia-h200-2026-02-01.json"
    results.save([row(results, "a", 1.0), row(results, "b", 2.0)], file)
    results.save([row(results, "a", 3.0)], file)
    assert [(r.case, r.value) for r in results.load(file)] == [("a", 3.0), ("b", 2.0)]


def test_the_newest_earlier_row_of_every_case_is_compared(results, tmp_path):
    for name, cases in {
        "gpu-a-2026-01-01": {"x": 1.0, "y": 2.0},
        "gpu-a-2026-02-01": {"x": 3.0},
        "gpu-a-2026-03-01": {"x": 4.0},
        "gpu-b-2026-02-15": {"x": 5.0},
    }.items():
        results.save([row(results, case, value) for case, value in cases.items()], tmp_path / f"{name}.json")
    before = results.rows_before(results.file_for("GPU A", "2026-03-01", tmp_path))
    assert {r.case: r.value for r in before} == {"x": 3.0, "y": 2.0}
    assert results.rows_before(results.file_for("GPU C", "2026-03-01", tmp_path)) == []


@pytest.mark.parametrize(
    ("unit", "was", "now", "named"),
    [("ms", 1.0, 1.3, True), ("ms", 1.0, 0.7, False), ("GB/s", 1.0, 0.7, True), ("GB/s", 1.0, 1.3, False)],
)
def test_slower_is_more_time_or_less_rate(results, unit, was, now, named):
    lines = results.regressions(
        [row(results, "a", 5.0, unit, ratio=now), row(results, "new", 1.0)],
        [row(results, "a", 5.0, unit, ratio=was)],
    )
    assert bool(lines) is named


def test_rows_against_other_baselines_are_compared_by_value(results):
    before = [row(results, "a", 1.0, baseline="flash", ratio=1.0)]
    assert not results.regressions([row(results, "a", 1.0, baseline="cudnn", ratio=2.0)], before)
    assert results.regressions([row(results, "a", 2.0, baseline="cudnn", ratio=1.0)], before)


def test_committed_results_load(results):
    for file in results.RESULTS.glob("*-????-??-??.json"):
        assert results.load(file)
