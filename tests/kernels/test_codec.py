"""Numbers to codes and back."""

from __future__ import annotations

import pytest
import torch
from side_formats import SIDES
from torch import Tensor

from quire.kernels.codec import FP8_MAX, decode, encode
from quire.kernels.formats import Codes, KVFormat, Scales

DYNAMIC = [name for name, fmt in SIDES.items() if fmt.scales is Scales.TOKEN]
SMALLEST = 2**-24  # of the dynamic scales, and their step below 2**-14
# The greatest error of a number, as a share of the range (int) or of the number (float) of its group.
ERROR = {Codes.FP32: 0.0, Codes.BF16: 2**-8, Codes.FP8: 2**-4, Codes.INT8: 0.51 / 127, Codes.INT4: 1.02 / 15}


def _round_trip(x: Tensor, fmt: KVFormat) -> Tensor:
    return decode(*encode(x, fmt), fmt, x.shape[-1])


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4", "int4g64", "int4g32"])
def test_a_round_trip_errs_by_a_code_at_most(name: str) -> None:
    fmt = SIDES[name]
    x = torch.randn(3, 5, 128) * torch.logspace(-2, 3, 5)[:, None]
    groups = x.unflatten(-1, (max(1, fmt.groups(128)), -1))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    span = high - low if fmt.codes is Codes.INT4 else torch.maximum(high, -low)
    error = (_round_trip(x, fmt).unflatten(-1, groups.shape[-2:]) - groups).abs()
    assert (error <= span[..., None] * ERROR[fmt.codes] + SMALLEST / 2).all()


@pytest.mark.parametrize(("name", "top"), [("int8", 127), ("int4", 15), ("int4g32", 15)])
def test_a_quiet_token_errs_by_its_own_codes_down_to_the_smallest_scale(name: str, top: int) -> None:
    x = torch.randn(30, 128) * 2.0 ** torch.arange(10, -20, -1.0)[:, None]
    span = x.amax(-1).clamp_min(0) - x.amin(-1).clamp_max(0) if top == 15 else x.abs().amax(-1)
    error = (_round_trip(x, SIDES[name]) - x).abs().amax(-1)
    # A scale rounds by half its step: so much the largest code may miss.
    assert (error <= span * ERROR[SIDES[name].codes] + (top + 1) * SMALLEST / 2).all()


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_token_of_a_ten_thousandth_of_the_others_keeps_its_shape(name: str) -> None:
    x = torch.randn(2, 128)
    x[1] *= 1e-4
    relative = (_round_trip(x, SIDES[name]) - x).norm(dim=-1) / x.norm(dim=-1)
    assert relative[1] < 2 * relative[0] + 0.01


def test_fp8_errs_by_a_sixteenth_of_the_number_and_saturates() -> None:
    x = torch.randn(7, 64) * 20
    assert ((_round_trip(x, SIDES["fp8"]) - x).abs() <= x.abs() * 2**-4 + 2**-10).all()
    assert _round_trip(torch.tensor([[1e9, -1e9] * 8]), SIDES["fp8"]).abs().eq(FP8_MAX).all()


@pytest.mark.parametrize("name", SIDES)
def test_codes_of_decoded_numbers_are_the_same_codes(name: str) -> None:
    fmt = SIDES[name]
    x = torch.randn(2, 9, 128) * (3 if fmt.scales is Scales.STATIC else 1)
    x[..., ::16], x[..., 1::16] = -6.0, 4.0  # every group uses the whole range of its codes
    codes, scales = encode(x, fmt)
    again, scales_again = encode(decode(codes, scales, fmt, 128), fmt)
    assert torch.equal(codes, again)
    if scales is not None and scales_again is not None:
        assert torch.equal(scales.view(torch.float16), scales_again.view(torch.float16))


@pytest.mark.parametrize("name", SIDES)
def test_sizes_are_those_of_the_format(name: str) -> None:
    fmt = SIDES[name]
    codes, scales = encode(torch.randn(2, 9, 128), fmt)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, 9, 128 * fmt.codes.bits // 8)
    if fmt.scales is Scales.TOKEN:
        assert scales is not None
        assert scales.shape == (2, fmt.groups(128), 9, fmt.scale_bytes)
    else:
        assert scales is None


