"""The demonstration: a chat in which a fact told first is asked for last. Needs a served demo model."""

from __future__ import annotations

from collections.abc import Callable

from quire.cluster.api.answer import Answer
from quire.cluster.api.client import Client
from quire.cluster.cli.stats_text import stats_lines
from quire.cluster.config import GatewayConfig, ReplicaConfig, ServeConfig
from quire.replicas.config import EngineConfig, PoolConfig
from quire.replicas.errors import QuireError
from quire.replicas.request import SamplingParams

_POOL_BYTES = 16 << 20
_FACTS = "The pass key is 71432. The code of the lamp is 8264."
_QUESTIONS = (("What is the pass key?", "71432"), ("What is the code of the lamp?", "8264"))
_TALE = (
    "Long ago, a {0} named {1} lived in a house close to the {2}. {1} was lonely. "
    "More than anything {1} loved her {3}. One day the {3} was gone. "
    "{1} looked in the {2}, but it was not there. On the road she met a {4} named {5}. "
    '"Can I help you?" asked {5}. "My {3} is gone," {1} answered. They ate some {6} and made a plan. '
    "They walked all day until they came to the {7}. There, in the middle of the {7}, lay the {3}. "
    "{1} laughed and danced, and {5} danced too. That night the {0} and the {4} slept well."
)
_TALES = (
    ("cat", "Lucas", "forest", "black map", "frog", "Kate", "berries", "cellar"),
    ("fox", "Clara", "river", "golden wheel", "mouse", "Uma", "nuts", "village"),
    ("otter", "Greta", "garden", "silver spoon", "pony", "Lena", "cheese", "mill"),
    ("hen", "Uma", "tower", "blue stone", "owl", "Clara", "apples", "market"),
    ("owl", "Kate", "mill", "old lamp", "cat", "Lucas", "bread", "river"),
    ("mouse", "Lena", "field", "red kite", "hen", "Greta", "berries", "forest"),
)
"""Stories as the model tells them, told earlier in the chat: about 850 tokens between fact and question."""
_SAMPLING = SamplingParams(max_tokens=220, temperature=0)


def demo_config(kv: str, tp: int) -> ServeConfig:
    """The demo model on a port of its own, with fractions of a core: small machines run it too."""
    return ServeConfig(
        engine=EngineConfig(model="demo", kv=kv, tp=tp, pool=PoolConfig(bytes=_POOL_BYTES)),
        gateway=GatewayConfig(port=0, cpus=0.1),
        replicas=ReplicaConfig(cpus_per_shard=0.5, graceful_shutdown_s=2),
    )


def run_demo(address: str, line: Callable[[str], None], piece: Callable[[str], None]) -> None:
    """Shows the chat as it streams. `line` prints a line, `piece` a part of one.

    Raises QuireError if the model does not find a fact, or if nothing came from the cache.
    """
    turns: list[dict[str, str]] = []
    with Client(address) as client:
        _turn(client, turns, _FACTS, line, piece)
        for tale in _TALES:
            turns += [_message("user", "Tell me a story."), _message("assistant", _TALE.format(*tale))]
        line(f"\n           [{len(_TALES)} stories, told earlier]")
        _turn(client, turns, "Tell me a story.", line, piece)
        for question, expected in _QUESTIONS:
            answer = _turn(client, turns, question, line, piece)
            if expected not in answer.text:
                raise QuireError(f"the demo model answered {answer.text!r}, which lacks {expected}")
        if not answer.usage.cached_tokens:
            raise QuireError("no token of the last prompt came from the cache")
        line("")
        for text in stats_lines(client.stats()):
            line(text)


def _turn(
    client: Client,
    turns: list[dict[str, str]],
    said: str,
    line: Callable[[str], None],
    piece: Callable[[str], None],
) -> Answer:
    turns.append(_message("user", said))
    line(f"\nuser       {said}")
    piece("assistant  ")
    answer = Answer()
    for delta in client.chat(turns, _SAMPLING):
        answer.add(delta)
        piece(delta.text)
    turns.append(_message("assistant", answer.text))
    usage, timings = answer.usage, answer.timings
    line(
        f"\n           [{usage.prompt_tokens} tokens of prompt, {usage.cached_tokens} from the cache; "
        f"first token after {timings.first_token_s * 1e3:.0f} ms, {usage.output_tokens} tokens "
        f"in {timings.total_s:.1f} s]"
    )
    return answer


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
