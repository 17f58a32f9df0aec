"""Offline batches through the public door."""

import gc
import threading
import weakref
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from quire.replicas import LLM, Completion, PoolConfig, PromptsFailed, SamplingParams, SchedulerConfig
from quire.replicas.errors import ConfigError, InvalidRequest, QuireError, Status, UnknownModel
from quire.replicas.request import Failure, FinishReason

CHAT = [
    {"role": "user", "content": "The pass key is 71432. The code of the river is 555."},
    {"role": "assistant", "content": "Thank you, I will remember it."},
    {"role": "user", "content": "What is the pass key?"},
]


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", kv="int4", threads_per_shard=1) as llm:
        yield llm


def test_text_and_token_ids_are_the_same_prompt(llm):
    text = "Once upon a time there was a"
    ids = llm.tokenizer(text)["input_ids"]
    a, b = llm.generate([text, ids], SamplingParams(max_tokens=8))
    assert a.outputs == b.outputs
    assert a.prompt == tuple(ids)


def test_every_prompt_may_have_its_own_sampling(llm):
    long, short = llm.generate(
        ["The king", "The fox"], [SamplingParams(max_tokens=9), SamplingParams(max_tokens=2)]
    )
    assert len(short.outputs[0].token_ids) == 2
    assert len(long.outputs[0].token_ids) == 9
    assert short.outputs[0].finish_reason is FinishReason.LENGTH
    with pytest.raises(InvalidRequest, match="2 prompts came with 1 sampling parameters"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_one_bad_prompt_costs_nobody_anything(llm):
    before = llm.stats()
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate(["The king", []])
    assert llm.stats() == before


def test_a_bar_counts_prompts_where_it_is_asked_for_or_seen(llm, capfd):
    one = SamplingParams(max_tokens=2)
    llm.generate(["The king", "The fox", "The cat"], one, use_tqdm=True)
    assert "3/3" in capfd.readouterr().err
    llm.generate(["The king"], one)  # no terminal
    llm.generate(["The king"], one, use_tqdm=False)
    assert capfd.readouterr().err == ""


def test_scripts_written_for_vllm_run(llm):
    """Its names of arguments, lists of chats, and outputs by index."""
    with LLM(model="demo", tensor_parallel_size=1, max_model_len=512, enable_prefix_caching=True) as other:
        assert (other.info.tp, other.info.max_model_tokens) == (1, 512)
    sampling_params = SamplingParams(max_tokens=3, temperature=0)
    first, second = llm.chat([CHAT, CHAT[:1]], sampling_params=sampling_params, use_tqdm=False)
    assert first.outputs[0].text == llm.chat(CHAT, sampling_params)[0].outputs[0].text
    assert len(first.prompt) > len(second.prompt)


def test_a_single_prompt_needs_no_list(llm):
    one = SamplingParams(max_tokens=2)
    by_text = llm.generate("Once upon a time", one)
    by_ids = llm.generate(by_text[0].prompt, one)
    by_array = llm.generate(np.array(by_text[0].prompt), one)
    assert len(by_text) == len(by_ids) == len(by_array) == 1
    assert by_text[0].outputs == by_ids[0].outputs == by_array[0].outputs


def test_a_seed_of_numpy_draws_what_the_same_seed_draws(llm):
    for seed in (5, 2**64 - 1):
        a, b = llm.generate(
            ["The", "The"],
            [SamplingParams(max_tokens=4, temperature=1, seed=s) for s in (seed, np.uint64(seed))],
        )
        assert a.outputs == b.outputs


def test_parts_of_a_message_are_its_text(llm):
    parts = [{"type": "text", "text": "The pass key "}, {"type": "text", "text": "is 71432."}]
    one = SamplingParams(max_tokens=1)
    chats = [
        [{"role": "user", "content": parts}],
        [{"role": "user", "content": "The pass key is 71432."}],
    ]
    assert len({answer.prompt for answer in llm.chat(chats, one)}) == 1


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda llm: llm.generate([5, "a"]), r"prompts\[0\]"),
        (lambda llm: llm.generate({"prompt": "a"}), "prompts"),
        (lambda llm: llm.generate(["a"], {"max_tokens": 3}), "sampling"),
        (lambda llm: llm.generate(["a"], [{"max_tokens": 3}]), r"sampling_params\[0\]"),
        (lambda llm: llm.generate(["a"], tenant=None), "tenant"),
        (lambda llm: llm.generate("half of \ud83e"), "surrogate"),
        (lambda llm: llm.generate("word " * 1_000_000), "tokens.*Shorten"),
        (lambda llm: llm.chat([]), "no messages"),
        (lambda llm: llm.chat("Hello!"), "messages"),
        (lambda llm: llm.chat([{"role": "user", "content": 5}]), r"messages\[0\]\.content"),
    ],
)
def test_what_is_no_request_is_refused_by_name(llm, ask, said):
    with pytest.raises(InvalidRequest, match=said):
        ask(llm)