@pytest.mark.parametrize("name", SIDES)
def test_zeros_come_back_as_zeros(name: str) -> None:
    assert _round_trip(torch.zeros(4, 128), SIDES[name]).eq(0).all()


@pytest.mark.parametrize("name", [n for n, f in SIDES.items() if f.codes.quantized])
def test_nan_and_infinity_never_reach_a_quantized_page(name: str) -> None:
    x = torch.randn(4, 128)
    x[0, 3], x[1, 3], x[2, 3] = float("nan"), float("inf"), float("-inf")
    codes, scales = encode(x, SIDES[name])
    assert decode(codes, scales, SIDES[name], 128).isfinite().all()


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_token_with_an_infinity_does_not_change_the_others(name: str) -> None:
    x = torch.randn(4, 128)
    odd = x.clone()
    odd[2, 7] = float("inf")
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(_round_trip(odd, SIDES[name])[keep], _round_trip(x, SIDES[name])[keep])


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_nan_and_infinity_pass_through_floating_formats(name: str) -> None:
    x = torch.tensor([[float("nan"), float("inf"), float("-inf"), 1.5] * 4])
    assert torch.equal(_round_trip(x, SIDES[name]).nan_to_num(7), x.nan_to_num(7))


def test_int8_is_symmetric_and_stored_offset_binary() -> None:
    codes, scales = encode(torch.tensor([[-2.0, 2.0, 0.0, 1.0] * 4]), SIDES["int8"])
    assert codes[0, :4].tolist() == [1, 255, 128, 192]  # 63.5 rounds to even
    assert scales is not None
    assert scales.view(torch.float16).item() == torch.tensor(2 / 127).half().item()


def test_int4_packs_the_two_halves_of_a_head_into_a_byte() -> None:
    x = torch.zeros(1, 32)
    x[0, 1], x[0, 17] = 15.0, 3.0
    codes, scales = encode(x, SIDES["int4"])
    assert codes[0].tolist() == [0, 3 << 4 | 15, *[0] * 14]
    assert scales is not None
    assert scales.view(torch.float16).abs().flatten().tolist() == [1.0, 0.0]


def test_the_zero_of_int4_is_an_integer_that_a_code_can_hold() -> None:
    x = torch.randn(50, 64) + torch.linspace(-9, 9, 50)[:, None]
    _, scales = encode(x, SIDES["int4"])
    assert scales is not None
    zeros = scales.view(torch.float16)[..., 1].float()
    assert zeros.eq(zeros.round()).all()
    assert zeros.min() == 0
    assert zeros.max() == 15


@pytest.mark.parametrize(("name", "top"), [("int8c", 127), ("int4c", 7)])
def test_static_codes_saturate_symmetrically(name: str, top: int) -> None:
    x = torch.tensor([[-1000.0, 1000.0, float(top), -float(top), 0.5, 1.5, -0.4, 3.0] * 2])
    back = _round_trip(x, SIDES[name])
    assert back[0, :8].tolist() == [-top, top, top, -top, 0, 2, 0, 3]


def test_static_codes_write_nothing_but_codes() -> None:
    assert encode(torch.randn(4, 64), SIDES["int8c"])[1] is None
    assert encode(torch.randn(4, 64), SIDES["fp8"])[1] is None


@pytest.mark.parametrize("codes", [Codes.FP8, Codes.INT8, Codes.INT4])
def test_groups_have_scales_of_their_own(codes: Codes) -> None:
    x = torch.randn(6, 64)
    loud = x.clone()
    loud[:, :16] *= 1000
    fmt = KVFormat(codes, Scales.TOKEN, group=16)
    assert torch.equal(_round_trip(x, fmt)[:, 16:], _round_trip(loud, fmt)[:, 16:])
    assert _round_trip(x, fmt).sub(x).norm() < _round_trip(x, KVFormat(codes, Scales.TOKEN)).sub(x).norm()


def test_a_token_is_encoded_alone() -> None:
    x = torch.randn(9, 128)
    for fmt in SIDES.values():
        codes, scales = encode(x, fmt)
        one, one_scales = encode(x[4:5], fmt)
        assert torch.equal(codes[4:5], one)
        if scales is not None and one_scales is not None:
            assert torch.equal(scales[:, 4:5], one_scales)
