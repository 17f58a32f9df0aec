import numpy as np
import pytest

from quire.replicas.step_batch import StepBatch


def _batch(tokens: int, sequences: int, pages: int, rows: int) -> StepBatch:
    rng = np.random.default_rng(0)

    def ints(*shape: int) -> np.ndarray:
        return rng.integers(-1, 2**40, shape)

    return StepBatch(
        token_ids_T=ints(tokens),
        positions_T=ints(tokens),
        slots_T=ints(tokens),
        query_start_S1=ints(sequences + 1),
        kv_tokens_S=ints(sequences),
        page_table_SM=ints(sequences, pages),
        logit_rows_R=ints(rows),
    )


@pytest.mark.parametrize("shape", [(7, 3, 5, 2), (1, 1, 1, 1), (64, 2, 9, 0)])
def test_a_step_survives_the_way_to_another_rank(shape):
    sent = _batch(*shape)
    got = StepBatch.from_bytes(sent.to_bytes() + b"\0" * 24)  # buffers may be longer than the message
    for name in StepBatch.__slots__:
        assert np.array_equal(getattr(got, name), getattr(sent, name)), name
