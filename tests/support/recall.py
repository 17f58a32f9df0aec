"""Prompts whose answer the demo model can only give by reading far back: made here, never taken from a text.

The facts are told in the phrases the model was trained on; filler text is composed of its story words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_WHO = ("fox", "otter", "cat", "king", "hen", "miller", "owl", "shepherd")
_WHERE = ("forest", "river", "cellar", "garden", "tower", "market", "mill", "field")
_WHAT = ("golden wheel", "black map", "silver spoon", "old lamp", "red apple", "small key", "blue stone")
_THINGS = ("river", "acorn", "lamp", "oven", "pine", "well", "rose", "cloud", "moon", "apple")


def story(rng: random.Random, sentences: int) -> str:
    """Harmless filler of about 14 tokens a sentence."""
    forms = (
        "The {who} went to the {where} and looked for the {what}.",
        "One morning the {who} found the {what} near the {where}.",
        "A {who} who lived by the {where} had lost the {what}.",
        "Then the {who} sat down in the {where} and was glad.",
    )
    return " ".join(
        rng.choice(forms).format(who=rng.choice(_WHO), where=rng.choice(_WHERE), what=rng.choice(_WHAT))
        for _ in range(sentences)
    )


def recall_prompt(tokenizer: PreTrainedTokenizerBase, seed: int, distance: int) -> tuple[list[int], str]:
    """Token ids of a prompt of roughly `distance` tokens, and the code the model should answer with."""
    rng = random.Random(seed)
    thing, code = rng.choice(_THINGS), str(rng.randint(1000, 99999))
    fact = f" Remember that the code of the {thing} is {code}. "
    question = f"\nQuestion: What is the code of the {thing}?\nAnswer: The code of the {thing} is"
    sentences = max(distance - 40, 0) // 14
    text = fact + story(rng, sentences) + question
    return list(tokenizer(text)["input_ids"]), code


def mixed_prompts(
    tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], seed: int = 0
) -> list[list[int]]:
    """Story prompts of exactly these lengths in tokens."""
    rng = random.Random(seed)
    prompts = []
    for length in lengths:
        ids: list[int] = []
        while len(ids) < length:
            ids = list(tokenizer(story(rng, length // 8 + 2))["input_ids"])
        prompts.append(ids[:length])
    return prompts
