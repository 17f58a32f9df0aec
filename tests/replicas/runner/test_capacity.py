"""The largest step that an engine may ever plan, by which a GPU's free memory is measured."""

from __future__ import annotations

import numpy as np
import pytest

from quire.replicas.runner.capacity import largest_step


@pytest.mark.parametrize(
    ("tokens", "longest", "new", "kv"),
    [
        (8192, 131072, [8192], [8192 + 16384]),
        (8192, 10000, [8192], [10000]),
        (8192, 4096, [4096, 4096], [4096, 4096]),
        (1000, 300, [100, 300, 300, 300], [300, 300, 300, 300]),
    ],
)
def test_it_has_all_tokens_at_the_end_of_long_histories(tokens, longest, new, kv):
    batch = largest_step(tokens, 64, longest, 64)
    assert np.diff(batch.query_start_S1).tolist() == new
    assert batch.kv_tokens_S.tolist() == kv
    assert len(batch.token_ids_T) == len(batch.positions_T) == tokens
    assert batch.positions_T.max() == max(kv) - 1
    assert batch.page_table_SM.shape == (len(new), -(-max(kv) // 64))


def test_it_writes_nothing_and_reads_page_0_alone():
    batch = largest_step(100, 64, 1000, 16)
    assert (batch.slots_T == -1).all()
    assert not batch.page_table_SM.any()
    assert batch.logit_rows_R.tolist() == list(range(36, 100))
