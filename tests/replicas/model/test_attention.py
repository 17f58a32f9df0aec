"""Paged attention inside a model: it attends to what was stored, in every format."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Chunk, Ranks, make_model, reference_logits, some_tokens, step_of, tiny_config
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from quire.kernels.codec import decode, encode
from quire.kernels.formats import LayerFormat, layer_formats
from quire.kernels.transform import default_transform
from quire.replicas.errors import ModelNotServable
from quire.replicas.model.attention import Probe, paged_attention

IDS = some_tokens(61)
CHUNKS = [37, 1, 1, 9, 13]
PAGES = [3, 1, 6, 2]


def stored(x_THD: Tensor, side: str, fmt: LayerFormat) -> Tensor:
    """What a page gives back: mapped, rounded to codes, decoded."""
    one = getattr(fmt, side)
    mapped = default_transform(one).store(x_THD)
    codes, scales = encode(mapped.unsqueeze(2), one)
    return decode(codes, scales, one, x_THD.shape[-1]).squeeze(2)


def rounded_attention(module, query, key, value, mask, *, scaling, softcap=None, sliding_window=None, **_):
    """Attention over all tokens at once, to keys and values as the format `module.config.kv` rounds them."""
    fmt = layer_formats(module.config.kv, 99)[0]
    k_map, v_map = default_transform(fmt.k), default_transform(fmt.v)
    q_TQD = k_map.query(query[0].transpose(0, 1))
    k_TQD, v_TQD = (
        stored(x[0].transpose(0, 1), side, fmt).repeat_interleave(query.shape[1] // x.shape[1], 1)
        for x, side in ((key, "k"), (value, "v"))
    )
    logits_QTT = torch.einsum("tqd,lqd->qtl", q_TQD, k_TQD) * scaling
    if softcap:
        logits_QTT = softcap * torch.tanh(logits_QTT / softcap)
    n = query.shape[2]
    distance_TT = torch.arange(n)[:, None] - torch.arange(n)
    unseen_TT = (distance_TT < 0) | (distance_TT >= (sliding_window or n))
    probs_QTT = logits_QTT.masked_fill(unseen_TT, float("-inf")).softmax(-1)
    return v_map.output(torch.einsum("qtl,lqd->tqd", probs_QTT, v_TQD))[None], None


@pytest.fixture(scope="module", autouse=True)
def _registered():
    AttentionInterface.register("rounded", rounded_attention)
    AttentionMaskInterface.register("rounded", lambda *args, **kwargs: None)


FORMATS = ["bf16", "fp8", "int8", "int4", "int4g32", "k8v4"]
CASES = [("gemma2", "int4"), ("phi3", "int8"), *(("llama", kv) for kv in FORMATS)]


@pytest.mark.parametrize(("name", "kv"), CASES)
def test_quantized_logits_are_those_of_attention_to_rounded_keys_and_values(name, kv, tmp_path):
    head_dim = {"head_dim": 64} if kv == "int4g32" else {}
    folder = make_model(name, tmp_path, kv=kv, **head_dim)
    with Ranks(tiny_config(folder, kv)) as ranks:
        got = ranks.run(IDS, CHUNKS, PAGES)
    want = reference_logits(folder, IDS, "rounded")
    # A number that lies between two codes may be rounded either way; few do.
    assert (got - want).abs().quantile(0.9) < 2e-3
    exact = reference_logits(folder, IDS)
    assert (got - want).abs().mean() < 0.2 * (got - exact).abs().mean()


def test_a_step_of_several_sequences_keeps_them_apart(tmp_path):
    folder = make_model("llama", tmp_path)
    a, b = some_tokens(33, seed=1), some_tokens(20, seed=2)
    with Ranks(tiny_config(folder)) as ranks:
        ranks.forward(step_of([Chunk(a[:30], 0, [5, 9])], 16))
        got = ranks.forward(step_of([Chunk(a[30:], 30, [5, 9, 4]), Chunk(b, 0, [2, 7])], 16, rows=[2, 22, 3]))
    torch.testing.assert_close(got[0], reference_logits(folder, a)[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1], reference_logits(folder, b)[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(got[2], reference_logits(folder, b)[0], atol=1e-4, rtol=0)


class Attention(nn.Module):
    layer_idx = 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"step": None}, "does not pass keyword arguments"),
        ({"s_aux": torch.zeros(2)}, "uses s_aux"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "an attention mask of its own"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(given, reason):
    q, kv = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    arguments = {"step": Probe(), "attention_mask": None, "scaling": 1.0, **given}
    with pytest.raises(ModelNotServable, match=reason):
        paged_attention(Attention(), q, kv, kv, **arguments)


def test_arguments_that_change_nothing_are_accepted():
    q, kv = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    probe = Probe()
    out, _ = paged_attention(
        Attention(),
        q,
        kv,
        kv,
        None,
        scaling=0.5,
        step=probe,
        dropout=0.0,
        s_aux=None,
        output_router_logits=False,
    )
    assert out.shape == (1, 3, 4, 16)
    assert (probe.layers[0].query_heads, probe.layers[0].kv_heads, probe.layers[0].spec.scale) == (4, 2, 0.5)


@pytest.mark.parametrize("said", ["by the module", "by the call"])
def test_attention_that_is_not_causal_is_refused(said):
    module, x = nn.Identity(), torch.zeros(1, 2, 3, 16)
    module.is_causal = said == "by the call"
    with pytest.raises(ModelNotServable, match="the attention of Identity is not causal"):
        paged_attention(
            module, x, x, x, None, step=Probe(), is_causal=None if module.is_causal is False else False
        )
