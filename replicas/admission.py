"""Refuses requests that can never be served, before they cost anything. Pure.

Gateways and engines share these checks, so that each rule has one wording.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.replicas.errors import InvalidRequest
from quire.replicas.request import MAX_NAME_CHARACTERS, MAX_PRIORITY, ModelInfo, Request, SamplingParams
from quire.replicas.values import text, whole

MAX_PROMPT_LOGPROBS = 2_000_000
"""The most numbers of prompt_logprobs, which are sent in one message."""


def check_request(request: Request, info: ModelInfo, *, pool_pages: int, has_tokenizer: bool) -> None:
    """Check all that an engine requires. Raises InvalidRequest, which says what to change."""
    check_prompt(request.prompt, info)
    check_sampling(request.sampling, info, len(request.prompt))
    check_caller(request.priority, request.tenant)
    longest = min(len(request.prompt) + request.sampling.max_tokens, info.max_model_tokens)
    capacity = pool_pages * info.page_tokens
    if longest > capacity:
        raise InvalidRequest(
            f"prompt and max_tokens need {longest} tokens of KV; the pool holds {capacity}. "
            "Shorten the prompt, lower max_tokens, or raise pool.bytes"
        )
    if request.sampling.stop and not has_tokenizer:
        raise InvalidRequest("stop texts need a tokenizer, and this model has none; use stop_token_ids")


def check_prompt(prompt: Sequence[int], info: ModelInfo) -> None:
    """Check a prompt's length first, and then its tokens. Raises InvalidRequest."""
    if not prompt:
        raise InvalidRequest("the prompt is empty; send at least one token")
    if len(prompt) >= info.max_model_tokens:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens; this model serves {info.max_model_tokens} of "
            "prompt and output together. Shorten the prompt or raise max_model_tokens"
        )
    check_token_ids(prompt, info)


def check_token_ids(token_ids: Sequence[int], info: ModelInfo) -> None:
    """Check that token ids are no more than the model serves and in its vocabulary. Raises InvalidRequest."""
    if len(token_ids) > info.max_model_tokens:
        raise InvalidRequest(f"{len(token_ids)} token ids; this model serves {info.max_model_tokens} at most")
    last = info.vocab_size - 1
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) <= last:
        wrong = next(t for t in token_ids if not 0 <= t <= last)
        raise InvalidRequest(f"token id {wrong} is not in the model's vocabulary 0..{last}")


def check_sampling(params: SamplingParams, info: ModelInfo, prompt_tokens: int) -> None:
    """Check sampling parameters against the model and the prompt; ranges were checked before."""
    last = info.vocab_size - 1
    for token in params.stop_token_ids:
        if not 0 <= token <= last:
            raise InvalidRequest(f"stop_token_ids holds {token}; the vocabulary is 0..{last}")
    entries = prompt_tokens * (1 + (params.prompt_logprobs or 0))
    if params.prompt_logprobs is not None and entries > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"prompt_logprobs of {prompt_tokens} tokens would be {entries} numbers, the limit is "
            f"{MAX_PROMPT_LOGPROBS}; ask for fewer or shorten the prompt"
        )


def check_caller(priority: int, tenant: str, request_id: str = "") -> None:
    """Check the other fields of a request. Raises InvalidRequest."""
    whole("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
    text("tenant", tenant, MAX_NAME_CHARACTERS)
    text("request_id", request_id, MAX_NAME_CHARACTERS)
