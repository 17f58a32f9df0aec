"""What the kernels compile to for GPUs that are not here: registers, memory, instructions.

Limits are per number read (K and V of a page): the budget at an H200's bandwidth is 7.8 instructions for
8-bit formats and 4 for int4, of which about 60 % can be sustained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import triton
import triton.language as tl
from aot import Compiled, compile_kernel
from side_formats import SIDES

from quire.kernels._combine import combine_kernel, combine_tile
from quire.kernels.decode import decode_kernel
from quire.kernels.dequantize import dequantize_kernel
from quire.kernels.formats import LayerFormat
from quire.kernels.layout import PageLayout
from quire.kernels.page_copy import copy_kernel
from quire.kernels.prefill import prefill_kernel
from quire.kernels.write import write_kernel

P, D, H = 64, 128, 8
POINTERS: Mapping[str, str] = {
    "q_ptr": "*bf16:16",
    "k_ptr": "*bf16:16",
    "v_ptr": "*bf16:16",
    "pool_ptr": "*u8:16",
    "slots_ptr": "*i64:16",
    "items_ptr": "*i32:16",
    "page_table_ptr": "*i32:16",
    "query_start_ptr": "*i32:16",
    "kv_tokens_ptr": "*i32:16",
    "signs_ptr": "*bf16:16",
    "scale_log2e": "fp32",
    "softcap": "fp32",
    "window": "i32",
    "tokens": "i32",
    "max_tokens": "i32",
}


def compiled(
    kernel: Any, k: str, v: str, capability: int, warps: int, head_dim: int = D, **constants: object
) -> Compiled:
    """Every pointer and stride a multiple of 16, as at run time."""
    k_format, v_format = SIDES[k], SIDES[v]
    cell = PageLayout((LayerFormat(k_format, v_format),), H, head_dim, P).cells[0]
    known = {
        **POINTERS,
        "K_SCALES": cell.k_scales,
        "V_CODES": cell.v_codes,
        "V_SCALES": cell.v_scales,
        "KC": k_format.codes.value,
        "VC": v_format.codes.value,
        "KG": k_format.groups(head_dim),
        "VG": v_format.groups(head_dim),
        "WINDOW": False,
        "SOFTCAP": False,
        "H": H,
        "G": 4,
        "R": 8,
        "D": head_dim,
        "P": P,
        "ASM": True,
        "FP8_NATIVE": capability >= 89,
        **constants,
    }
    arguments = {
        name: known.get(name, "*fp32:16" if name.endswith("_ptr") else "i32:16") for name in kernel.arg_names
    }
    return compile_kernel(kernel, arguments, capability=capability, warps=warps)


def per_number(code: Compiled, warps: int, head_dim: int = D) -> float:
    return sum(code.loop.values()) * warps * 32 / (2 * P * head_dim)


@pytest.mark.parametrize(
    ("k", "v", "capability", "limit"),
    [
        ("int8", "int8", 90, 2.4),
        ("int4", "int4", 80, 2.9),
        ("int4", "int4", 90, 2.9),
        ("int8", "int4", 90, 2.6),
        ("int4g64", "int4g64", 90, 2.9),
        ("fp8", "fp8", 80, 4.5),  # emulated: there is no instruction for the conversion
        ("fp8", "fp8", 90, 2.0),
    ],
)
def test_decode_stays_within_its_instruction_budget(k, v, capability, limit):
    code = compiled(decode_kernel, k, v, capability, warps=1)
    assert code.spill_bytes == 0
    assert code.shared_bytes <= 24 * 1024  # eight one-warp blocks per multiprocessor fit
    assert code.count("HMMA.16816") > 0
    assert code.count("HGMMA", "WGMMA") == 0
    assert code.count("I2F") == 0
    assert code.count("LDS.U8", "LDS.S8", "LDG.E.U8", "LDG.E.S8") == 0
    assert sum(n for op, n in code.loop.items() if op.startswith("LDGSTS") and "128" in op) >= 8
    assert per_number(code, 1) <= limit


def test_decode_of_256_channels_needs_two_warps():
    assert compiled(decode_kernel, "int4", "int4", 90, warps=2, head_dim=256).spill_bytes == 0
    assert compiled(decode_kernel, "int4", "int4", 90, warps=1, head_dim=256).spill_bytes > 0


@pytest.mark.parametrize("capability", [80, 90])
def test_bf16_rows_cost_less_in_wide_tiles(capability):
    code = compiled(decode_kernel, "bf16", "bf16", capability, warps=2, R=16, WINDOW=True)
    assert code.spill_bytes == 0
    assert code.count("HGMMA", "WGMMA") == 0
    assert per_number(code, 2) <= 3.3


def test_bf16_takes_32_rows():
    code = compiled(decode_kernel, "bf16", "bf16", 90, warps=2, R=32)
    assert code.spill_bytes <= 128  # Triton 3.9: 8 reloads among 1071 instructions a page; 3.6: none
    assert code.count("HGMMA", "WGMMA") == 0
    assert per_number(code, 2) <= 4.8


def test_windows_and_soft_caps_cost_little():
    code = compiled(decode_kernel, "int8", "int8", 90, warps=1, WINDOW=True, SOFTCAP=True)
    assert code.spill_bytes == 0
    assert per_number(code, 1) <= 2.6


@triton.jit
def naive_kernel(k_ptr, q_ptr, out_ptr, pages, D: tl.constexpr, P: tl.constexpr):
    """A textbook product with int8 keys: codes cast to fp16, transposed codes, rows padded to 16."""
    token_P, channel_D, row_R = tl.arange(0, P), tl.arange(0, D), tl.arange(0, 16)
    q_RD = tl.load(q_ptr + row_R[:, None] * D + channel_D[None, :])
    acc_RD = tl.zeros([16, D], tl.float32)
    for i in range(pages):
        at_PD = i * (P * D) + token_P[:, None] * D + channel_D[None, :]
        k_PD = tl.load(k_ptr + at_PD).to(tl.float16)
        v_PD = tl.load(k_ptr + at_PD + pages * P * D).to(tl.float16)
        acc_RD += tl.dot(tl.dot(q_RD, tl.trans(k_PD)).to(tl.float16), v_PD)
    tl.store(out_ptr + row_R[:, None] * D + channel_D[None, :], acc_RD)


def test_a_naive_formulation_breaks_the_budget():
    types = {"k_ptr": "*i8:16", "q_ptr": "*fp16:16", "out_ptr": "*fp32:16", "pages": "i32:16", "D": D, "P": P}
    code = compile_kernel(naive_kernel, types, capability=90, warps=4)
    assert per_number(code, 4) > 3
    assert code.count("I2F") + code.count("LDS.U8", "LDS.S8") > 0


@pytest.mark.parametrize(("k", "v"), [("bf16", "bf16"), ("int8", "int8"), ("int4", "int4"), ("fp8", "fp8")])
def test_prefill_hardly_spills_and_uses_warp_groups(k, v):
    code = compiled(prefill_kernel, k, v, 90, warps=4, R=64)
    assert code.spill_bytes <= 64
    assert code.shared_bytes <= 112 * 1024
    assert code.count("HGMMA") > 0
    assert code.count("I2F") == 0


@pytest.mark.parametrize(("k", "v"), [("bf16", "int8"), ("int4", "int4"), ("fp8", "int4g32")])
def test_dequantizing_hardly_spills_and_stores_wide(k, v):
    outputs = {"k_ptr": "*fp16:16", "v_ptr": "*fp16:16", "pages_ptr": "*i32:16", "length": "i32"}
    code = compiled(dequantize_kernel, k, v, 90, warps=4, **outputs)
    assert code.spill_bytes <= 32
    assert code.all["STG.E.128"] > 0
    assert not any(op.startswith(("I2F", "STG.E.U16", "LDG.E.U8", "LDS.U8")) for op in code.all)


@pytest.mark.parametrize(
    ("items", "sequences", "rotate"), [(132, 1, True), (264, 32, True), (700, 600, True), (264, 32, False)]
)
def test_combining_does_not_spill_and_rotates_on_tensor_cores(items, sequences, rotate):
    code = compiled_combine(items, sequences, ROTATE=rotate)
    assert code.spill_bytes == 0
    assert any("HMMA" in op for op in code.all) is rotate


def test_combining_with_static_scales_does_not_spill():
    assert compiled_combine(264, 32, ROTATE=True, SCALE=True).spill_bytes == 0


def compiled_combine(items: int, sequences: int, **flags: bool) -> Compiled:
    rows, at_once = combine_tile(items, sequences, D)
    types = {"out_ptr": "*bf16:16", "signs_ptr": "*bf16:16", "max_tokens": "i32"}
    types |= {"first_item_ptr": "*i32:16", "query_start_ptr": "*i32:16"}
    flags = {"SCALE": False, "SHIFT": False, "Q": 32, "G": 4, "D": D, "R": rows, **flags}
    arguments = {
        name: {**types, **flags, "X": at_once}.get(name, "*fp32:16") for name in combine_kernel.arg_names
    }
    return compile_kernel(combine_kernel, arguments, capability=90, warps=8)


@pytest.mark.parametrize(("name", "capability"), [("fp8", 80), ("int8", 90), ("int4", 90), ("int4g32", 80)])
@pytest.mark.parametrize(("tokens", "warps"), [(16, 4), (64, 8)])
def test_write_does_not_spill_and_rotates_on_tensor_cores(capability, name, tokens, warps):
    """With queries, which take registers as well; a write without them is compiled below."""
    code = compiled_write(name, capability, warps, T=tokens, G=4)
    assert code.spill_bytes == 0
    assert any("HMMA" in op or "HGMMA" in op for op in code.all)


@pytest.mark.parametrize(("name", "terms"), [("int8", 0), ("int4", 3)])
def test_write_with_static_scales_does_not_spill(name, terms):
    scaled = {f"{s}_{part}": value for s in "KV" for part, value in (("ROTATE", terms), ("SCALE", True))}
    others = {"k_scale_ptr": "*fp32:16", "v_scale_ptr": "*fp32:16", "Q_TERMS": 3}
    assert compiled_write(name, 90, 4, T=16, G=4, **scaled, **others).spill_bytes == 0


def test_wide_tiles_write_a_token_in_fewer_instructions():
    narrow, wide = compiled_write("int4", 90, 4, T=16), compiled_write("int4", 90, 8, T=64)
    assert narrow.spill_bytes == wide.spill_bytes == 0
    assert sum(wide.all.values()) * 8 / 64 < 0.85 * sum(narrow.all.values()) * 4 / 16


def compiled_write(name: str, capability: int, warps: int, **constants: object) -> Compiled:
    """K, V and queries in bf16, all of them rotated."""
    sides = {
        f"{s}_{part}": value
        for s in "KV"
        for part, value in (("ROTATE", 1), ("SHIFT", False), ("SCALE", False))
    }
    others = {"k_shift_ptr": "*fp32:16", "v_shift_ptr": "*fp32:16", "q_out_ptr": "*fp32:16"}
    others |= {"query_tokens": "i32", "Q_TERMS": 1, "G": 0}
    return compiled(write_kernel, name, name, capability, warps, **{**others, **sides, **constants})


@pytest.mark.parametrize(("capability", "scatter"), [(80, False), (90, True)])
def test_copies_are_wide_and_summing_them_reads_nothing_more(capability, scatter):
    types = {"pool_ptr": "*i64:16", "bytes_ptr": "*i64:16", "pages_ptr": "*i32:16", "words": "i32:16"}
    types |= {"stride": "i32:16", "sum_ptr": "*i64:16", "sum_stride": "i32"}
    arguments = {**types, "SCATTER": scatter, "W": 512}
    code = compile_kernel(copy_kernel, arguments, capability=capability, warps=4)
    assert code.spill_bytes == 0
    assert sum(n for op, n in code.all.items() if op.startswith("LDG.E.128")) == 2
    assert sum(n for op, n in code.all.items() if op.startswith("LDG")) == 3  # and the page's number
    assert sum(n for op, n in code.all.items() if op.startswith("STG.E.128")) == 2