def test_a_models_defaults_are_used_where_a_request_says_nothing(tmp_path):
    """Very hot: every draw is another token."""
    folder = make_model("llama", tmp_path)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 100, "top_k": 40}')
    greedy, unsaid, seeded = (
        SamplingParams(max_tokens=12, ignore_eos=True, **said)
        for said in ({"temperature": 0}, {}, {"seed": 3})
    )

    def answers(llm, sampling):
        return {c.outputs[0].token_ids for c in llm.generate([[5, 6, 7]] * 6, sampling)}

    with LLM(str(folder), kv="fp32", threads_per_shard=1) as llm:
        assert (llm.info.sampling.temperature, llm.info.sampling.top_k) == (100.0, 40)
        assert len(answers(llm, greedy)) == len(answers(llm, seeded)) == 1
        assert len(answers(llm, unsaid)) == 6
        assert answers(llm, seeded) != answers(llm, greedy)
        best = answers(llm, greedy)
    with LLM(str(folder), kv="fp32", threads_per_shard=1, generation_defaults="none") as llm:
        assert answers(llm, unsaid) == best


def test_more_prompts_than_may_wait_are_fed_in_turn():
    with LLM("demo", threads_per_shard=1, scheduler=SchedulerConfig(max_queued=2, max_running=2)) as llm:
        completions = llm.generate([[5, 6, i] for i in range(9)], SamplingParams(max_tokens=2))
    assert [c.prompt[-1] for c in completions] == list(range(9))


def test_two_shards_say_what_one_says():
    sampling = SamplingParams(max_tokens=16)
    with LLM("demo", kv="fp32", tp=2, threads_per_shard=1) as two:
        (answer,) = two.chat(CHAT, sampling)
        assert two.info.tp == 2
        two.check()
    with LLM("demo", kv="fp32", threads_per_shard=1) as one:
        assert one.chat(CHAT, sampling)[0].outputs == answer.outputs
    assert answer.text == "The pass key is 71432."


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv": "int5"}, ConfigError, "unknown KV format 'int5'; choose fp32, bf16"),
        ({"tp": 3}, ConfigError, "3"),
        ({"model": "no/such-model-anywhere"}, UnknownModel, "no/such-model-anywhere"),
        ({"max_model_tokens": 10**6}, ConfigError, "the model allows 4096"),
        ({"max_model_len": 10**6}, ConfigError, "the model allows 4096"),
        ({"tensor_parallel_size": 3}, ConfigError, "tp=3 does not fit"),
        ({"gpu_memory_utilization": 0.9}, ConfigError, r"use pool=PoolConfig\(memory_fraction="),
        ({"kv_cache_dtype": "fp8"}, ConfigError, 'use kv="fp8"'),
        ({"enable_prefix_caching": False}, ConfigError, "is always on"),
        ({"mdoel": "demo"}, ConfigError, "no option mdoel"),
    ],
)
def test_impossible_options_are_refused_with_what_to_change(options, error, message):
    with pytest.raises(error, match=message):
        LLM(**({"model": "demo"} | options))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A checkpoint whose embedding of token 77 is no number."""
    folder = make_model("llama", tmp_path_factory.mktemp("damaged"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][77] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_prompt_that_fails_costs_the_others_of_its_call_nothing(damaged):
    prompts, sampling = [[5, 6, 7], [5, 77, 7], [8, 9, 10, 11]], SamplingParams(max_tokens=9, ignore_eos=True)
    with LLM(damaged, kv="fp32", threads_per_shard=1) as llm:
        with pytest.raises(PromptsFailed, match=r"1 of 3 prompts failed; prompt 1: .*not finite") as caught:
            llm.generate(prompts, sampling)
        first, second, third = caught.value.results
        assert isinstance(second, Failure)
        assert second.status is Status.INTERNAL
        good = llm.generate([prompts[0], prompts[2]], sampling)
        assert [first.outputs, third.outputs] == [completion.outputs for completion in good]
        assert all(isinstance(result, Completion) for result in (first, third))
        llm.check()


def test_threads_take_turns(damaged):
    prompts, sampling = [[5, 6, 7 + at] for at in range(6)], SamplingParams(max_tokens=20, ignore_eos=True)
    with LLM(damaged, kv="fp32", threads_per_shard=1) as llm:
        expected = [completion.outputs for completion in llm.generate(prompts, sampling)]
        found = {}

        def ask(at: int) -> None:
            for _ in range(3):
                found[at] = llm.generate([prompts[at], prompts[at - 1]], sampling)

        threads = [threading.Thread(target=ask, args=(at,), daemon=True) for at in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        for at, (own, before) in found.items():
            assert (own.outputs, before.outputs) == (expected[at], expected[at - 1])
        assert len(found) == 6
        llm.check()


def test_a_closed_llm_says_so_and_may_be_closed_again(damaged):
    with LLM(damaged, kv="fp32", threads_per_shard=1) as llm:
        llm.generate([[5, 6]], SamplingParams(max_tokens=2))
    llm.close()
    with pytest.raises(QuireError, match="this LLM is closed"):
        llm.generate([[5, 6]])
    assert llm.info.architecture == "LlamaForCausalLM"


@contextmanager
def without_collection():
    """What dies inside dies because nobody refers to it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def large_tensors() -> list[weakref.ref]:
    """Of 512 bytes and more: weights, tables, pools."""
    found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return [weakref.ref(tensor) for tensor in found if tensor.nbytes >= 512]


