"""One model takes another's place while a gateway serves: prompts are made for whoever reads them."""

import asyncio
import json
from dataclasses import replace

import pytest
from serving import INFO, KEYS, TOKENIZER, ScriptedEngine, staged

from quire.cluster import SamplingParams, collect_async
from quire.replicas.errors import InvalidRequest, ReplicaDied, Status
from quire.replicas.request import Failure, Request

OTHER = replace(KEYS, model=b"other weights")


class Answering(ScriptedEngine):
    """Answers at once with one token."""

    def submit(self, request: Request) -> None:
        super().submit(request)
        self.say(request, "x", 9, last=True)

    def prompts(self) -> list[tuple[int, ...]]:
        return [self.requests.get_nowait().prompt for _ in range(self.requests.qsize())]


def swapped() -> dict[str, bytes]:
    """A tokenizer in which two tokens have each other's number."""
    tree = json.loads(TOKENIZER["tokenizer.json"])
    ids = tree["model"]["vocab"]
    ids["L"], ids["l"] = ids["l"], ids["L"]
    return {**TOKENIZER, "tokenizer.json": json.dumps(tree).encode()}


async def test_a_text_is_tokenized_for_the_replica_that_takes_it():
    old, new = Answering(), Answering(keys=OTHER)
    async with staged(old, new, tokenizers=(TOKENIZER, swapped())) as stage:
        for _ in range(
            6
        ):  # in turn: the replica met last, for which a prompt is made first, is often another
            await collect_async(stage.client.generate("L"))
    of_old, of_new = set(old.prompts()), set(new.prompts())
    assert len(of_old) == len(of_new) == 1
    assert of_old != of_new


async def test_what_the_model_that_takes_it_cannot_read_is_refused():
    old, new = Answering(), Answering(replace(INFO, max_model_tokens=4), OTHER)
    async with staged(old, new) as stage:
        for _ in range(2):  # in turn, so that both have been met
            await collect_async(stage.client.generate([5]))
        answers = [collect_async(stage.client.generate([5] * 9)) for _ in range(6)]
        results = await asyncio.gather(*answers, return_exceptions=True)
    assert old.prompts() == [(5,)] + 3 * [(5,) * 9]
    assert new.prompts() == [(5,)]
    assert sum(isinstance(result, InvalidRequest) for result in results) == 3


@pytest.mark.parametrize("same_tokens", [True, False])
async def test_another_models_answer_does_not_go_on_where_one_stopped(same_tokens):
    """Not even if it begins with the same tokens."""
    first, second = ScriptedEngine(), ScriptedEngine(keys=OTHER)
    async with staged(first, second) as stage:
        stream = stage.client.generate([5, 6], SamplingParams())
        delta = asyncio.ensure_future(anext(stream))
        async with asyncio.timeout(5):
            while first.requests.empty() and second.requests.empty():
                await asyncio.sleep(0.005)
        died, lives = (second, first) if first.requests.empty() else (first, second)
        request = died.requests.get_nowait()
        died.say(request, "ab", 1, 2)
        await delta
        died.send(Failure(request.id, Status.UNAVAILABLE, "shard 1 is gone"))
        again = await asyncio.wait_for(lives.requests.get(), 5)
        lives.say(again, "abc", 1, 2, 3) if same_tokens else lives.say(again, "x", 9)
        with pytest.raises(ReplicaDied, match="another model has taken its place"):
            await anext(stream)


async def test_a_death_before_the_first_delta_leaves_the_request_to_the_other_model():
    first, second = ScriptedEngine(), ScriptedEngine(keys=OTHER)
    async with staged(first, second, tokenizers=(TOKENIZER, swapped())) as stage:
        answer = asyncio.ensure_future(collect_async(stage.client.generate("L")))
        async with asyncio.timeout(5):
            while first.requests.empty() and second.requests.empty():
                await asyncio.sleep(0.005)
        number, lives = (1, first) if first.requests.empty() else (0, second)
        await stage.kill_replica(number)
        request = await asyncio.wait_for(lives.requests.get(), 5)
        lives.say(request, "fine", 4, last=True)
        assert (await answer).text == "fine"
