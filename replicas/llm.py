"""Offline batches without Ray: `LLM(model, kv=..., tp=...).generate(prompts)`. Any thread may call."""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from reprlib import repr as shown
from types import TracebackType
from typing import Any, Literal

from tqdm import tqdm

from quire.replicas.config import EngineConfig, GpuConfig, PoolConfig, SchedulerConfig
from quire.replicas.config_decoder import checked
from quire.replicas.engine.load import load_engine, load_tokenizer
from quire.replicas.errors import InvalidRequest, QuireError
from quire.replicas.request import (
    Event,
    Failure,
    FinishReason,
    ModelInfo,
    Output,
    Request,
    RequestId,
    SamplingParams,
    Timings,
    TokenLogprob,
    Usage,
)
from quire.replicas.stats import EngineStats
from quire.replicas.text.prompt import ChatMessage, Messages, Prompt, as_messages, as_prompts
from quire.replicas.text.tokenize import PromptTokenizer
from quire.replicas.values import items
from quire.replicas.vllm_options import from_vllm


@dataclass(frozen=True, slots=True)
class OutputText:
    """One of the n outputs for a prompt."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Completion:
    """All outputs for one prompt."""

    prompt: tuple[int, ...]
    outputs: tuple[OutputText, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """The first output's text."""
        return self.outputs[0].text


class PromptsFailed(QuireError):
    """Some prompts of a call failed while they were computed; all the others are done."""

    def __init__(self, results: Seq[Completion | Failure]) -> None:
        failed = [(at, result) for at, result in enumerate(results) if isinstance(result, Failure)]
        at, first = failed[0]
        super().__init__(
            f"{len(failed)} of {len(results)} prompts failed; prompt {at}: {first.message}. The exception's "
            "`results` has every prompt's Completion or Failure"
        )
        self.results = tuple(results)
        """In the prompts' order: a Completion, or a Failure with `status` and `message`."""


