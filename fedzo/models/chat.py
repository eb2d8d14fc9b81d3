"""A chat model in a local folder answers, through its own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import LogitsProcessor

from fedzo.data.chat import apply_chat_template, chat_end
from fedzo.data.preprocess.backend import Completion, EndpointError, Request, RowFault, RowReason
from fedzo.errors import ConfigError, printable
from fedzo.models.checks import num_positions
from fedzo.models.config import DType, ModelConfig, TransformersConfig
from fedzo.models.generate import end_tokens, generate_tokens
from fedzo.models.load import load_model
from fedzo.models.loaded import LoadedModel
from fedzo.system import is_out_of_memory
from fedzo.zo.directions import PURPOSE_SAMPLING, philox_words, stream_key


class LocalChat:
    """The backend of ``transformers``; a model is loaded when it is first asked for.

    A sampled answer is the highest of the logits plus noise of its request's own seed (the Gumbel-max trick), so it
    does not depend on the requests beside it, but for the last bits of its logits.
    """

    concurrency = 1

    def __init__(self, config: TransformersConfig) -> None:
        self.batch_size = config.batch_size
        self._config = config
        self._models: dict[str, LoadedModel] = {}

    def fingerprint(self, model: str) -> str:
        loaded = self._loaded(model)
        return f"{loaded.base_digest} {loaded.architecture_digest} {loaded.tokenizer_digest} {self._config.dtype}"

    def count_tokens(self, request: Request) -> int:
        """Exactly as many as the model gets."""
        return len(self._prompt(request))

    def room(self, model: str) -> int:
        """As the site's file allows, and as many positions as the model has."""
        longest = num_positions(self._loaded(model).model)
        return self._config.context_tokens if longest is None else min(longest, self._config.context_tokens)

    def complete(self, requests: Sequence[Request]) -> list[Completion | RowFault]:
        results: list[Completion | RowFault | None] = [None] * len(requests)
        alike: dict[tuple[str, int], dict[int, list[int]]] = {}
        for place, request in enumerate(requests):
            prompt = self._prompt(request)
            room = self.room(request.model)
            if len(prompt) + request.max_tokens > room:
                said = (
                    f"the prompt has {len(prompt)} tokens, and with {request.max_tokens} of an answer must have {room}"
                )
                results[place] = RowFault(RowReason.refused, said)
            else:
                alike.setdefault((request.model, request.max_tokens), {})[place] = prompt
        for (model, max_tokens), prompts in alike.items():
            answers = self._answers(model, max_tokens, list(prompts.values()), [requests[place] for place in prompts])
            for place, answer in zip(prompts, answers, strict=True):
                results[place] = answer
        return [result for result in results if result is not None]

    def close(self) -> None:
        self._models.clear()

    def _answers(
        self, model: str, max_tokens: int, prompts: list[list[int]], requests: list[Request]
    ) -> list[Completion]:
        loaded, noise = self._loaded(model), _Noise(requests)
        ends = end_tokens(loaded) | chat_end(loaded.tokenizer)
        try:
            rows = generate_tokens(
                loaded,
                prompts,
                ends=ends,
                max_new_tokens=max_tokens,
                tokens_per_batch=self.batch_size * self.room(model),
                before=noise.begin,
                change=noise,
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise EndpointError(
                f"rewriter.model {model!r}: the memory does not hold {len(prompts)} prompts at once. Lower "
                "rewriter.batch_size; what is done is kept."
            ) from error
        completions = []
        for prompt, row in zip(prompts, rows, strict=True):
            size = next((place for place, token in enumerate(row) if token in ends), None)
            completions.append(
                Completion(
                    text=loaded.tokenizer.decode(row[:size], skip_special_tokens=True),
                    truncated=size is None,
                    model=f"{Path(model).name} {loaded.base_digest[:12]}",
                    prompt_tokens=len(prompt),
                    completion_tokens=len(row) if size is None else size + 1,
                )
            )
        return completions

    def _prompt(self, request: Request) -> list[int]:
        loaded = self._loaded(request.model)
        chat = [{"role": message.role, "content": message.content} for message in request.messages]
        try:
            ids = apply_chat_template(loaded.tokenizer, chat, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise EndpointError(
                f"rewriter.model {request.model!r}: its chat template must take the roles "
                f"{', '.join(message.role for message in request.messages)}, but says: {printable(str(error))}. Take "
                "another model."
            ) from error
        return list(ids)

    def _loaded(self, model: str) -> LoadedModel:
        if model not in self._models:
            try:
                config = ModelConfig(name=model, dtype=DType(self._config.dtype))
                loaded = load_model(config, device=self._config.device)
            except ConfigError as error:
                raise ConfigError(f"rewriter.model {model!r}: {error}") from error
            if not loaded.tokenizer.chat_template:
                raise ConfigError(
                    f"rewriter.model {model!r} must be a chat model, but its tokenizer has no chat template. "
                    "Take the variant that follows instructions (often named Instruct, Chat or it)."
                )
            self._models[model] = loaded
        return self._models[model]


class _Noise(LogitsProcessor):
    """Adds to each row's logits what makes their highest a draw at its request's temperature; at 0 nothing."""

    def __init__(self, requests: list[Request]) -> None:
        self._requests = requests
        self._batch: list[int] = []
        self._position = 0

    def begin(self, batch: list[int]) -> None:
        """The next logits are the first of these requests' answers."""
        self._batch, self._position = batch, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, number in enumerate(self._batch):
            request = self._requests[number]
            if request.temperature > 0:
                key = stream_key(request.seed % 2**64, round=self._position)
                words = philox_words(key, purpose=PURPOSE_SAMPLING, num_words=scores.shape[1])
                noise = -np.log(-np.log((words + 0.5) / 2**32))
                scores[row] += request.temperature * torch.from_numpy(noise).to(scores)
        self._position += 1
        return scores
