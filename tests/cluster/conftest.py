"""One served application for all tests of this folder that need one."""

import pytest
from served_app import quire_serve


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    with quire_serve(tmp_path_factory.mktemp("served")) as running:
        yield running