@pytest.mark.parametrize("end", ["close", "with"])
@pytest.mark.parametrize("kv", ["fp32", "int4"])
def test_closing_frees_weights_and_pages_at_once(damaged, kv, end):
    with without_collection():
        before = {id(tensor()) for tensor in large_tensors()}
        llm = LLM(damaged, kv=kv, threads_per_shard=1)
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3))
        made = [tensor for tensor in large_tensors() if id(tensor()) not in before]
        pool = weakref.ref(llm._executor.shard.pool)
        assert len(made) > 15
        if end == "close":
            llm.close()
        else:
            with llm:
                pass
        assert pool() is None
        assert [tensor().shape for tensor in made if tensor() is not None] == []
        del llm


def test_a_load_that_fails_half_way_leaves_nothing(damaged):
    made = []

    class Enough(Exception):
        pass

    def progress(done: int, total: int) -> None:
        if done == total // 2:
            made.extend(tensor for tensor in large_tensors() if id(tensor()) not in before)
            raise Enough

    with without_collection():
        before = {id(tensor()) for tensor in large_tensors()}
        with suppress(Enough):
            LLM(damaged, threads_per_shard=1, progress=progress)
        assert len(made) > 5
        assert [tensor().shape for tensor in made if tensor() is not None] == []


def test_what_a_caller_does_with_the_tokenizer_changes_no_prompt():
    text = "The pass key is 71432. The code of the river is 555."
    with LLM("demo", threads_per_shard=1) as llm:
        before = llm.generate(text, SamplingParams(max_tokens=1))[0].prompt
        llm.tokenizer(text, truncation=True, max_length=5)
        assert llm.generate(text, SamplingParams(max_tokens=1))[0].prompt == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": None}, "model must be a text, got None"),
        ({"model": ""}, "model is empty"),
        ({"kv": 5}, "kv must be a text or a mapping, got 5"),
        ({"tp": "2"}, r"tp must be a whole number .*, got '2'"),
        ({"tp": True}, r"tp must be a whole number .*, got True"),
        ({"weights": "none"}, "weights must be one of 'checkpoint', 'random', got 'none'"),
        ({"dtype": "int8"}, "dtype must be one of 'auto', 'bfloat16'"),
        ({"device": "tpu"}, "device must be one of 'auto', 'cpu', 'cuda'"),
        ({"max_model_tokens": 0}, r"max_model_tokens must be a whole number \(at least 2\) or null, got 0"),
        ({"max_model_tokens": 2.5}, r"max_model_tokens must be a whole number .* or null, got 2.5"),
        ({"threads_per_shard": 10**9}, r"threads_per_shard must be .*at least 1 and at most 1024"),
        ({"generation_defaults": "all"}, "generation_defaults must be one of 'model', 'none'"),
        ({"pool": 5}, r"pool must be a mapping of keys to values \(PoolConfig\), got 5"),
        ({"pool": PoolConfig(bytes=0)}, r"pool\.bytes must be .*at least 1"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(options, said):
    with pytest.raises(ConfigError, match=said):
        LLM(**options)
