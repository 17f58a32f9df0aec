"""A token's logits have the same bits alone and in any company."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Chunk, Ranks, make_model, some_tokens, step_of, tiny_config
from torch import nn

from quire.replicas.model.invariance import ChunkedActivation, padded

IDS = some_tokens(75)
OTHERS = some_tokens(200, seed=1)
PAGES = [3, 1, 6, 2, 11]
FORMATS = ["fp32", "bf16", "fp8", "int8", "int4", "k8v4"]


def chunked(ranks: Ranks, size: int) -> torch.Tensor:
    sizes = [size] * (len(IDS) // size) + [len(IDS) % size] * (len(IDS) % size > 0)
    return ranks.run(IDS, sizes, PAGES)


def in_company(ranks: Ranks) -> torch.Tensor:
    """IDS in two chunks, each in the middle of a step with others that decode and prefill."""
    tokens = ranks.shards[0].layout.page_tokens
    first, second = Chunk(IDS[:29], 0, PAGES), Chunk(IDS[29:], 29, PAGES)
    ranks.forward(step_of([Chunk(OTHERS[:23], 0, [20, 21, 22])], tokens))
    one = step_of(
        [Chunk(OTHERS[23:25], 23, [20, 21, 22]), first, Chunk(OTHERS[:77], 0, range(25, 30))], tokens
    )
    two = step_of([Chunk(OTHERS[25:26], 25, [20, 21, 22]), second], tokens)
    return torch.cat([ranks.forward(one)[2:31], ranks.forward(two)[1:]])


@pytest.mark.parametrize("kv", FORMATS)
def test_logits_do_not_depend_on_chunks_or_company(kv, tmp_path):
    with Ranks(tiny_config(make_model("llama", tmp_path), kv)) as ranks:
        whole = ranks.run(IDS, [len(IDS)], PAGES)
        for size in (1, 7, 64):
            assert torch.equal(chunked(ranks, size), whole), f"chunks of {size}"
        assert torch.equal(in_company(ranks), whole)


@pytest.mark.parametrize(
    ("name", "tp"), [("gemma2", 1), ("mixtral", 1), ("starcoder2", 1), ("qwen2", 2), ("llama", 4)]
)
def test_nor_in_other_architectures_and_sharded(name, tp, tmp_path):
    with Ranks(tiny_config(make_model(name, tmp_path), "int4", tp=tp)) as ranks:
        whole = ranks.run(IDS, [len(IDS)], PAGES)
        assert torch.equal(chunked(ranks, 7), whole)
        assert torch.equal(in_company(ranks), whole)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_nor_in_bf16_arithmetic(name, tmp_path):
    with Ranks(tiny_config(make_model(name, tmp_path), "int8", dtype="bfloat16")) as ranks:
        whole = ranks.run(IDS, [len(IDS)], PAGES)
        assert torch.equal(chunked(ranks, 1), whole)
        assert torch.equal(in_company(ranks), whole)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("kv", ["bf16", "int4"])
def test_nor_for_the_demo_model_on_one_thread_or_three(kv, threads):
    ids = some_tokens(300, seed=2)
    with Ranks(tiny_config("demo", kv, page_tokens=64)) as ranks:
        whole = ranks.run(ids, [300], PAGES)
        assert torch.equal(ranks.run(ids, [64, 7, 1, 1, 97, 130], PAGES), whole)


def test_only_the_wanted_rows_make_the_same_logits(tmp_path):
    with Ranks(tiny_config(make_model("gemma2", tmp_path))) as ranks:
        whole = ranks.run(IDS, [len(IDS)], PAGES)
        for rows in ([74], [3, 70, 4], []):
            some = ranks.forward(step_of([Chunk(IDS, 0, PAGES)], 16, rows=rows))
            assert some.shape == (len(rows), 130)
            assert torch.equal(some, whole[rows])


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU("tanh"), nn.Tanh()], ids=repr)
def test_an_activation_has_the_same_bits_however_many_threads_share_it(activation, threads):
    """256 columns: three threads would divide most of these at places where a vector ends in the middle."""
    x = torch.randn(512, 256)
    wrapped = ChunkedActivation(activation)
    whole = wrapped(x)
    torch.testing.assert_close(whole, activation(x))
    for rows in (16, 176, 192, 256, 272):
        assert torch.equal(wrapped(x[:rows]), whole[:rows])


def test_the_activations_of_a_model_are_wrapped(tmp_path):
    with Ranks(tiny_config(make_model("mixtral", tmp_path))) as ranks:
        wrapped = [m for m in ranks.shards[0]._forward.model.modules() if isinstance(m, ChunkedActivation)]
    assert len(wrapped) == 2


@pytest.mark.parametrize(("rows", "want"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_rows_are_padded_to_whole_sixteens(rows, want):
    assert padded(rows) == want
