"""What is generated from the catalogue, the panels and the alerts is what is checked in."""

import json
import re
from pathlib import Path

import pytest
import yaml
from observability.capacity import CAPACITY
from observability.generate import ROOT, generate
from observability.operators import OPERATORS


def test_generating_again_changes_nothing(tmp_path):
    generate(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert {Path("docs/metrics.md"), Path("deploy/prometheus/quire.rules.yml")} <= set(made)
    assert {path.name for path in made} >= {f"{d.uid}.json" for d in (OPERATORS, CAPACITY)}
    for path in made:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"run `make observability`: {path}"


@pytest.mark.parametrize("dashboard", [OPERATORS, CAPACITY], ids=lambda d: d.uid)
def test_grafana_gets_every_query_and_panels_do_not_overlap(dashboard):
    tree = json.loads((ROOT / f"deploy/grafana/{dashboard.uid}.json").read_text())
    shown = [target["expr"] for panel in tree["panels"] for target in panel.get("targets", [])]
    assert shown == [q.expression for row in dashboard.rows for p in row.panels for q in p.queries]
    cells: set[tuple[int, int]] = set()
    for panel in tree["panels"]:
        at = panel["gridPos"]
        mine = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not mine & cells, panel["title"]
        cells |= mine
    assert len({panel["id"] for panel in tree["panels"]}) == len(tree["panels"])


def test_every_alert_leads_to_a_section_of_its_own():
    (group,) = yaml.safe_load((ROOT / "deploy/prometheus/quire.rules.yml").read_text())["groups"]
    for rule in group["rules"]:
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        titles = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
        assert [title for title in titles if title.lower() == anchor] == [rule["alert"]]
