"""Some faults of `benchmarks/store_faults.py`: every answer is right, and every page accounted for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")
FAULTS = {
    "owner": [
        ("send 3", "killed"),
        ("send 1", "corrupt byte"),
        ("offer", "evicted"),
        ("done", "connections reset"),
    ],
    "receiver": [("take 3", "killed")],
    "directory_killed": [()],
    "directory_lying": [()],
    "host_memory_full": [()],
}


@pytest.fixture(scope="module", params=["Victim", "InPlace"])
def campaign(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, BENCHMARKS])
        import store_faults

        patch.setattr(store_faults, "TIMEOUT_S", 8.0)  # on a busy machine 3 s are not enough for a fetch
        patch.setattr(store_faults, "SETTLED_S", 120.0)
        patch.setattr(store_faults, "_LOOKS", 20)
        kind = getattr(store_faults, request.param)
        campaign = store_faults.Campaign(tmp_path_factory.mktemp("faults"), kind)
        yield campaign
        campaign.close()


def test_whatever_breaks_between_engines_answers_are_right_and_the_next_transfer_works(campaign):
    for side, faults in FAULTS.items():
        for fault in faults:
            getattr(campaign, side)(*fault)
    counted = [row for row in campaign.rows() if row.unit == "faults"]
    assert len(counted) == 3 * 8
    assert [(row.case, row.metric) for row in counted if row.value] == []
