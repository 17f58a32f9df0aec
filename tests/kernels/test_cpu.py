"""The compiled CPU path: against the reference, and against itself in other batches."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paged_cases import Case, Step, make_step, relative_error
from side_formats import SIDES
from torch import Tensor

from quire.kernels import cpu
from quire.kernels.cache_view import PagedBatch
from quire.kernels.formats import Codes, FormatError, KVFormat, Scales, Transform
from quire.kernels.ref.paged import attend_ref, read_kv_ref, write_kv_ref
from quire.kernels.transform import SideTransform

pytestmark = pytest.mark.skipif(cpu.backend() != "c++", reason="no C++ compiler here: the reference serves")

FP32 = torch.float32
ODD_INT8 = KVFormat(Codes.INT8, Scales.TOKEN, group=8)
ODD_INT4 = KVFormat(Codes.INT4, Scales.TOKEN, group=4, transform=Transform.HADAMARD)
ODD_FP8 = KVFormat(Codes.FP8, Scales.TOKEN, group=20)

CASES = [
    *(Case(name, name, [37, 1, 70], [3, 1, 70], group=3, page_tokens=64, dtype=FP32) for name in SIDES),
    *(Case("fp32", name, [41, 17], [1, 1], group=1, window=20, dtype=FP32) for name in SIDES),
    *(Case(name, "bf16", [41, 130], [41, 9], softcap=5.0, page_tokens=32, dtype=FP32) for name in SIDES),
    Case("int8", "int4", [300, 5], [1, 5], group=7, kv_heads=3, head_dim=128, page_tokens=64, dtype=FP32),
    Case("int4", "int8", [90], [64], group=2, kv_heads=1, head_dim=96, window=1, dtype=FP32),
    Case("int4", "int4", [90, 2], [1, 2], head_dim=16, dtype=FP32),
    Case("int4", "int4", [90, 20], [33, 1], head_dim=80, page_tokens=32, dtype=FP32),
    Case("int8", "fp8", [65], [2], head_dim=256, group=4, dtype=FP32),
    Case(ODD_INT8, ODD_FP8, [50, 20], [1, 20], head_dim=80, dtype=FP32),
    Case(ODD_INT4, ODD_INT4, [50, 20], [1, 20], head_dim=80, dtype=FP32),
    Case("bf16", "bf16", [2200, 1024], [1, 3], kv_heads=1, group=4, page_tokens=64, dtype=FP32),
    Case("int8", "int8", [1500], [40], kv_heads=1, group=2, window=600, page_tokens=32, dtype=FP32),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_agrees_with_the_reference_in_float64(case: Case) -> None:
    step = make_step(case)
    out_TQD = cpu.attend(step.cache, step.q_TQD, step.batch, step.spec)
    assert relative_error(out_TQD, step.expected()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_attention_answers_in_the_type_of_the_queries(dtype: torch.dtype) -> None:
    step = make_step(Case("int8", "int4", [37, 70], [1, 9], dtype=dtype))
    out_TQD = cpu.attend(step.cache, step.q_TQD, step.batch, step.spec)
    assert out_TQD.dtype is dtype
    assert relative_error(out_TQD, step.expected()) < 4e-3


def test_attention_reads_queries_through_their_strides() -> None:
    step = make_step(Case("int8", "int8", [37, 70], [5, 9], group=3))
    strided_TQD = step.q_TQD.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided_TQD.is_contiguous()
    expected_TQD = cpu.attend(step.cache, step.q_TQD, step.batch, step.spec)
    assert torch.equal(cpu.attend(step.cache, strided_TQD, step.batch, step.spec), expected_TQD)


def test_rows_of_no_sequence_come_out_as_zeros() -> None:
    step = make_step(Case("int8", "int8", [37], [2]))
    padded_TQD = torch.cat([step.q_TQD, torch.full_like(step.q_TQD, float("nan"))])
    assert cpu.attend(step.cache, padded_TQD, step.batch, step.spec)[2:].eq(0).all()


def test_a_row_of_nan_stays_alone() -> None:
    step = make_step(Case("int8", "int8", [37], [5], group=1, dtype=FP32))
    step.q_TQD[3, 1, 7] = float("nan")
    nan_TQ = cpu.attend(step.cache, step.q_TQD, step.batch, step.spec).isnan().any(-1)
    assert nan_TQ.nonzero().tolist() == [[3, 1]]


def test_a_shift_of_k_under_a_softcap_is_refused() -> None:
    step = make_step(Case("int8c", "bf16", [37], [2]))
    with pytest.raises(FormatError, match="soft-cap"):
        cpu.attend(step.cache, step.q_TQD, step.batch, replace(step.spec, softcap=5.0))


# ---- one result for every batch -------------------------------------------------------------------------

INVARIANT = [
    Case("int8", "int4", [1300], [150], kv_heads=2, group=3, page_tokens=64),
    Case("bf16", "bf16", [1100], [100], kv_heads=1, group=1, page_tokens=16, head_dim=96),
    Case("int4g32", "fp8", [1100], [90], kv_heads=1, group=7, page_tokens=32, window=70),
    Case("fp32", "int8", [2100], [70], kv_heads=1, group=4, page_tokens=64, window=1024, softcap=8.0),
]


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_a_row_has_the_same_bits_decoded_alone_and_in_any_chunk(case: Case) -> None:
    step = make_step(replace(case, dtype=FP32))
    kv, n = case.kv_tokens[0], case.query_tokens[0]
    whole_TQD = cpu.attend(step.cache, step.q_TQD, step.batch, step.spec)
    for rows in [1, 2, 13, 64]:
        for first in {0, 1, min(29, n - rows), n - rows}:
            last = first + rows
            part = _sequences(step, [(rows, kv - n + last)])
            out_TQD = cpu.attend(step.cache, step.q_TQD[first:last], part, step.spec)
            assert torch.equal(out_TQD, whole_TQD[first:last]), (rows, first)


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_a_sequence_has_the_same_bits_among_31_others(case: Case) -> None:
    step = make_step(replace(case, dtype=FP32))
    kv, others = case.kv_tokens[0], [(1 + i % 3, 3 + 35 * i) for i in range(31)]
    rows = sum(n for n, _ in others)
    q_TQD = torch.randn(rows + 1, *step.q_TQD.shape[1:])
    alone_TQD = cpu.attend(step.cache, q_TQD[rows:], _sequences(step, [(1, kv)]), step.spec)
    among_TQD = cpu.attend(step.cache, q_TQD, _sequences(step, [*others, (1, kv)]), step.spec)
    assert torch.equal(among_TQD[rows:], alone_TQD)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    step = make_step(Case("int8", "int4", [2500, 40], [1, 40], page_tokens=64, dtype=FP32))
    results = []
    for threads in [1, 2, 5]:
        with _threads(threads):
            results.append(cpu.attend(step.cache, step.q_TQD, step.batch, step.spec))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- write ----------------------------------------------------------------------------------------------

WRITES = [
    *(Case(name, name, [37, 1, 70], [1, 1, 1], page_tokens=32, head_dim=128) for name in SIDES),
    Case(ODD_INT8, ODD_FP8, [50], [1], head_dim=80),
    Case(ODD_INT4, "int4", [50], [1], head_dim=80),
    Case("int8", "int4", [50], [1], head_dim=16, dtype=torch.float16),
]


@pytest.mark.parametrize("case", WRITES, ids=str)
def test_pages_have_the_bytes_of_the_reference(case: Case) -> None:
    step = make_step(case)
    pool_NB = _written(step, cpu.write_kv, poison=0xFF)
    differ = (pool_NB != _written(step, write_kv_ref, poison=0xFF)).float().mean().item()
    rotated = step.cache.k_transform.rotate or step.cache.v_transform.rotate
    assert differ < (0.002 if rotated else 1e-9)  # a rotation's last bit may round a code the other way


@pytest.mark.parametrize("case", WRITES, ids=str)
def test_bytes_of_other_tokens_and_layers_stay(case: Case) -> None:
    step = make_step(case)
    touched = [
        (_written(step, write, poison=0xFF) != 0xFF) | (_written(step, write, poison=0) != 0)
        for write in (write_kv_ref, cpu.write_kv)
    ]
    assert touched[0].any()
    assert torch.equal(touched[0], touched[1])


@pytest.mark.parametrize("name", SIDES)
def test_zeros_nan_and_huge_numbers_are_stored_as_the_codec_stores_them(name: str) -> None:
    step = make_step(Case(name, name, [40], [1], dtype=FP32))
    plain = replace(step.cache, k_transform=SideTransform(), v_transform=SideTransform())
    odd = torch.tensor(
        [0.0, -0.0, 1e-40, 448.0, 464.0, -0.0009, 1e5, -1e30, 3e38, float("inf"), float("-inf")]
    )
    x_LHD = odd[torch.randint(len(odd), step.k_LHD.shape)]
    if name != "bf16":  # torch has two bit patterns for its NaN
        x_LHD[3, 0, 5] = x_LHD[7] = float("nan")
    x_LHD[9] = 0
    x_LHD[11:] = torch.randn(x_LHD[11:].shape)
    step = replace(step, cache=plain, k_LHD=x_LHD, v_LHD=x_LHD.flip(0))
    expected_NB = _written(step, write_kv_ref, poison=0)
    assert torch.equal(_written(step, cpu.write_kv, poison=0), expected_NB)


@pytest.mark.parametrize("name", SIDES)
def test_quiet_tokens_are_stored_and_read_as_the_reference_does(name: str) -> None:
    step = make_step(Case(name, name, [40], [3], dtype=FP32))
    plain = replace(step.cache, k_transform=SideTransform(), v_transform=SideTransform())
    quiet_LHD = torch.randn(step.k_LHD.shape) * 2.0 ** -torch.arange(40.0)[:, None, None]
    step = replace(step, cache=plain, k_LHD=quiet_LHD, v_LHD=quiet_LHD.flip(0))
    pool_NB = _written(step, cpu.write_kv, poison=0)
    assert torch.equal(pool_NB, _written(step, write_kv_ref, poison=0))
    step = replace(step, cache=replace(plain, pool_NB=pool_NB))
    out_TQD = cpu.attend(step.cache, step.q_TQD, step.batch, step.spec)
    assert relative_error(out_TQD, step.expected()) < 2e-6


def test_nan_survives_in_bf16() -> None:
    step = make_step(Case("bf16", "bf16", [16], [1], dtype=FP32))
    step.k_LHD[3, 0, 5] = float("nan")
    cache = replace(step.cache, pool_NB=_written(step, cpu.write_kv, poison=0))
    k_LHD, v_LHD = read_kv_ref(cache, step.batch.page_table_SM[0, :1].long())
    assert k_LHD.isnan().nonzero().tolist() == [[3, 0, 5]]
    assert not v_LHD.isnan().any()


def test_every_fp8_rounding_is_that_of_torch() -> None:
    step = make_step(Case("fp8", "fp8", [64], [1], kv_heads=64, group=1, head_dim=64, dtype=FP32))
    bits = torch.randint(0x3A000000, 0x43F00000, step.k_LHD.shape, dtype=torch.int32)
    bits &= ~torch.randint(0, 2, bits.shape, dtype=torch.int32).mul_(0x7FFFF)  # ties, half of them
    x_LHD = bits.view(FP32) * torch.randint(0, 2, bits.shape).mul(2).sub(1)
    step = replace(step, k_LHD=x_LHD, v_LHD=-x_LHD)
    assert torch.equal(_written(step, cpu.write_kv, poison=0), _written(step, write_kv_ref, poison=0))


def test_a_slot_of_minus_one_stores_nothing() -> None:
    step = make_step(Case("int8", "int4", [40], [1]))
    skipped = torch.where(torch.arange(40) % 3 == 0, -1, step.slots_L)
    kept = skipped >= 0
    some = replace(step, k_LHD=step.k_LHD[kept], v_LHD=step.v_LHD[kept], slots_L=step.slots_L[kept])
    expected_NB = _written(some, cpu.write_kv, poison=0xFF)
    assert torch.equal(_written(replace(step, slots_L=skipped), cpu.write_kv, poison=0xFF), expected_NB)


def test_a_token_has_the_same_bytes_written_alone_and_with_others() -> None:
    step = make_step(Case("int4", "int4g32", [70], [1]))
    together_NB = _written(step, cpu.write_kv, poison=0)
    pool_NB = torch.zeros_like(together_NB)
    cache = replace(step.cache, pool_NB=pool_NB)
    for t in range(70):
        cpu.write_kv(cache, step.k_LHD[t : t + 1], step.v_LHD[t : t + 1], step.slots_L[t : t + 1])
    assert torch.equal(pool_NB, together_NB)


# ---- what does not fit is refused -----------------------------------------------------------------------


def test_a_slot_outside_the_pool_is_refused_and_nothing_stored() -> None:
    step = make_step(Case("int8", "int8", [40], [1]))
    before_NB = step.cache.pool_NB.clone()
    slots_L = step.slots_L.clone()
    slots_L[-1] = len(before_NB) * step.cache.layout.page_tokens
    with pytest.raises(IndexError, match="outside the pool"):
        cpu.write_kv(step.cache, step.k_LHD + 1, step.v_LHD, slots_L)
    assert torch.equal(step.cache.pool_NB, before_NB)


@pytest.mark.parametrize(
    ("query_tokens", "kv_tokens"), [(2, 10_000), (2, 1), (3, 40)], ids=["pages", "negative position", "rows"]
)
def test_a_batch_that_names_what_is_not_there_is_refused(query_tokens: int, kv_tokens: int) -> None:
    step = make_step(Case("int8", "int8", [40], [2]))
    with pytest.raises(IndexError, match="do not fit"):
        cpu.attend(step.cache, step.q_TQD, _sequences(step, [(query_tokens, kv_tokens)]), step.spec)


def test_a_page_outside_the_pool_is_refused() -> None:
    step = make_step(Case("int8", "int8", [40], [2]))
    step.batch.page_table_SM[0, 1] = len(step.cache.pool_NB)
    with pytest.raises(IndexError, match="do not fit"):
        cpu.attend(step.cache, step.q_TQD, step.batch, step.spec)


@pytest.mark.parametrize("shape", [(2, 3, 64), (2, 4, 32)])
def test_queries_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    step = make_step(Case("int8", "int8", [40], [2]))
    with pytest.raises(ValueError, match="do not fit"):
        cpu.attend(step.cache, torch.zeros(shape), step.batch, step.spec)


# ---- the compiler ---------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_loader() -> Iterator[None]:
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


@pytest.mark.usefixtures("_fresh_loader")
def test_without_a_compiler_the_reference_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    step = make_step(Case("int8", "int4", [40, 7], [2, 1], dtype=FP32))
    with caplog.at_level(logging.WARNING):
        assert cpu.backend() == "reference"
        out_TQD = cpu.attend(step.cache, step.q_TQD, step.batch, step.spec)
    assert torch.equal(out_TQD, attend_ref(step.cache, step.q_TQD, step.batch, step.spec))
    assert torch.equal(_written(step, cpu.write_kv, poison=0), _written(step, write_kv_ref, poison=0))
    assert [record.message for record in caplog.records if "compiler" in record.message]
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("_fresh_loader")
def test_a_failing_compiler_is_quoted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'unknown flag -fopenmp' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    assert cpu.backend() == "reference"
    assert "unknown flag -fopenmp" in caplog.text


# ---- helpers --------------------------------------------------------------------------------------------


def _sequences(step: Step, rows_and_tokens: list[tuple[int, int]]) -> PagedBatch:
    """A batch of sequences that all read the first pages of the step's first sequence."""
    rows, tokens = zip(*rows_and_tokens, strict=True)
    return PagedBatch(
        query_start_S1=torch.tensor([0, *rows]).cumsum(0).int(),
        kv_tokens_S=torch.tensor(tokens, dtype=torch.int32),
        page_table_SM=step.batch.page_table_SM[:1].expand(len(rows), -1),
        slots_T=step.slots_L[:0],
        max_query_tokens=max(rows),
        max_kv_tokens=max(tokens),
    )


def _written(step: Step, write, poison: int) -> Tensor:
    """A pool full of `poison` after `write` of the step's tokens."""
    pool_NB = torch.full_like(step.cache.pool_NB, poison)
    write(replace(step.cache, pool_NB=pool_NB), step.k_LHD, step.v_LHD, step.slots_L)
    return pool_NB


class _threads:
    """Torch's number of threads inside a `with`."""

    def __init__(self, number: int) -> None:
        self.number, self.before = number, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.number)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)
