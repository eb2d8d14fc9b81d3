"""What scoring rows costs with fedzo and with plain transformers, in one run; writes claims.json beside this file.

    python experiments/forward/run.py

The same rows of Rotten Tomatoes, once with two candidates of one token, once with four of several tokens, on
SmolLM2-135M in float32. Plain: batches of 16 in the order of the rows, padded to the longest, every candidate with its
prompt a sequence, logits of all positions. Interleaved repeats; medians. Two variants say where the difference comes
from: fedzo without shared prompts, and padding-free packing as transformers offers it (rows laid end to end, positions
starting again, a block-diagonal mask).
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedzo.bench.claims import Claims
from fedzo.data.config import DataConfig, SplitConfig, TaskConfig
from fedzo.data.encode import Example, encode
from fedzo.data.sources import load_splits
from fedzo.models.config import ModelConfig
from fedzo.models.head import project
from fedzo.models.load import load_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.plan import forward_cost
from fedzo.models.scoring import candidate_scores

HERE = Path(__file__).parent
ROWS, BATCH, REPEATS = 48, 16, 3
TOLERANCE = 1e-4  # of a log-probability over the candidates
PACK = 512  # tokens of a packed row
TASKS = {
    "two candidates of one token": [" terrible", " great"],
    "four candidates of several tokens": [
        " a complete waste of time",
        " fine in parts but much too long",
        " well worth the price of a ticket",
        " one of the best of the year",
    ],
}


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    loaded = load_model(ModelConfig(), device="cpu")
    claims = Claims(command="python experiments/forward/run.py")
    for name, candidates in TASKS.items():
        measure_task(loaded, name, candidates, claims)
    claims.write(HERE / "claims.json")
    claims.show()


def measure_task(loaded: LoadedModel, name: str, candidates: list[str], claims: Claims) -> None:
    task = TaskConfig(
        name="rotten_tomatoes", template="Review: {text}\nSentiment: The movie was", candidates=candidates
    )
    splits = load_splits(DataConfig(), SplitConfig(num_test=ROWS, num_dev=0), task)
    examples = encode(splits.test, task, tokenizer=loaded.tokenizer, max_length=512)
    apart = dataclasses.replace(loaded, shared_prompts=False, counter=type(loaded.counter)())
    long = any(len(candidate) > 1 for candidate in examples[0].candidates)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "plain": lambda: plain_scores(loaded.model, examples),
        "fedzo": lambda: scores(loaded, examples),
        "variant": (lambda: scores(apart, examples)) if long else (lambda: packed_scores(loaded.model, examples)),
    }
    loaded.counter.num_tokens = loaded.counter.num_padding = 0
    found = {way: over_candidates(score()) for way, score in ways.items()}  # warms up, too
    run, padding = loaded.counter.num_tokens, loaded.counter.num_padding
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(REPEATS):
        for way, score in ways.items():
            begin = time.perf_counter()
            score()
            seconds[way].append(time.perf_counter() - begin)
    median = {way: statistics.median(times) for way, times in seconds.items()}
    text = sum(len(e.prompt) + len(c) for e in examples for c in e.candidates)
    plain = plain_tokens(examples)
    variant = "fedzo without shared prompts" if long else "fedzo's rows packed without padding"
    worst = max(float(np.abs(found[way] - found["plain"]).max()) for way in ways)
    add = claims.add
    add(f"{name}: plain transformers, {ROWS} rows", median["plain"], "s")
    add(f"{name}: fedzo, {ROWS} rows", median["fedzo"], "s")
    add(f"{name}: {variant}, {ROWS} rows", median["variant"], "s")
    add(f"{name}: plain / fedzo, time", median["plain"] / median["fedzo"], "ratio")
    add(f"{name}: plain, tokens of prompts with each candidate", text / median["plain"], "tokens/s")
    add(f"{name}: fedzo, the same tokens", text / median["fedzo"], "tokens/s")
    add(f"{name}: tokens run, plain / fedzo", plain / run, "ratio")
    add(f"{name}: padding in plain's tokens", 1 - text / plain, "share")
    add(f"{name}: padding in fedzo's tokens", padding / run, "share")
    add(f"{name}: largest difference of a log-probability over candidates", worst, "nat", at_most=TOLERANCE)


def scores(loaded: LoadedModel, examples: list[Example]) -> np.ndarray:
    cost = forward_cost(loaded.device)
    return candidate_scores(loaded, examples, tokens_per_batch=4096, forward_cost_tokens=cost)


def plain_batches(examples: list[Example]) -> list[list[tuple[int, int]]]:
    cells = [(i, j) for i, example in enumerate(examples) for j in range(len(example.candidates))]
    return [cells[at : at + BATCH] for at in range(0, len(cells), BATCH)]


def plain_tokens(examples: list[Example]) -> int:
    lengths = [
        [len(examples[i].prompt) + len(examples[i].candidates[j]) for i, j in b] for b in plain_batches(examples)
    ]
    return sum(max(batch) * len(batch) for batch in lengths)


def plain_scores(model: Any, examples: list[Example]) -> np.ndarray:
    out = np.empty((len(examples), len(examples[0].candidates)))
    for batch in plain_batches(examples):
        texts = [examples[i].prompt + examples[i].candidates[j] for i, j in batch]
        width = max(map(len, texts))
        ids = torch.tensor([text + (0,) * (width - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        with torch.inference_mode():
            logprobs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        for row, (i, j) in enumerate(batch):
            start, answer = len(examples[i].prompt) - 1, examples[i].candidates[j]
            out[i, j] = logprobs[row, range(start, start + len(answer)), answer].mean()
    return out


def packed_scores(model: Any, examples: list[Example]) -> np.ndarray:
    """Single-token candidates; prompts end to end in rows of at most ``PACK`` tokens."""
    out = np.empty((len(examples), len(examples[0].candidates)))
    vocabulary = torch.tensor([candidate[0] for candidate in examples[0].candidates])
    pack: list[int] = []
    for i in range(len(examples) + 1):
        if i == len(examples) or sum(len(examples[k].prompt) for k in [*pack, i]) > PACK:
            ids = torch.tensor([[token for k in pack for token in examples[k].prompt]])
            positions = torch.cat([torch.arange(len(examples[k].prompt)) for k in pack]).unsqueeze(0)
            ends = np.cumsum([len(examples[k].prompt) for k in pack]) - 1
            with torch.inference_mode():
                hidden = model.get_decoder()(input_ids=ids, position_ids=positions).last_hidden_state[0, ends]
                out[pack] = project(model, hidden, vocabulary=vocabulary).numpy()
            pack = []
        pack.append(i)
    return out


def over_candidates(found: np.ndarray) -> np.ndarray:
    """Log-probabilities over the candidates, on which all ways must agree."""
    return torch.from_numpy(found.astype(np.float64)).log_softmax(-1).numpy()


if __name__ == "__main__":
    main()
