"""Prefill over dequantized pages, in the interpreter with plain attention in the library's place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_cases import Case, make_scaled_step, make_step, relative_error
from torch import Tensor

from quire.kernels.prefill_library import attend_dequantized, merge_partial, plan_stretches


def plain_attention(
    q_LQD: Tensor, k_HLD: Tensor, v_HLD: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """What the library computes, rounded to its types; NaN in any row of V or K would show."""
    group = q_LQD.shape[1] // k_HLD.shape[0]
    k_QLD, v_QLD = (x.float().repeat_interleave(group, 0) for x in (k_HLD, v_HLD))
    logits_QRL = q_LQD.float().transpose(0, 1) @ k_QLD.transpose(1, 2) * scale
    if causal:
        seen = torch.ones(logits_QRL.shape[1:], dtype=torch.bool).tril()
        logits_QRL = logits_QRL.masked_fill(~seen, float("-inf"))
    out_QRD = logits_QRL.softmax(-1) @ v_QLD
    return out_QRD.transpose(0, 1).to(q_LQD.dtype), logits_QRL.logsumexp(-1)


CASES = [
    Case("bf16", "bf16", [530], [530], page_tokens=64),  # a whole prompt: no history, a part-filled unit
    Case("fp8", "fp8", [1100], [30], page_tokens=32, group=1, head_dim=128),  # starts inside a unit
    Case("int8", "int4", [1536], [512], page_tokens=64, group=3, kv_heads=1),  # on a unit
    Case("int4", "int8", [1537], [514], page_tokens=16, dtype=torch.float16),
    Case("int8c", "int8c", [700], [100], page_tokens=64, group=4, kv_heads=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case):
    step = make_step(case)
    out = attend_dequantized(step.cache, step.q_TQD, step.batch, step.spec, plain_attention)
    assert out.dtype == step.q_TQD.dtype
    assert relative_error(out, step.expected()) < (8e-3 if case.dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_static_scales_bring_any_magnitude_into_range(name):
    step = make_scaled_step(Case(name, name, [600], [80], page_tokens=64))
    out = attend_dequantized(step.cache, step.q_TQD, step.batch, step.spec, plain_attention)
    assert relative_error(out, step.expected()) < 8e-3


def test_padding_rows_after_the_chunk_do_no_harm():
    step = make_step(Case("int8", "int8", [600], [80], page_tokens=64))
    padded_TQD = torch.cat([step.q_TQD, step.q_TQD.new_full((450, *step.q_TQD.shape[1:]), 3.0)])
    out = attend_dequantized(step.cache, padded_TQD, step.batch, step.spec, plain_attention)
    assert out.shape == padded_TQD.shape
    assert relative_error(out[:80], step.expected()) < 8e-3


def test_history_in_pieces_gives_what_one_piece_gives():
    step = make_step(Case("int8", "int4", [20000], [9], page_tokens=64, kv_heads=1, group=1))
    step = replace(step, q_TQD=step.q_TQD.float())
    assert len(plan_stretches(9, 20000).history) == 2
    out = attend_dequantized(step.cache, step.q_TQD, step.batch, step.spec, plain_attention)
    assert relative_error(out, step.expected()) < 3e-3


def test_stretches_cover_every_token_once():
    for new_tokens, kv_tokens in [(1, 1), (64, 64), (65, 300), (1, 129), (128, 64 * 9), (70, 1000)]:
        plan = plan_stretches(new_tokens, kv_tokens, unit=64, piece=256)
        assert [at for at, _ in plan.history] == list(range(0, plan.start, 256))
        assert sum(length for _, length in plan.history) == plan.start
        assert plan.start + plan.lead == kv_tokens - new_tokens
        assert 0 <= plan.lead < 64
        assert plan.square % 64 == 0
        assert 0 <= plan.start + plan.square - kv_tokens < 64


def test_merging_weighs_by_the_sums_and_leaves_other_rows_alone():
    torch.manual_seed(0)
    q_LQD, k_HLD, v_HLD = torch.randn(37, 3, 64), torch.randn(3, 90, 64), torch.randn(3, 90, 64)
    expected_LQD, expected_lse_QL = plain_attention(q_LQD, k_HLD, v_HLD, 0.1, False)
    out_LQD, lse_QL = plain_attention(q_LQD, k_HLD[:, :50], v_HLD[:, :50], 0.1, False)
    part_LQD, part_lse_QL = plain_attention(q_LQD, k_HLD[:, 50:], v_HLD[:, 50:], 0.1, False)
    before_LQD = out_LQD.clone()
    rows = slice(5, 30)
    merge_partial(out_LQD[rows], lse_QL[:, rows], part_LQD[rows], part_lse_QL[:, rows])
    assert torch.allclose(out_LQD[rows], expected_LQD[rows], atol=1e-5)
    assert torch.allclose(lse_QL[:, rows], expected_lse_QL[:, rows], atol=1e-5)
    assert torch.equal(out_LQD[:5], before_LQD[:5])
    assert torch.equal(out_LQD[30:], before_LQD[30:])
