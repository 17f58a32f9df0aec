"""What all tests share: the same random numbers in every run, and who may run beside whom."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray run one after another; they wait more than they compute, and others run beside."""
    for item in items:
        if item.path.parent.name == "cluster" or item.path.name == "test_directory_actor.py":
            item.add_marker(pytest.mark.xdist_group("ray"))
