"""For how many sequences graphs are made; what they compute is tested in `tests/gpu/test_engine.py`."""

from __future__ import annotations

import pytest

from quire.replicas.runner.decode_graphs import graph_sizes


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 64, 65, 100, 256, 300, 1000])
def test_every_number_of_sequences_has_a_graph_with_little_padding(most):
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max(most, 2)
    for sequences in range(5, most + 1):
        size = next(size for size in sizes if size >= sequences)
        assert size - sequences < max(8, sequences / 2)
