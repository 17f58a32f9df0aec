"""Pages as numbers, in the interpreter: against the codec's own decoding."""

from __future__ import annotations

import pytest
import torch
from paged_cases import Case, make_step, relative_error

from quire.kernels.dequantize import dequantize_pages, dequantize_pages_ref, launch_dequantize
from quire.kernels.formats import Codes, KVFormat, Scales
from quire.kernels.ref.paged import write_kv_ref

SIDES = [
    ("bf16", "bf16"),
    ("fp8", "fp8"),
    ("int8", "int4"),
    ("int4", "int8"),
    ("int4g32", "int4g32"),
    ("int8c", "int4c"),
    ("int4", "bf16"),
    (KVFormat(Codes.INT8, Scales.TOKEN, group=32), KVFormat(Codes.FP8, Scales.TOKEN)),
]


@pytest.mark.parametrize(("k", "v"), SIDES)
@pytest.mark.parametrize(("tokens", "length"), [(77, 96), (64, 64), (33, 128)])
def test_numbers_are_the_codecs_and_rows_past_the_tokens_are_zero(k, v, tokens, length):
    step = make_step(Case(k, v, [77, 20], [1, 1], page_tokens=16))
    pages_M = step.batch.page_table_SM[0]
    sides = launch_dequantize(step.cache, pages_M, tokens, length)
    limit = 3e-3 if sides[0].dtype == torch.bfloat16 else 1e-3  # fp16 numbers, rounded once more
    for x_HLD, expected_HLD in zip(
        sides, dequantize_pages_ref(step.cache, pages_M, tokens, length), strict=True
    ):
        assert x_HLD.dtype == expected_HLD.dtype
        assert x_HLD.shape == (2, length, 64)
        assert relative_error(x_HLD, expected_HLD) < limit
        assert x_HLD[:, tokens:].count_nonzero() == 0


@pytest.mark.parametrize("name", ["int8", "int4", "int4g32"])
def test_the_smallest_scales_are_read_exactly(name):
    step = make_step(Case(name, name, [77], [1], page_tokens=16, dtype=torch.float32), written=False)
    quiet = 2.0 ** -torch.linspace(8, 20, 77)[:, None, None]
    write_kv_ref(step.cache, step.k_LHD * quiet, step.v_LHD * quiet, step.slots_L)
    pages_M = step.batch.page_table_SM[0]
    for x_HLD, expected_HLD in zip(
        launch_dequantize(step.cache, pages_M, 77, 96),
        dequantize_pages_ref(step.cache, pages_M, 77, 96),
        strict=True,
    ):
        assert torch.equal(x_HLD, expected_HLD)


def test_pages_from_the_middle_of_a_sequence():
    step = make_step(Case("int4", "int4", [100], [1], page_tokens=32, group=1, head_dim=128))
    pages_M = step.batch.page_table_SM[0]
    whole = dequantize_pages(step.cache, pages_M, 100, 128)
    tail = launch_dequantize(step.cache, pages_M[2:], 36, 64)
    for x_HLD, part_HLD in zip(whole, tail, strict=True):
        assert relative_error(part_HLD, x_HLD[:, 64:128]) < 1e-3


def test_more_tokens_than_pages_hold_are_refused():
    step = make_step(Case("int8", "int8", [40], [1], page_tokens=16))
    with pytest.raises(ValueError, match="pass all the pages"):
        dequantize_pages(step.cache, step.batch.page_table_SM[0, :2], 33, 64)
    with pytest.raises(ValueError, match="into 16 rows"):
        dequantize_pages(step.cache, step.batch.page_table_SM[0], 33, 16)


def test_reading_whole_pages_gives_fp16_unless_something_is_bf16():
    for k, dtype in (("int8", torch.float16), ("bf16", torch.bfloat16)):
        step = make_step(Case(k, "int4", [40], [1], page_tokens=16))
        assert dequantize_pages(step.cache, step.batch.page_table_SM[0], 40, 48)[0].dtype == dtype
