"""The transform of keys that a calibration finds, against others on the same keys and queries."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Ranks, make_model, some_tokens, tiny_config
from torch import Tensor

from quire.kernels.codec import decode, encode
from quire.kernels.formats import FORMATS, layer_formats
from quire.kernels.transform import SideTransform
from quire.replicas.model.calibration import calibrated_formats, key_transform

INT4 = FORMATS["int4"].k


def moments(k_THD: Tensor, q_THD: Tensor) -> Tensor:
    k, q = k_THD.double(), q_THD.double()
    return torch.stack([k.sum(0), k.square().sum(0), q.square().sum(0)])


def logit_error(transform: SideTransform, k_THD: Tensor, q_THD: Tensor) -> float:
    """Of int4 keys, without what soft-max cancels: the same for every key of a query."""
    codes, scales = encode(transform.store(k_THD), INT4)
    stored_THD = decode(codes, scales, INT4, k_THD.shape[-1])
    logits_HTT = torch.einsum("thd,lhd->htl", transform.query(q_THD), stored_THD)
    error_HTT = logits_HTT - torch.einsum("thd,lhd->htl", q_THD, k_THD)
    return float((error_HTT - error_HTT.mean(-1, keepdim=True)).square().mean())


def keys_and_queries() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    loud_D = torch.ones(64)
    loud_D[[3, 17, 40]] = 12.0
    k_THD = torch.randn(300, 2, 64) * loud_D
    k_THD[..., 5] += 30.0
    return k_THD, torch.randn(300, 2, 64) / loud_D


def test_the_balance_of_keys_and_queries_beats_a_rotation_alone_and_a_scale_of_keys_alone() -> None:
    k_THD, q_THD = keys_and_queries()
    shift_HD, scale_HD = key_transform(moments(k_THD, q_THD), 300, shift=True)
    balanced = logit_error(SideTransform(True, shift_HD, scale_HD), k_THD, q_THD)
    rotated = logit_error(SideTransform(True), k_THD, q_THD)
    whitened = logit_error(SideTransform(True, k_THD.mean(0), k_THD.std(0)), k_THD, q_THD)
    halved = logit_error(SideTransform(True, k_THD.mean(0), k_THD.std(0).sqrt()), k_THD, q_THD)
    assert balanced < min(whitened, halved) * 1.02
    assert balanced < 0.3 * rotated


def test_stored_keys_have_the_size_of_one_and_no_shift_where_none_is_wanted() -> None:
    k_THD, q_THD = keys_and_queries()
    for shift in (True, False):
        shift_HD, scale_HD = key_transform(moments(k_THD, q_THD), 300, shift=shift)
        assert (shift_HD is None) is not shift
        stored_THD = SideTransform(True, shift_HD, scale_HD).store(k_THD)
        assert stored_THD.square().mean((0, 2)).sqrt().tolist() == pytest.approx([1, 1], rel=1e-3)


def test_channels_that_never_change_and_queries_of_zero_give_finite_scales() -> None:
    k_THD, q_THD = keys_and_queries()
    k_THD[..., 9], q_THD[..., 11], k_THD[:, 1], q_THD[:, 1] = 2.0, 0.0, 0.0, 0.0
    shift_HD, scale_HD = key_transform(moments(k_THD, q_THD), 300, shift=True)
    assert scale_HD.isfinite().all()
    assert (scale_HD > 0).all()
    assert SideTransform(True, shift_HD, scale_HD).store(k_THD).isfinite().all()


def test_only_quantized_keys_of_the_chosen_layers_become_affine() -> None:
    formats = layer_formats(
        {"default": {"k": "int8", "v": "int4"}, "layers": {"1": {"k": "bf16", "v": "fp8"}}}, 3
    )
    got = calibrated_formats(formats, [0, 1])
    assert [f.k.transform.affine for f in got] == [True, False, False]
    assert [f.v for f in got] == [f.v for f in formats]


@pytest.mark.parametrize("tp", [2, 4])
def test_every_rank_measures_the_moments_of_all_heads(tp: int, tmp_path) -> None:
    folder, ids = make_model("qwen3", tmp_path), some_tokens(64)
    with Ranks(tiny_config(folder, "int8")) as one:
        expected = one.each(lambda shard: shard.key_moments(ids))[0]
    with Ranks(tiny_config(folder, "int8", tp=tp)) as ranks:
        for sums in ranks.each(lambda shard: shard.key_moments(ids)):
            torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)
