import gc
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quire.replicas.model.compiled import compile_layers
from quire.replicas.model.merged import merge_products, release_products

TOKENS = torch.arange(12)[None] % 7


def model_of(kind: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=56,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@torch.inference_mode()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


def products(model) -> list[str]:
    return [name for name, m in model.named_modules() if type(m) is torch.nn.Linear]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])  # qwen2: with biases
def test_a_merged_model_computes_the_same(kind):
    model = model_of(kind)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    before = logits(model)
    merge_products(model)
    assert not any("k_proj" in name or "up_proj" in name for name in products(model))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_each_product_is_computed_once(monkeypatch):
    model = model_of("llama")
    merge_products(model)
    shapes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda x, weight, bias=None: shapes.append(tuple(weight.shape)) or linear(x, weight, bias),
    )
    logits(model)
    layer = [(64, 32), (32, 32), (96, 32), (32, 48)]  # Q, K and V; output; gate and up; down
    assert shapes == [*layer, *layer, (56, 32)]


def test_compiled_layers_hold_one_product_for_siblings():
    graphs = []
    model = model_of("llama")
    merge_products(model)

    def backend(graph, _):
        graphs.append([node for node in graph.graph.nodes if "linear" in str(node.target)])
        return graph.forward

    layer = torch.compile(model.model.layers[0].mlp, backend=backend, fullgraph=True)
    layer(torch.randn(1, 3, 32))
    assert [len(nodes) for nodes in graphs] == [2]  # gate and up, down


def test_another_input_is_never_answered_with_the_last_ones_product():
    model = model_of("llama")
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    expected = attention.k_proj(y)
    merge_products(model)
    attention.q_proj(x)
    torch.testing.assert_close(attention.k_proj(y), expected)


def test_the_weights_are_kept_once():
    model = model_of("llama")
    merge_products(model)
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_compiling_merged_layers_changes_nothing():
    model = model_of("llama")
    before = logits(model)
    merge_products(model)
    compile_layers(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_what_was_merged_is_released_at_once():
    model = model_of("llama")
    merge_products(model)
    product = weakref.ref(model.model.layers[0].self_attn.q_proj._product)
    gc.disable()
    try:
        release_products(model)
        assert product() is None
    finally:
        gc.enable()
