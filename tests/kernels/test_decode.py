"""The decode kernel against the reference in fp64, in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_cases import Case, Step, make_scaled_step, make_step, relative_error

from quire.kernels._combine import combine_tile
from quire.kernels._transform import transform_query
from quire.kernels.decode import decode_attention, launch_decode, plan_batch
from quire.kernels.decode_plan import DecodePlan, decode_kind, items_capacity, plan_items
from quire.kernels.formats import Codes, FormatError, KVFormat, Scales, Transform
from quire.kernels.ref.paged import write_kv_ref
from quire.kernels.transform import SideTransform
from quire.kernels.write import launch_write_step

INT8_G32 = KVFormat(Codes.INT8, Scales.TOKEN, group=32)
FP8_TOKEN = KVFormat(Codes.FP8, Scales.TOKEN)
INT4_PLAIN = KVFormat(Codes.INT4, Scales.TOKEN, group=16)

CASES = [
    # every format on both sides
    Case("bf16", "bf16", [37, 5, 64], [1, 1, 1]),
    Case("fp8", "fp8", [77, 1, 64], [1, 1, 1], page_tokens=32, head_dim=128),
    Case(FP8_TOKEN, FP8_TOKEN, [33, 100], [1, 1], group=1),
    Case("int8", "int8", [77, 1, 64], [1, 1, 1], page_tokens=32, group=1, head_dim=128),
    Case(INT8_G32, INT8_G32, [77, 1], [1, 1], page_tokens=64, group=5),
    Case("int8c", "int8c", [77, 1], [1, 1], page_tokens=64, head_dim=128),
    Case("int4", "int4", [33, 130], [1, 1], page_tokens=64, group=3, head_dim=128),
    Case("int4g64", "int4g64", [33, 130], [1, 1], page_tokens=32, group=8, head_dim=128),
    Case("int4g32", "int4g32", [33, 130], [1, 1], page_tokens=64, group=7, head_dim=128),
    Case("int4g32", "int4g32", [33, 70], [1, 1], page_tokens=64, head_dim=64),
    Case(INT4_PLAIN, INT4_PLAIN, [33], [1], page_tokens=16, head_dim=64),
    Case("int4c", "int4c", [33, 130], [1, 1], page_tokens=32, group=4, head_dim=128),
    # mixed sides, other types of q
    Case("int8", "int4", [63, 130], [1, 1], page_tokens=64, dtype=torch.float16),
    Case("bf16", "int4", [63, 30], [1, 1], page_tokens=16, dtype=torch.float32),
    Case("int4", "bf16", [63, 30], [1, 1], page_tokens=32, group=4),
    Case("int4c", "fp8", [63, 30], [1, 1], page_tokens=64, group=4, head_dim=128),
    # several query rows, row tiles, windows, soft-caps
    Case("int4", "int4", [40, 3, 129], [5, 3, 2], page_tokens=64, group=2),
    Case("int8", "int8", [40, 3, 129], [5, 1, 4], page_tokens=16, group=7),
    Case("bf16", "fp8", [70, 3], [5, 3], page_tokens=32, group=8),
    Case("int8", "int8", [200, 9, 17], [1, 1, 1], page_tokens=16, window=17),
    Case("int4", "int4", [200, 9, 65], [4, 1, 3], page_tokens=16, window=30, softcap=20.0),
    Case("int8c", "int8c", [100, 9], [2, 1], page_tokens=32, softcap=5.0),
    Case("int8", "int8", [100, 9, 64], [20, 1, 7], page_tokens=16, window=20),
    Case("bf16", "bf16", [90, 9], [40, 1], page_tokens=16, window=12),
]


def plan_of(step: Step, multiprocessors: int) -> DecodePlan:
    return plan_batch(step.cache, step.q_TQD.shape[1], step.batch, step.spec, multiprocessors)


def decode(step: Step, multiprocessors: int = 1, plan: DecodePlan | None = None) -> torch.Tensor:
    q_TQD = transform_query(step.cache.k_transform, step.q_TQD)
    plan = plan or plan_of(step, multiprocessors)
    return launch_decode(step.cache, q_TQD, step.batch, step.spec, plan, step.q_TQD.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case):
    """Cut for one multiprocessor and for four, where that makes a difference."""
    step = make_step(case)
    plans = [plan_of(step, multiprocessors) for multiprocessors in (1, 4)]
    if torch.equal(*(plan.items_W4 for plan in plans)):
        del plans[1]
    for plan in plans:
        out = decode(step, plan=plan)
        assert out.dtype == step.q_TQD.dtype
        assert relative_error(out, step.expected()) < (8e-3 if "bf16" in str(case) else 3e-3)


def test_reads_queries_that_are_not_contiguous():
    step = make_step(Case("int8", "int8", [50, 20], [2, 1]))
    q_QTD = step.q_TQD.transpose(0, 1).contiguous()
    out = decode(replace(step, q_TQD=q_QTD.transpose(0, 1)))
    assert relative_error(out, step.expected()) < 3e-3


def test_small_values_keep_their_precision():
    step = make_step(Case("int8", "int8", [60], [1]), written=False)
    write_kv_ref(step.cache, step.k_LHD * 0.1, step.v_LHD * 0.03, step.slots_L)
    out = decode(step)
    assert relative_error(out, step.expected()) < 3e-3


@pytest.mark.parametrize("name", ["int8", "int4", "int4g32"])
def test_quiet_tokens_among_loud_ones_are_read_as_the_reference_reads_them(name):
    step = make_step(Case(name, name, [60], [1], dtype=torch.float32), written=False)
    quiet = torch.where(torch.arange(60) % 7 == 3, 1.0, 2.0**-17)[:, None, None]
    write_kv_ref(step.cache, step.k_LHD * quiet, step.v_LHD * quiet, step.slots_L)
    assert relative_error(decode(step), step.expected()) < 3e-3


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int4g32"])
def test_static_scales_bring_any_magnitude_into_range(name):
    case = Case(name, name, [50, 20], [2, 1])
    step, unwritten = make_scaled_step(case), make_scaled_step(case, written=False)
    q_TQD = launch_write_step(
        unwritten.cache, step.q_TQD, unwritten.k_LHD, unwritten.v_LHD, unwritten.slots_L
    )
    for cache in (step.cache, unwritten.cache):
        out = launch_decode(cache, q_TQD, step.batch, step.spec, plan_of(step, 4), torch.bfloat16)
        assert relative_error(out, step.expected()) < 3e-3


def test_takes_queries_that_the_write_has_transformed():
    step = make_step(Case("int4", "int4", [50, 20], [2, 1]))
    q_TQD = launch_write_step(
        step.cache, step.q_TQD, *(x[-3:] for x in (step.k_LHD, step.v_LHD)), torch.full((3,), -1)
    )
    out = launch_decode(step.cache, q_TQD, step.batch, step.spec, plan_of(step, 4), torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, decode(step, 4))


@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_more_items_than_are_combined_at_once(name):
    step = make_step(Case(name, name, [16 * 40 + 3, 5, 5, 5, 5, 5], [1] * 6, kv_heads=1, head_dim=128))
    plan = plan_of(step, 3)
    first, end = plan.first_item_S1[:2]
    assert end - first > combine_tile(len(plan.items_W4), 6, 128)[1]
    assert relative_error(decode(step, plan=plan), step.expected()) < 8e-3


def test_a_row_that_sees_nothing_of_an_item_is_not_disturbed_by_it():
    step = make_step(Case("int8", "int8", [16 * 6 + 3], [60], group=2))
    plan = plan_of(step, 100)
    assert plan.items_W4[:, 1].max() == 5  # page 5 begins at 80: the first rows, from 39 on, do not see it
    assert relative_error(decode(step, plan=plan), step.expected()) < 3e-3


def test_a_plan_and_its_grid_serve_other_lengths_when_their_numbers_are_replaced():
    """As a CUDA graph does, whose grid and addresses are fixed when it is captured."""
    long = make_step(Case("int8", "int4", [300, 70, 20], [1, 1, 1]))
    short = make_step(Case("int8", "int4", [17, 1, 200], [1, 1, 1]))
    kind = decode_kind(long.cache, 4, long.spec, 1, 2)
    capacity = items_capacity(kind, 3)
    plans = [
        plan_items(kind, s.batch.query_start_S1.diff().numpy(), s.batch.kv_tokens_S.numpy(), capacity)
        for s in (long, short)
    ]
    assert relative_error(decode(long, plan=plans[0]), long.expected()) < 3e-3
    plans[0].items_W4.copy_(plans[1].items_W4)
    plans[0].first_item_S1.copy_(plans[1].first_item_S1)
    assert relative_error(decode(short, plan=plans[0]), short.expected()) < 3e-3


def test_padding_sequences_without_tokens_give_zeros():
    step = make_step(Case("int8", "int4", [30, 40], [1, 1]))
    batch = replace(
        step.batch,
        query_start_S1=torch.arange(5, dtype=torch.int32),
        kv_tokens_S=torch.tensor([30, 40, 0, 0], dtype=torch.int32),
        page_table_SM=torch.cat([step.batch.page_table_SM] * 2),
    )
    padded = replace(step, q_TQD=torch.cat([step.q_TQD] * 2), batch=batch)
    out = decode(padded)
    assert relative_error(out[:2], step.expected()) < 3e-3
    assert out[2:].count_nonzero() == 0


def test_rows_that_no_sequence_owns_are_not_touched():
    step = make_step(Case("int4", "int4", [30, 40], [2, 3]))
    start = torch.tensor([0, 0, 3], dtype=torch.int32)  # the first sequence is idle this step
    batch = replace(step.batch, query_start_S1=start)
    out = decode(replace(step, q_TQD=step.q_TQD[2:], batch=batch))
    assert relative_error(out, step.expected()[2:]) < 3e-3


def test_refuses_what_it_cannot_serve():
    step = make_step(Case("int8", "int8", [30], [1], softcap=3.0))
    shifted = replace(step.cache, k_transform=SideTransform(shift_HD=torch.ones(2, 64)))
    with pytest.raises(FormatError, match="soft-cap"):
        decode_attention(shifted, step.q_TQD, step.batch, step.spec)
    odd = make_step(Case("int8", "int8", [30], [1], head_dim=80))
    with pytest.raises(FormatError, match="head_dim"):
        decode(odd)
    fine = KVFormat(Codes.INT8, Scales.TOKEN, group=8, transform=Transform.IDENTITY)
    narrow = make_step(Case(fine, "int8", [30], [1]))
    with pytest.raises(FormatError, match="16 channels"):
        decode(narrow)
