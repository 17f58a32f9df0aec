"""What tests of this folder share: `quire serve` with a Ray of its own, and a Ray that several use."""

import pytest
from served_app import quire_serve


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    with quire_serve(tmp_path_factory.mktemp("served")) as running:
        yield running
