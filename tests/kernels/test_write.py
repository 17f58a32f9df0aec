"""The write kernel against the reference, byte by byte, in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_cases import Case, Step, make_step

from quire.kernels.decode import decode_attention
from quire.kernels.formats import Codes, KVFormat, Scales, Transform
from quire.kernels.ref.paged import read_kv_ref, write_kv_ref
from quire.kernels.transform import SideTransform
from quire.kernels.write import launch_write, launch_write_step, write_step

INT8_G32 = KVFormat(Codes.INT8, Scales.TOKEN, group=32)
FP8_TOKEN = KVFormat(Codes.FP8, Scales.TOKEN, transform=Transform.HADAMARD)

CASES = [
    Case("bf16", "bf16", [37, 5], [1, 1], page_tokens=16),
    Case("bf16", "bf16", [37], [1], page_tokens=32, dtype=torch.float32),
    Case("fp8", "fp8", [33, 7], [1, 1], head_dim=128),
    Case(FP8_TOKEN, FP8_TOKEN, [33, 7], [1, 1]),
    Case("int8", "int8", [17, 1, 34], [1, 1, 1], page_tokens=32, kv_heads=3),
    Case(INT8_G32, INT8_G32, [17, 34], [1, 1], page_tokens=64),
    Case("int8c", "int8c", [33, 7], [1, 1]),
    Case("int4", "int4", [33, 7], [1, 1], page_tokens=64, head_dim=128),
    Case("int4g64", "int4g32", [33, 7], [1, 1], head_dim=128, dtype=torch.float16),
    Case("int4c", "int4c", [33, 7], [1, 1], page_tokens=32),
    Case("int8", "int4", [65], [1], page_tokens=64, layer=0),
]


def differing_share(step: Step, expected: Step) -> float:
    return (step.cache.pool_NB != expected.cache.pool_NB).float().mean().item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference_and_leaves_all_else_alone(case):
    expected, step = make_step(case), make_step(case, written=False)
    launch_write(step.cache, step.k_LHD, step.v_LHD, step.slots_L)
    assert differing_share(step, expected) < 0.002
    untouched = expected.cache.pool_NB == 0xFF
    assert (step.cache.pool_NB[untouched] == 0xFF).float().mean() > 0.999
    assert not torch.equal(step.cache.pool_NB, make_step(case, written=False).cache.pool_NB)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_shift_scale_and_rotation_are_applied_in_the_reference_order(name):
    case = Case(name, name, [40], [1])
    maps = SideTransform(True, torch.randn(2, 64), torch.rand(2, 64) + 0.5)
    expected, step = (
        replace(s, cache=replace(s.cache, k_transform=maps, v_transform=maps))
        for s in (make_step(case, written=False), make_step(case, written=False))
    )
    write_kv_ref(expected.cache, expected.k_LHD, expected.v_LHD, expected.slots_L)
    launch_write(step.cache, step.k_LHD, step.v_LHD, step.slots_L)
    assert differing_share(step, expected) < 0.002


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int4g32"])
def test_quiet_tokens_are_stored_as_the_reference_stores_them(name):
    case = Case(name, name, [40], [1], dtype=torch.float32)
    expected, step = make_step(case, written=False), make_step(case, written=False)
    quiet = 2.0 ** -torch.arange(40.0)[:, None, None]
    for s, write in ((expected, write_kv_ref), (step, launch_write)):
        write(s.cache, s.k_LHD * quiet, s.v_LHD * quiet, s.slots_L)
    assert differing_share(step, expected) < 0.002


@pytest.mark.parametrize("case", [CASES[3], *CASES[7:9]], ids=str)
def test_wide_tiles_write_the_same(case, monkeypatch):
    """Long prompts take them; here a few tokens do."""
    monkeypatch.setattr("quire.kernels.write._MANY_ROWS", 1)
    expected, step = make_step(case), make_step(case, written=False)
    launch_write(step.cache, step.k_LHD, step.v_LHD, step.slots_L)
    assert differing_share(step, expected) < 0.002


@pytest.mark.parametrize(
    ("k", "dtype"), [("int4", torch.bfloat16), ("int4g32", torch.float32), ("int8c", torch.float16)]
)
def test_a_step_returns_queries_in_the_space_of_the_keys(k, dtype):
    case = Case(k, "int8", [33, 20], [20, 9], group=3, dtype=dtype)
    expected, step = make_step(case), make_step(case, written=False)
    q_TQD = step.q_TQD.transpose(0, 1).contiguous().transpose(0, 1)  # as attention layers hand them over
    out_TQD = launch_write_step(step.cache, q_TQD, step.k_LHD, step.v_LHD, step.slots_L)
    assert differing_share(step, expected) < 0.002
    assert out_TQD.dtype == torch.float32
    torch.testing.assert_close(out_TQD, step.cache.k_transform.query(step.q_TQD), atol=1e-5, rtol=1e-5)


def test_scaled_and_rotated_queries_agree_with_the_reference():
    step = make_step(Case("int4", "int4", [40], [7], group=4), written=False)
    maps = SideTransform(True, torch.randn(2, 64), torch.rand(2, 64) + 0.5)
    cache = replace(step.cache, k_transform=maps)
    out_TQD = launch_write_step(cache, step.q_TQD, step.k_LHD, step.v_LHD, step.slots_L)
    torch.testing.assert_close(out_TQD, maps.query(step.q_TQD), atol=1e-4, rtol=1e-5)


def test_queries_of_padding_tokens_are_harmless():
    step = make_step(Case("int4", "int4", [20], [20]), written=False)
    slots = torch.full_like(step.slots_L, -1)
    out_TQD = launch_write_step(step.cache, step.q_TQD, step.k_LHD, step.v_LHD, slots)
    assert (step.cache.pool_NB == 0xFF).all()
    assert torch.isfinite(out_TQD).all()


@pytest.mark.parametrize(("k", "v"), [("int8", "int4"), ("bf16", "bf16"), ("fp8", "fp8")])
def test_queries_of_plain_keys_come_back_as_they_are(k, v):
    case = Case(k, v, [33], [3])
    expected, step = make_step(case), make_step(case, written=False)
    out_TQD = launch_write_step(step.cache, step.q_TQD, step.k_LHD, step.v_LHD, step.slots_L)
    assert out_TQD is step.q_TQD
    assert differing_share(step, expected) < 0.002


def test_a_cpu_writes_and_leaves_queries_to_its_attention():
    case = Case("int4", "int4", [33], [3])
    expected, step = make_step(case), make_step(case, written=False)
    out_TQD = write_step(step.cache, step.q_TQD, step.k_LHD, step.v_LHD, step.slots_L)
    assert out_TQD is step.q_TQD
    assert differing_share(step, expected) < 0.002
    out = decode_attention(
        step.cache, out_TQD, step.batch, step.spec, transformed=True, dtype=step.q_TQD.dtype
    )
    assert torch.equal(out, decode_attention(step.cache, step.q_TQD, step.batch, step.spec))


def test_negative_slots_store_nothing():
    step = make_step(Case("int8", "int4", [20], [1]), written=False)
    launch_write(step.cache, step.k_LHD, step.v_LHD, torch.full_like(step.slots_L, -1))
    assert (step.cache.pool_NB == 0xFF).all()


def test_reads_keys_that_are_not_contiguous():
    case = Case("int8", "int4", [20], [1])
    expected, step = make_step(case), make_step(case, written=False)
    both = torch.stack([step.k_LHD, step.v_LHD], 1)  # as a fused projection leaves them
    launch_write(step.cache, both[:, 0], both[:, 1], step.slots_L)
    assert differing_share(step, expected) < 0.002


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_a_broken_number_spoils_only_its_own_token(name):
    case = Case(name, name, [20], [1])
    expected, step = make_step(case, written=False), make_step(case, written=False)
    for s in (expected, step):
        s.v_LHD[3, 0, 5], s.v_LHD[4, 1, 7], s.k_LHD[5, 0, 9] = float("nan"), float("inf"), -float("inf")
    write_kv_ref(expected.cache, expected.k_LHD, expected.v_LHD, expected.slots_L)
    launch_write(step.cache, step.k_LHD, step.v_LHD, step.slots_L)
    assert differing_share(step, expected) < 0.002
    pages = torch.unique(step.slots_L // 16)
    k_LHD, v_LHD = read_kv_ref(step.cache, pages[:-1])  # full pages
    assert torch.isfinite(k_LHD).all()
    assert torch.isfinite(v_LHD).all()


def test_every_fp8_code_is_reached_and_ties_go_to_even():
    case = Case("fp8", "fp8", [512], [1], kv_heads=1, page_tokens=64)
    expected, step = make_step(case, written=False), make_step(case, written=False)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    middles = (codes[1:] + codes[:-1]) / 2
    numbers = torch.cat([codes, middles, codes * 1.01, torch.tensor([1e-9, 500.0, -1e9])])
    k_LHD = numbers.repeat(512 * 64 // len(numbers) + 1)[: 512 * 64].view(512, 1, 64)
    for s, write in ((expected, write_kv_ref), (step, launch_write)):
        write(s.cache, k_LHD, k_LHD, s.slots_L)
    assert torch.equal(step.cache.pool_NB, expected.cache.pool_NB)
