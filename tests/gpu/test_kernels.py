"""The compiled kernels on a GPU against the references in fp64 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from paged_cases import Case, make_scaled_step, make_step, relative_error
from side_formats import SIDES

from quire.kernels._transform import transform_query
from quire.kernels.decode import decode_attention
from quire.kernels.decode_plan import decode_kind, items_capacity, plan_items
from quire.kernels.dequantize import dequantize_pages
from quire.kernels.formats import Codes, KVFormat, Scales
from quire.kernels.page_copy import checksum_pages, gather_pages, scatter_pages
from quire.kernels.prefill import launch_prefill, prefill_attention
from quire.kernels.prefill_library import suits_library
from quire.kernels.ref.paged import write_kv_ref
from quire.kernels.write import write_kv, write_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NAMES = [name for name in SIDES if name != "fp32"]
PLAIN = ["bf16", "fp8", "int8", "int4"]
OTHERS = [
    KVFormat(Codes.INT8, Scales.TOKEN, group=32),
    KVFormat(Codes.INT4, Scales.TOKEN, group=16),
    KVFormat(Codes.FP8, Scales.TOKEN),
]
LENGTHS = [1, 63, 64, 700, 2049]


def cases(query_tokens: list[int]) -> list[Case]:
    shape = {"kv_tokens": LENGTHS, "query_tokens": query_tokens}
    return [
        *(Case(f, f, **shape, head_dim=128, page_tokens=64, group=4) for f in [*NAMES, *OTHERS]),
        *(Case(f, f, **shape, head_dim=64, page_tokens=32, group=7) for f in PLAIN),
        *(
            Case(f, f, **shape, head_dim=128, page_tokens=16, group=1)
            for f in ["bf16", "fp8", "int8", "int4"]
        ),
        *(
            Case(f, f, **shape, head_dim=256, page_tokens=64, group=2)
            for f in ["bf16", "fp8", "int8", "int4"]
        ),
        Case("int8", "int4", **shape, head_dim=128, page_tokens=64, dtype=torch.float16),
        Case("bf16", "int4", **shape, head_dim=64, page_tokens=64, dtype=torch.float32, group=3),
        Case("int4", "fp8", **shape, head_dim=128, page_tokens=64, group=8, window=100),
        Case("int8", "int8", **shape, head_dim=128, page_tokens=64, softcap=20.0, window=1000),
    ]


def limit(case: Case) -> float:
    return 1e-2 if "bf16" in str(case) or case.dtype == torch.bfloat16 else 3e-3


@pytest.mark.parametrize("case", cases([1, 1, 1, 1, 1]), ids=str)
def test_decode_agrees_with_the_reference(case):
    step = make_step(case)
    on_gpu = step.to("cuda")
    out = decode_attention(on_gpu.cache, on_gpu.q_TQD, on_gpu.batch, on_gpu.spec)
    assert relative_error(out, step.expected()) < limit(case)


@pytest.mark.parametrize("case", cases([1, 2, 5, 3, 4]), ids=str)
def test_decode_of_several_rows_agrees_with_the_reference(case):
    step = make_step(case)
    on_gpu = step.to("cuda")
    out = decode_attention(on_gpu.cache, on_gpu.q_TQD, on_gpu.batch, on_gpu.spec)
    assert relative_error(out, step.expected()) < limit(case)


@pytest.mark.parametrize("case", cases([1, 63, 17, 700, 300]), ids=str)
def test_prefill_agrees_with_the_reference(case):
    step = make_step(case)
    on_gpu = step.to("cuda")
    out = prefill_attention(on_gpu.cache, on_gpu.q_TQD, on_gpu.batch, on_gpu.spec)
    assert relative_error(out, step.expected()) < limit(case)


LONG = {"page_tokens": 64, "kv_heads": 2, "group": 4, "head_dim": 128}


@pytest.mark.parametrize(
    "case",
    [
        *(Case(f, f, [1030], [1030], **LONG) for f in NAMES),
        *(Case(f, f, [3001], [1100], **LONG) for f in PLAIN),
        *(Case(f, f, [2048], [1024], head_dim=64, page_tokens=32, group=7) for f in PLAIN),
        Case("int8", "int4", [20000], [1025], **LONG, dtype=torch.float16),
        Case("int4", "bf16", [2600], [1050], **LONG, dtype=torch.float32),
    ],
    ids=str,
)
def test_prefill_of_a_long_chunk_agrees_with_the_reference(case):
    step = make_step(case)
    on_gpu = step.to("cuda")
    assert suits_library(on_gpu.cache, on_gpu.q_TQD, on_gpu.batch, on_gpu.spec)
    out = prefill_attention(on_gpu.cache, on_gpu.q_TQD, on_gpu.batch, on_gpu.spec)
    assert relative_error(out, step.expected()) < limit(case)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int4g32"])
def test_static_scales_bring_any_magnitude_into_range(name):
    decoded = make_scaled_step(Case(name, name, LENGTHS, [1, 2, 5, 3, 4], **LONG), written=False)
    expected = make_scaled_step(Case(name, name, LENGTHS, [1, 2, 5, 3, 4], **LONG)).expected()
    step = decoded.to("cuda")
    write_kv(step.cache, step.k_LHD, step.v_LHD, step.slots_L)
    rows, skipped = slice(0, len(step.batch.slots_T)), torch.full_like(step.batch.slots_T, -1)
    q_TQD = write_step(step.cache, step.q_TQD, step.k_LHD[rows], step.v_LHD[rows], skipped)
    out = decode_attention(step.cache, q_TQD, step.batch, step.spec, transformed=True, dtype=step.q_TQD.dtype)
    assert relative_error(out, expected) < 1e-2
    for kv_tokens, query_tokens, attend in (
        (LENGTHS, [1, 63, 17, 700, 300], launch_prefill),
        ([3001], [1100], prefill_attention),
    ):
        step = make_scaled_step(Case(name, name, kv_tokens, query_tokens, **LONG))
        on_gpu = step.to("cuda")
        out = attend(on_gpu.cache, on_gpu.q_TQD, on_gpu.batch, on_gpu.spec)
        assert relative_error(out, step.expected()) < 1e-2


@pytest.mark.parametrize("name", ["int8", "int4", "int4g32"])
def test_values_with_the_smallest_scales_keep_their_precision(name):
    case = Case(name, name, LENGTHS, [1, 63, 17, 700, 300], **LONG, dtype=torch.float32)
    step = make_step(case, written=False)
    write_kv_ref(step.cache, step.k_LHD, step.v_LHD * 2.0**-14, step.slots_L)
    on_gpu = step.to("cuda")
    for attend in (launch_prefill, decode_attention):
        out = attend(on_gpu.cache, on_gpu.q_TQD, on_gpu.batch, on_gpu.spec)
        assert relative_error(out, step.expected()) < 1e-2
    written = make_step(case, written=False).to("cuda")
    write_kv(written.cache, written.k_LHD, written.v_LHD * 2.0**-14, written.slots_L)
    assert (written.cache.pool_NB.cpu() != step.cache.pool_NB).float().mean() < 0.002


@pytest.mark.parametrize("name", NAMES)
def test_dequantized_pages_agree_with_the_reference(name):
    step = make_step(Case(name, name, [700, 90], [1, 1], **LONG))
    on_gpu = step.to("cuda")
    sides = dequantize_pages(on_gpu.cache, on_gpu.batch.page_table_SM[0], 700, 1024)
    expected = dequantize_pages(step.cache, step.batch.page_table_SM[0], 700, 1024)
    for x_HLD, expected_HLD in zip(sides, expected, strict=True):
        assert relative_error(x_HLD, expected_HLD) < 1e-3
        assert x_HLD[:, 700:].count_nonzero() == 0


@pytest.mark.parametrize("name", PLAIN)
def test_the_same_input_gives_the_same_bits(name):
    step = make_step(Case(name, name, [1500], [1100], **LONG)).to("cuda")
    few = make_step(Case(name, name, [1500, 40], [2, 1], **LONG)).to("cuda")
    for s, attend in ((step, prefill_attention), (step, launch_prefill), (few, decode_attention)):
        first, second = (attend(s.cache, s.q_TQD, s.batch, s.spec) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("case", cases([1, 1, 1, 1, 1]), ids=str)
def test_write_agrees_with_the_reference(case):
    expected, step = make_step(case), make_step(case, written=False).to("cuda")
    write_kv(step.cache, step.k_LHD, step.v_LHD, step.slots_L)
    assert (step.cache.pool_NB.cpu() != expected.cache.pool_NB).float().mean() < 0.002
    again = make_step(case, written=False).to("cuda")
    for token in range(0, step.slots_L.shape[0], 500):  # any cut of the tokens gives the same bytes
        rows = slice(token, token + 500)
        write_kv(again.cache, again.k_LHD[rows], again.v_LHD[rows], again.slots_L[rows])
    assert torch.equal(again.cache.pool_NB, step.cache.pool_NB)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [33, 5000])
def test_a_step_writes_and_transforms_queries_in_one_launch(name, tokens):
    case = Case(name, name, [tokens], [tokens], head_dim=128, page_tokens=64, kv_heads=8, group=4)
    apart, step = make_step(case, written=False).to("cuda"), make_step(case, written=False).to("cuda")
    write_kv(apart.cache, apart.k_LHD, apart.v_LHD, apart.slots_L)
    expected_TQD = transform_query(apart.cache.k_transform, apart.q_TQD)
    out_TQD = write_step(step.cache, step.q_TQD, step.k_LHD, step.v_LHD, step.slots_L)
    assert torch.equal(step.cache.pool_NB, apart.cache.pool_NB)
    torch.testing.assert_close(out_TQD, expected_TQD, atol=1e-4, rtol=1e-5)
    few_TQD = write_step(step.cache, step.q_TQD[:3], step.k_LHD, step.v_LHD, step.slots_L)
    assert few_TQD.shape[0] == 3
    torch.testing.assert_close(few_TQD, expected_TQD[:3], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_decode_takes_the_queries_of_a_step(name):
    step = make_step(Case(name, name, LENGTHS, [1, 2, 5, 3, 4], **LONG)).to("cuda")
    skipped = torch.full_like(step.batch.slots_T, -1)
    rows = slice(0, len(skipped))
    q_TQD = write_step(step.cache, step.q_TQD, step.k_LHD[rows], step.v_LHD[rows], skipped)
    out = decode_attention(step.cache, q_TQD, step.batch, step.spec, transformed=True, dtype=step.q_TQD.dtype)
    expected = decode_attention(step.cache, step.q_TQD, step.batch, step.spec)
    assert out.dtype == expected.dtype
    assert relative_error(out, expected) < 1e-3


@pytest.mark.parametrize("name", ["int8", "int4", "int4g32"])
def test_a_long_prompt_is_written_in_wide_tiles_with_the_same_codes(name):
    """Another instruction rotates there: its sums may differ in their last bit, and a code with it."""
    case = Case(name, name, [5000], [1], head_dim=128, page_tokens=64, kv_heads=8)
    expected, step = make_step(case), make_step(case, written=False).to("cuda")
    write_kv(step.cache, step.k_LHD, step.v_LHD, step.slots_L)
    assert (step.cache.pool_NB.cpu() != expected.cache.pool_NB).float().mean() < 0.002
    cut = make_step(case, written=False).to("cuda")
    for token in range(0, 5000, 1000):
        rows = slice(token, token + 1000)
        write_kv(cut.cache, cut.k_LHD[rows], cut.v_LHD[rows], cut.slots_L[rows])
    assert (cut.cache.pool_NB != step.cache.pool_NB).float().mean() < 1e-5


def test_broken_numbers_are_stored_as_the_reference_stores_them():
    case = Case("fp8", "int4", [200], [1], head_dim=128, page_tokens=64)
    expected, step = make_step(case, written=False), make_step(case, written=False)
    for x in (step.k_LHD, step.v_LHD):
        x[3, 0, 5], x[4, 1, 7], x[5, 0, 9], x[6] = float("nan"), float("inf"), -float("inf"), 0.0
    write_kv_ref(expected.cache, step.k_LHD, step.v_LHD, step.slots_L)
    step = step.to("cuda")
    write_kv(step.cache, step.k_LHD, step.v_LHD, step.slots_L)
    assert (step.cache.pool_NB.cpu() != expected.cache.pool_NB).float().mean() < 0.002


RAGGED = [20000, 1, 700, 64, 65, 3000, 128, 9000, 40, 1000]


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 8])
def test_decode_of_a_ragged_batch_agrees_with_the_reference(name, rows):
    step = make_step(Case(name, name, RAGGED, [min(rows, n) for n in RAGGED], **LONG))
    on_gpu = step.to("cuda")
    out = decode_attention(on_gpu.cache, on_gpu.q_TQD, on_gpu.batch, on_gpu.spec)
    assert relative_error(out, step.expected()) < 1e-2


@pytest.mark.parametrize("fitting", [1, 7, 1000])
def test_any_plan_gives_the_same_result(fitting):
    """Fewer items than sequences at a time, or more places than pages."""
    step = make_step(Case("int8", "int4", RAGGED, [1] * len(RAGGED), **LONG))
    on_gpu = step.to("cuda")
    kind = replace(decode_kind(step.cache, 8, step.spec, 1, 132), fitting=fitting)
    kv_tokens = step.batch.kv_tokens_S.numpy()
    for capacity in (None, items_capacity(kind, 50)):
        plan = plan_items(kind, np.ones_like(kv_tokens), kv_tokens, capacity).to("cuda")
        out = decode_attention(on_gpu.cache, on_gpu.q_TQD, on_gpu.batch, on_gpu.spec, plan)
        assert relative_error(out, step.expected()) < 1e-2


@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_a_captured_decode_serves_other_lengths(name):
    """All that changes lies in device memory: lengths, pages and the plan, padded to its capacity."""
    captured = make_step(Case(name, name, [700, 30, 0, 0], [1, 1, 1, 1], **LONG))
    other = make_step(Case(name, name, [64, 9000, 3000, 1], [1, 1, 1, 1], seed=1, **LONG))
    pages = other.batch.page_table_SM.shape[1]
    kind = decode_kind(other.cache, 8, other.spec, 1, 132)
    plans = [
        plan_items(kind, np.ones(4, dtype=np.int32), s.batch.kv_tokens_S.numpy(), items_capacity(kind, 4)).to(
            "cuda"
        )
        for s in (captured, other)
    ]
    table_SM = torch.nn.functional.pad(
        captured.batch.page_table_SM, (0, pages - captured.batch.page_table_SM.shape[1])
    )
    on_gpu = replace(captured, batch=replace(captured.batch, page_table_SM=table_SM)).to("cuda")
    pool_NB = torch.zeros(
        max(len(captured.cache.pool_NB), len(other.cache.pool_NB)),
        other.cache.pool_NB.shape[1],
        dtype=torch.uint8,
        device="cuda",
    )
    pool_NB[: len(captured.cache.pool_NB)] = captured.cache.pool_NB.cuda()
    cache, batch, q_TQD = replace(on_gpu.cache, pool_NB=pool_NB), on_gpu.batch, on_gpu.q_TQD
    eager = decode_attention(cache, q_TQD, batch, on_gpu.spec, plans[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(cache, q_TQD, batch, on_gpu.spec, plans[0])
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, eager)
    assert relative_error(out[:2], captured.expected()[:2]) < 1e-2
    assert out[2:].count_nonzero() == 0

    pool_NB[: len(other.cache.pool_NB)].copy_(other.cache.pool_NB)
    batch.page_table_SM.copy_(other.batch.page_table_SM)
    batch.kv_tokens_S.copy_(other.batch.kv_tokens_S)
    q_TQD.copy_(other.q_TQD)
    plans[0].items_W4.copy_(plans[1].items_W4)
    plans[0].first_item_S1.copy_(plans[1].first_item_S1)
    graph.replay()
    assert relative_error(out, other.expected()) < 1e-2


def test_pages_travel_and_check_the_same_on_both_devices():
    torch.manual_seed(0)
    pool = torch.randint(0, 256, (50, 128 * 333), dtype=torch.uint8)
    pages = torch.randperm(50)[:17]
    packed = gather_pages(pool.cuda(), pages.cuda())
    assert torch.equal(packed.cpu(), pool[pages])
    assert torch.equal(checksum_pages(packed).cpu(), checksum_pages(pool[pages]))
    other = torch.zeros_like(pool).cuda()
    scatter_pages(other, pages.cuda().int(), packed)
    assert torch.equal(other.cpu()[pages], pool[pages])
    assert other.cpu().count_nonzero() == pool[pages].count_nonzero()
