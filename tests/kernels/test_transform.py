"""The static map before quantization: invisible in q.k and in the output."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from side_formats import SIDES

from quire.kernels.formats import FormatError, KVFormat, Scales, Transform
from quire.kernels.transform import SideTransform, default_transform, hadamard, rotate

CPU = torch.device("cpu")


def _transforms(head_dim: int) -> list[SideTransform]:
    shift_HD, scale_HD = torch.randn(2, head_dim), torch.rand(2, head_dim) + 0.2
    return [
        SideTransform(),
        SideTransform(rotate=True),
        SideTransform(shift_HD=shift_HD),
        SideTransform(scale_HD=scale_HD),
        SideTransform(shift_HD=shift_HD, scale_HD=scale_HD),
        SideTransform(rotate=True, shift_HD=shift_HD, scale_HD=scale_HD),
    ]


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_softmax_of_q_k_does_not_see_the_map_of_keys(head_dim: int) -> None:
    q_TQD, k_LHD = torch.randn(5, 6, head_dim), torch.randn(11, 2, head_dim)  # 3 query heads per kv head
    expected = torch.einsum("tqd,lqd->tql", q_TQD, k_LHD.repeat_interleave(3, 1)).softmax(-1)
    for transform in _transforms(head_dim):
        stored_LQD = transform.store(k_LHD).repeat_interleave(3, 1)
        logits = torch.einsum("tqd,lqd->tql", transform.query(q_TQD), stored_LQD)
        assert torch.allclose(logits.softmax(-1), expected, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_the_output_does_not_see_the_map_of_values(head_dim: int) -> None:
    v_LHD, p_TQL = torch.randn(11, 2, head_dim), torch.randn(5, 6, 11).softmax(-1)
    expected = torch.einsum("tql,lqd->tqd", p_TQL, v_LHD.repeat_interleave(3, 1))
    for transform in _transforms(head_dim):
        mean_TQD = torch.einsum("tql,lqd->tqd", p_TQL, transform.store(v_LHD).repeat_interleave(3, 1))
        assert torch.allclose(transform.output(mean_TQD), expected, atol=1e-5)


@pytest.mark.parametrize(("head_dim", "block"), [(16, 16), (48, 16), (80, 16), (96, 32), (128, 128)])
def test_the_rotation_is_its_own_inverse_and_mixes_blocks_of_a_power_of_two(
    head_dim: int, block: int
) -> None:
    matrix_DD = hadamard(head_dim, CPU)
    assert torch.allclose(matrix_DD @ matrix_DD, torch.eye(head_dim), atol=1e-5)
    assert torch.equal(matrix_DD, matrix_DD.T)
    assert matrix_DD.count_nonzero(0).eq(block).all()
    x = torch.randn(3, head_dim)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-5)


def test_the_rotation_spreads_an_outlier_channel() -> None:
    x = torch.zeros(1, 64)
    x[0, 9] = 8.0
    assert rotate(x).abs().eq(1).all()


def test_only_the_plain_map_counts_as_identity() -> None:
    assert [transform.identity for transform in _transforms(16)] == [True] + [False] * 5


def test_fingerprints_tell_maps_apart_and_equal_maps_together() -> None:
    transforms = _transforms(32)
    fingerprints = [transform.fingerprint for transform in transforms]
    assert len(set(fingerprints)) == len(transforms)
    affine = transforms[-1]
    assert affine.shift_HD is not None
    same = replace(affine, shift_HD=affine.shift_HD.clone())
    assert same.fingerprint == affine.fingerprint
    nudged_HD = affine.shift_HD.clone()
    nudged_HD[1, 7] += 1e-6
    assert replace(affine, shift_HD=nudged_HD).fingerprint != affine.fingerprint


@pytest.mark.parametrize("name", [n for n in SIDES if not n.endswith("c")])
def test_formats_without_calibration_have_a_default_map(name: str) -> None:
    assert default_transform(SIDES[name]).rotate is name.startswith("int4")


@pytest.mark.parametrize("name", ["int8c", "int4c"])
def test_formats_with_calibrated_scales_are_refused_without_a_calibration(name: str) -> None:
    with pytest.raises(FormatError, match="calibrat"):
        default_transform(SIDES[name])


@pytest.mark.parametrize("codes", ["int8", "int4"])
def test_static_scales_need_a_calibration_whatever_the_transform(codes: str) -> None:
    fmt = KVFormat(SIDES[codes].codes, Scales.STATIC, transform=Transform.HADAMARD)
    with pytest.raises(FormatError, match="choose dynamic"):
        default_transform(fmt)
