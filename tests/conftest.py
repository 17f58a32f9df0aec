"""What all tests share: the same random numbers in every run."""

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--wheels", type=Path, help="folder with all that Quire needs: test_on_prem.py installs from it"
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