class LLM:
    """A model in this process (and `tp` - 1 others). A context manager; `close` ends its shards.

    May be used from several threads: calls are computed one after the other. Prompts are batched within a
    call; many prompts in one call are faster than many calls.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "demo",
        kv: str | Mapping[str, object] = "int8",
        tp: int = 1,
        *,
        weights: Literal["checkpoint", "random"] = "checkpoint",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        max_model_tokens: int | None = None,
        generation_defaults: Literal["model", "none"] = "model",
        threads_per_shard: int | None = None,
        gpu: GpuConfig | None = None,
        pool: PoolConfig | None = None,
        scheduler: SchedulerConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
        **vllm: object,
    ) -> None:
        """See `EngineConfig` for the options.

        Options of vLLM's `LLM` are taken where they mean the same here; for others the error names ours.
        Raises ConfigError, UnknownModel, ModelNotServable.
        """
        same = from_vllm(vllm)
        options = EngineConfig(
            model=os.fspath(model) if isinstance(model, os.PathLike) else model,
            weights=weights,
            kv=kv,
            tp=same.get("tp", tp),
            dtype=dtype,
            device=device,
            max_model_tokens=same.get("max_model_tokens", max_model_tokens),
            generation_defaults=generation_defaults,
            threads_per_shard=threads_per_shard,
            gpu=gpu or GpuConfig(),
            pool=pool or PoolConfig(),
            scheduler=scheduler or SchedulerConfig(),
        )
        config = checked(options)
        self.tokenizer = load_tokenizer(config.model)
        self._max_queued = config.scheduler.max_queued
        self._executor, self._engine = load_engine(config, progress=progress)
        self._prompts = None if self.tokenizer is None else PromptTokenizer(self.tokenizer)
        self._numbers = itertools.count(1)
        self._stepping = threading.Lock()
        """The engine has one user at a time."""
        self._closed = False

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def check(self) -> None:
        """The pool's integrity check. Raises IntegrityError."""
        with self._stepping:
            self._engine.check()

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
        *,
        tenant: str = "",
    ) -> list[Completion]:
        """Continue every prompt (text or token ids), batched together; results in the prompts' order.

        A single prompt gives a list of one. `use_tqdm`: show a progress bar; None: on a terminal.

        Raises: InvalidRequest before anything is computed; PromptsFailed once all is computed, if a prompt
        failed, with the results of the others; ReplicaDied if a shard dies.
        """
        given = as_prompts(prompts)
        params = _params_for(len(given), sampling_params)
        requests = [self._request(prompt, p, tenant) for prompt, p in zip(given, params, strict=True)]
        for request in requests:
            self._engine.validate(request)
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Messages | Seq[Messages],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
        *,
        tenant: str = "",
    ) -> list[Completion]:
        """Compute the next turn of one chat, `[{"role": "user", "content": ...}, ...]`, or of several.

        Results, bar and errors are those of `generate`: a single chat gives a list of one.
        """
        prompts = [
            self._tokenizing().encode_chat(turns, self.info.max_model_tokens) for turns in _chats(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm, tenant=tenant)

    def close(self) -> None:
        """End the shards and free weights and pages, once calls of other threads are done."""
        with self._stepping:
            self._closed = True
            self._executor.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, prompt: str | tuple[int, ...], sampling: SamplingParams, tenant: str) -> Request:
        if isinstance(prompt, str):
            prompt = tuple(self._tokenizing().encode(prompt, self.info.max_model_tokens))
        request_id = RequestId(str(next(self._numbers)))
        return Request(id=request_id, prompt=prompt, sampling=sampling, tenant=tenant)

    def _tokenizing(self) -> PromptTokenizer:
        if self._prompts is None:
            raise InvalidRequest("this model has no tokenizer; give token ids")
        return self._prompts

    def _run(self, requests: list[Request], use_tqdm: bool | None) -> list[Completion]:
        bar = tqdm(total=len(requests), unit="prompt", disable=None if use_tqdm is None else not use_tqdm)
        with self._stepping, bar:
            if self._closed:
                raise QuireError("this LLM is closed; make another one")
            events = self._events_of(requests, bar)
        results = [_result(request, events[request.id]) for request in requests]
        completions = [result for result in results if isinstance(result, Completion)]
        if len(completions) < len(results):
            raise PromptsFailed(results)
        return completions

    def _events_of(self, requests: list[Request], bar: tqdm) -> dict[RequestId, list[Event]]:
        events: dict[RequestId, list[Event]] = {request.id: [] for request in requests}
        left = deque(requests)
        try:
            while left or self._engine.has_work:
                while left and self._engine.queued < self._max_queued:
                    self._engine.add(left.popleft())
                for event in self._engine.step():
                    events[event.request_id].append(event)
                    bar.update(isinstance(event, Failure) or event.usage is not None)
        finally:  # after an error or Ctrl-C nothing may go on in the next call
            for request in requests:
                self._engine.cancel(request.id)
            self._engine.take_events()
        return events


def _result(request: Request, events: list[Event]) -> Completion | Failure:
    outputs = [event for event in events if isinstance(event, Output)]
    return events[-1] if isinstance(events[-1], Failure) else _completion(request, outputs)


def _chats(messages: Any) -> list[tuple[ChatMessage, ...]]:
    """The one chat, or the several: sequences whose own items are messages. Raises InvalidRequest."""
    chats = items("messages", messages, "messages, or of chats")
    several = chats and all(
        isinstance(chat, list | tuple) and not (chat and isinstance(chat[0], str)) for chat in chats
    )
    return [as_messages(one) for one in (chats if several else [messages])]


def _params_for(prompts: int, sampling: SamplingParams | Seq[SamplingParams] | None) -> Seq[SamplingParams]:
    """The sampling parameters of each prompt. Raises InvalidRequest."""
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * prompts
    params = items("sampling_params", sampling, "SamplingParams, or SamplingParams for all prompts")
    for at, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise InvalidRequest(f"sampling_params[{at}] must be SamplingParams, got {shown(one)}")
    if len(params) != prompts:
        raise InvalidRequest(f"{prompts} prompts came with {len(params)} sampling parameters")
    return params


def _completion(request: Request, events: list[Output]) -> Completion:
    texts = []
    for index in range(request.sampling.n):
        mine = [event for event in events if event.index == index]
        reason = mine[-1].finish_reason
        assert reason is not None
        texts.append(
            OutputText(
                text="".join(event.text for event in mine),
                token_ids=tuple(t for event in mine for t in event.token_ids),
                logprobs=tuple(p for event in mine for p in event.logprobs),
                finish_reason=reason,
            )
        )
    usage, timings = events[-1].usage, events[-1].timings
    assert usage is not None
    assert timings is not None
    return Completion(request.prompt, tuple(texts), events[0].prompt_logprobs, usage, timings)
