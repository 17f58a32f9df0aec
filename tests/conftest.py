"""What all tests share: the same random numbers in every run, and a Ray that lasts beside other work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from ray_cluster import Cluster

os.environ.update(  # before anything starts Ray
    RAY_worker_niceness="0",  # of Ray's own 15 replicas and gateways get nothing while other tests compute
    RAY_gcs_server_port_wait_time_s="120",  # 30 s was not enough on a busy machine, once
    RAY_AUTH_MODE="token",  # of `ray_cluster`; Ray reads it when it is imported
    RAY_AUTH_TOKEN="tests only, of one private network",
    RAY_USAGE_STATS_ENABLED="0",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--wheels", type=Path, help="folder with all that Quire needs: test_on_prem.py installs from it"
    )


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    """Shared by all tests that break nothing of Ray itself."""
    from ray_cluster import ray_cluster  # it imports Ray

    with ray_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def joined(ray_cluster: Cluster) -> Iterator[Cluster]:
    """The same, with this process connected to it."""
    with ray_cluster.joined():
        yield ray_cluster


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
