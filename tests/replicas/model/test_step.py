"""How a batch is cut into parts, padded, and completed with tokens that only the device knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import Chunk, step_of

from quire.kernels.decode_plan import DecodeKind
from quire.replicas.model.step import StepBuilder, known_tokens, layer_plans, plan_arrays
from quire.replicas.staging import stage

GPU, CPU = StepBuilder((), (), torch.device("meta")), StepBuilder((), (), torch.device("cpu"))


def test_a_gpu_step_is_cut_where_decoding_ends():
    chunks = [
        Chunk([5], 40, [1, 2, 3]),
        Chunk([5] * 8, 3, [4]),
        Chunk([5] * 9, 0, [6]),
        Chunk([5] * 30, 2, [7, 8]),
    ]
    inputs = GPU.build(step_of(chunks, 16))
    decode_part, prefill_part = inputs.step.parts
    assert (decode_part.rows, prefill_part.rows) == (slice(0, 9), slice(9, 48))
    assert (decode_part.decode, prefill_part.decode) == (True, False)
    assert (decode_part.batch.max_query_tokens, decode_part.batch.max_kv_tokens) == (8, 41)
    assert (prefill_part.batch.max_query_tokens, prefill_part.batch.max_kv_tokens) == (30, 32)
    assert prefill_part.batch.query_start_S1.shape == (3,)


def test_long_chunks_are_parts_of_their_own():
    chunks = [
        Chunk([5], 3, [9]),
        Chunk([5] * 20, 0, [9, 9]),
        *(Chunk([5] * n, 16, [9] * (n // 16 + 2)) for n in (512, 600, 600)),
    ]
    parts = GPU.build(step_of(chunks, 16), tokens=1740).step.parts
    rows = [(0, 1), (1, 21), (21, 533), (533, 1133), (1133, 1740)]  # the padding goes to the last
    assert [(p.rows.start, p.rows.stop) for p in parts] == rows
    assert [p.decode for p in parts] == [True, False, False, False, False]
    assert [p.batch.sequences for p in parts] == [1] * 5


@pytest.mark.parametrize(("tokens", "decode"), [(8, True), (9, False)])
def test_a_gpu_step_of_one_kind_is_not_cut(tokens, decode):
    batch = step_of([Chunk([5] * tokens, 0, [1]), Chunk([5] * tokens, 2, [2])], 16)
    assert [(p.rows, p.decode) for p in GPU.build(batch).step.parts] == [(slice(0, 2 * tokens), decode)]


def test_a_cpu_step_is_one_part_that_includes_the_padding():
    batch = step_of([Chunk([5] * 20, 0, [2, 3]), Chunk([5], 4, [1])], 16)
    inputs = CPU.build(batch, tokens=32, rows=48)
    (part,) = inputs.step.parts
    assert part.rows == slice(0, 32)
    assert part.batch.max_query_tokens == 20
    assert inputs.step.slots_T[21:].tolist() == [-1] * 11
    assert part.batch.query_start_S1.tolist() == [0, 20, 21]
    assert (inputs.token_ids_T.shape, inputs.positions_T.shape, inputs.logit_rows_R.shape) == (
        (32,),
        (32,),
        (48,),
    )


def test_negative_token_ids_stand_for_what_the_step_before_drew():
    ids = torch.tensor([7, -1, 9, -3, -1])
    assert known_tokens(ids, torch.tensor([40, 41, 42])).tolist() == [7, 40, 9, 42, 40]
    assert known_tokens(ids, None) is ids


def test_layers_of_one_kind_share_a_plan():
    wide, narrow = DecodeKind(16, None, 8), DecodeKind(16, 32, 4)
    kinds = (wide, narrow, wide)
    arrays = plan_arrays(kinds, np.array([1, 1]), np.array([500, 40]), {wide: 20, narrow: 12})
    plans = layer_plans(kinds, stage(arrays, torch.device("cpu")), 3)
    assert plans[0] is plans[2] is not plans[1]
    assert [len(plan.items_W4) for plan in plans] == [20, 12, 20]
    assert layer_plans((), {}, 2) == (None, None)
