"""What all tests share: the same random numbers in every run, and a Ray that lasts beside other work."""

import os
from pathlib import Path

import pytest
import torch

os.environ.update(  # before anything starts Ray
    RAY_worker_niceness="0",  # of Ray's own 15 replicas and gateways get nothing while other tests compute
    RAY_gcs_server_port_wait_time_s="120",  # 30 s was not enough on a busy machine, once
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--wheels", type=Path, help="folder with all that Quire needs: test_on_prem.py installs from it"
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
