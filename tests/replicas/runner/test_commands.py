"""Commands to the other ranks survive their bytes."""

from __future__ import annotations

import numpy as np
import pytest
from store_peers import keys_of

from quire.kvstore.books.host_tier import Copies, SlotId
from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.peers.ids import TransferId
from quire.kvstore.peers.messages import CompletePages, ReceivePages
from quire.kvstore.wire.transport import Endpoint
from quire.replicas.runner.commands import (
    Demote,
    Idle,
    NumberedOrder,
    Promote,
    Stop,
    decode_command,
    encode_command,
)
from quire.replicas.step_batch import StepBatch

ORDER = ReceivePages(
    transfer=TransferId(3),
    keys=tuple(keys_of(2)),
    pages=(PageId(5), PageId(1)),
    generations=(7, 2**40),
    peers=(Endpoint("a", "127.0.0.1", 1),),
    timeout_s=2.0,
)
COPIES = [
    Copies((), ()),
    Copies((PageId(3), PageId(2**40)), (SlotId(0), SlotId(7))),
]


@pytest.mark.parametrize(
    "command",
    [
        Idle(),
        Stop(),
        *map(Demote, COPIES),
        *map(Promote, COPIES),
        CompletePages((PageId(3),), (2**40,)),
        NumberedOrder(260, ORDER),
    ],
    ids=lambda command: type(command).__name__,
)
def test_a_command_is_the_same_after_its_bytes(command):
    assert decode_command(encode_command(command)) == command


@pytest.mark.parametrize(("tokens", "sequences", "pages", "rows"), [(5, 2, 3, 2), (1, 1, 0, 0), (0, 0, 0, 0)])
def test_a_step_is_the_same_after_its_bytes(tokens, sequences, pages, rows):
    rng = np.random.default_rng(tokens)

    def ints(*shape: int) -> np.ndarray:
        return rng.integers(-(2**40), 2**40, shape)

    sent = StepBatch(
        token_ids_T=ints(tokens),
        positions_T=ints(tokens),
        slots_T=ints(tokens),
        query_start_S1=ints(sequences + 1),
        kv_tokens_S=ints(sequences),
        page_table_SM=ints(sequences, pages)[:, ::-1],  # not contiguous
        logit_rows_R=ints(rows),
    )
    got = decode_command(encode_command(sent))
    assert isinstance(got, StepBatch)
    for name in StepBatch.__struct_fields__:
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name))


def test_an_order_that_waited_has_less_time_left_and_never_less_than_none():
    waited = NumberedOrder(260, ORDER).after(0.5)
    assert (waited.number, waited.order.timeout_s) == (260, 1.5)
    assert (waited.order.keys, waited.order.pages) == (ORDER.keys, ORDER.pages)
    assert waited.after(5).order.timeout_s == 0
