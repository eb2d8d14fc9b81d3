"""Candidates on top of their prompt's cache, against one unpadded sequence at a time without any cache."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MambaConfig

from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.models.forwards import Planning
from fedzo.models.loaded import LoadedModel
from fedzo.models.memory import cache_tokens
from fedzo.models.plan import FEW_FORWARDS, plan_batches, plan_shared
from fedzo.models.scoring import candidate_scores, example_losses
from fedzo.models.shared_prompts import check_cache, run_answers, run_prompts
from fedzo.testing.tiny_models import FAMILIES, tiny_loaded, tiny_model, tiny_model_from, tiny_tokens
from fedzo.trainers import TRAINERS
from fedzo.trainers.adapters import PrefixTrainerConfig, PromptTrainerConfig
from fedzo.trainers.artifacts import ArtifactStore
from fedzo.zo.config import Distribution
from fedzo.zo.directions import direction
from fedzo.zo.spaces.full import FullSpace

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # by PEFT, of transformers
TOLERANCE = 2e-5  # of a mean log-probability, float32
MANY = 1 << 20


def example(prompt: int, answers: tuple[int, ...], *, label: int = 0, start: int = 0) -> Example:
    return Example(
        tiny_tokens(start + 1, prompt), tuple(tiny_tokens(start + 7 + j, n) for j, n in enumerate(answers)), label
    )


UNEQUAL = [
    example(23, (3, 1, 5), label=2),
    example(9, (2, 4), start=11, label=1),
    example(41, (6, 1, 2), start=23),
    example(1, (3, 3), start=31),
]  # longer and shorter than the tiny Gemma's window of 16
EQUAL = [example(19, (2, 3), start=5), example(19, (4, 1), start=17, label=1), example(19, (2, 2, 2), start=3)]
VIRTUAL = [PrefixTrainerConfig(init_std=0.3), PromptTrainerConfig(init_std=0.3)]
SINGLE = Example(tiny_tokens(40, 12), ((7,), (250,)), 1)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny_loaded(request.param)


def slow_scores(model: Any, row: Example) -> list[float]:
    scores = []
    for candidate in row.candidates:
        with torch.no_grad():
            logits = model(torch.tensor([row.prompt + candidate]), use_cache=False).logits[0].double()
        at = len(row.prompt) - 1
        parts = [float(logits[at + i].log_softmax(-1)[token]) for i, token in enumerate(candidate)]
        scores.append(math.fsum(parts) / len(candidate))
    return scores


def assert_scores(scores: np.ndarray, model: Any, rows: list[Example], *, tolerance: float = TOLERANCE) -> None:
    for ours, row in zip(scores, rows, strict=True):
        count = len(row.candidates)
        assert ours[:count].tolist() == pytest.approx(slow_scores(model, row), abs=tolerance)
        assert np.all(np.isneginf(ours[count:]))


@pytest.mark.parametrize("rows", [UNEQUAL, EQUAL, [UNEQUAL[2]]], ids=["unequal", "equal", "one"])
def test_scores_equal_those_of_unpadded_sequences_without_a_cache(loaded: LoadedModel, rows: list[Example]) -> None:
    loaded.counter.num_tokens = loaded.counter.num_forwards = loaded.counter.num_head_rows = 0

    scores = candidate_scores(loaded, rows, tokens_per_batch=MANY, forward_cost_tokens=20)

    assert_scores(scores, loaded.model, rows)
    assert loaded.shared_prompts
    assert loaded.counter.num_tokens < sum(len(r.prompt) + len(c) - 1 for r in rows for c in r.candidates)
    assert loaded.counter.num_head_rows == sum(1 + sum(len(c) - 1 for c in r.candidates) for r in rows)


@pytest.mark.parametrize("rows", [UNEQUAL, EQUAL], ids=["unequal", "equal"])
def test_shared_in_one_batch_they_equal_those_sequences_too(loaded: LoadedModel, rows: list[Example]) -> None:
    """Whatever the planner would choose: all prompts padded to the longest, one forward of answers."""
    prompts = [row.prompt for row in rows]
    width = max(map(len, prompts))
    ids = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    cells = [(i, candidate) for i, row in enumerate(rows) for candidate in row.candidates]
    longest = max(len(candidate) for _, candidate in cells)
    answers = torch.tensor([candidate + (0,) * (longest - len(candidate)) for _, candidate in cells])

    with torch.inference_mode():
        ends, cache = run_prompts(loaded.model, ids, lengths)
        before = [layer.keys.clone() for layer in cache.layers]
        owners = torch.tensor([i for i, _ in cells])
        hidden = run_answers(loaded.model, cache, answers, owners=owners, lengths=lengths, width=width)

    assert [torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True)] == [True, True]
    for row, (i, candidate) in enumerate(cells):
        with torch.inference_mode():
            own = loaded.model.get_decoder()(input_ids=torch.tensor([prompts[i] + candidate])).last_hidden_state[0]
        assert torch.allclose(ends[i], own[len(prompts[i]) - 1], atol=TOLERANCE)
        assert torch.allclose(hidden[row, : len(candidate)], own[len(prompts[i]) :], atol=TOLERANCE)


def test_single_token_examples_and_long_ones_keep_their_places() -> None:
    loaded = tiny_loaded()
    rows = [UNEQUAL[0], SINGLE, UNEQUAL[1], SINGLE, UNEQUAL[2]]

    scores = candidate_scores(loaded, rows, tokens_per_batch=MANY, full_vocabulary=True, forward_cost_tokens=1)

    assert_scores(scores, loaded.model, rows)


@pytest.mark.parametrize("limit", [1, 30, 60, 150, MANY])
def test_scores_do_not_depend_on_the_limit_of_a_batch(limit: int) -> None:
    loaded = tiny_loaded("qwen3")

    scores = candidate_scores(loaded, UNEQUAL + EQUAL, tokens_per_batch=limit, forward_cost_tokens=8)

    assert_scores(scores, loaded.model, UNEQUAL + EQUAL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores_are_near_the_float32_ones(dtype: torch.dtype) -> None:
    coarse = tiny_loaded("llama", dtype=dtype)

    scores = candidate_scores(coarse, UNEQUAL, tokens_per_batch=MANY, forward_cost_tokens=1)

    assert coarse.shared_prompts
    assert_scores(scores, tiny_model("llama"), UNEQUAL, tolerance=0.05)


def test_losses_that_become_scalars_of_the_log_share_no_prompt() -> None:
    loaded = tiny_loaded()
    example_losses(loaded, UNEQUAL, Planning(MANY, 32), loss=Loss.candidates)
    apart = loaded.counter.num_tokens

    candidate_scores(loaded, UNEQUAL, tokens_per_batch=MANY, forward_cost_tokens=32)

    assert apart >= sum(len(row.prompt) + len(answer) - 1 for row in UNEQUAL for answer in row.candidates)
    assert 0 < loaded.counter.num_tokens - apart < apart / 2


def test_what_is_kept_of_prompts_is_freed_before_the_next_ones_run(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded()
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watched(*args: Any) -> tuple[torch.Tensor, Any]:
        alive.append(sum(keys() is not None for keys in kept))
        ends, cache = run_prompts(*args)
        kept.append(weakref.ref(cache.layers[0].keys))
        return ends, cache

    monkeypatch.setattr("fedzo.models.forwards.run_prompts", watched)
    gc.disable()  # a GPU's memory must not wait for it
    try:
        candidate_scores(loaded, [UNEQUAL[0]] * 3, tokens_per_batch=30, forward_cost_tokens=1)
    finally:
        gc.enable()

    assert alive == [0, 0, 0]


def test_a_full_space_probe_reaches_both_forwards() -> None:
    loaded = tiny_loaded("gemma2")
    twin = copy.deepcopy(loaded.model)
    z = torch.from_numpy(direction(3, sum(p.numel() for p in twin.parameters())))
    with torch.no_grad():
        for parameter, part in zip(twin.parameters(), z.split([p.numel() for p in twin.parameters()]), strict=True):
            parameter.add_(part.view(parameter.shape) * 0.03125)

    with FullSpace(loaded.model).probe(0.03125, 3):
        scores = candidate_scores(loaded, UNEQUAL, tokens_per_batch=MANY, forward_cost_tokens=1)

    assert loaded.counter.num_forwards > 1
    assert_scores(scores, twin, UNEQUAL)


@pytest.mark.parametrize("config", VIRTUAL, ids=["prefix", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_virtual_tokens_come_before_a_shared_prompt_once(family: str, config: Any, tmp_path: Path) -> None:
    loaded = tiny_loaded(family)
    artifact = ArtifactStore(tmp_path).put((7).to_bytes(8, "little"))
    TRAINERS.build(config).build(loaded, artifact, distribution=Distribution.gaussian)
    rows = EQUAL + UNEQUAL
    apart = candidate_scores(dataclasses.replace(loaded, shared_prompts=False), rows, tokens_per_batch=MANY)
    before = loaded.counter.num_tokens

    together = candidate_scores(loaded, rows, tokens_per_batch=MANY, forward_cost_tokens=1)

    assert loaded.counter.num_tokens - before < before
    assert together[np.isfinite(apart)].tolist() == pytest.approx(apart[np.isfinite(apart)].tolist(), abs=TOLERANCE)


def test_numbers_that_are_not_finite_are_returned() -> None:
    loaded = tiny_loaded()
    loaded.model.get_input_embeddings().weight.fill_(math.nan)

    scores = candidate_scores(loaded, UNEQUAL, tokens_per_batch=MANY, forward_cost_tokens=1)

    assert np.isnan(scores[:, 0]).all()


def test_every_candidate_is_reported() -> None:
    calls: list[tuple[int, int]] = []

    candidate_scores(
        tiny_loaded(), UNEQUAL, tokens_per_batch=60, forward_cost_tokens=1, on_batch=lambda *at: calls.append(at)
    )

    assert calls[-1] == (10, 10)
    assert len(calls) > 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Example((), ((1, 2), (3, 4)), 0), "prompt must have at least one token"),
        (Example((1,), ((), (3, 4)), 0), "candidate must have at least one token"),
    ],
)
def test_examples_that_cannot_be_scored_are_refused(row: Example, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        candidate_scores(tiny_loaded(), [row], tokens_per_batch=MANY, forward_cost_tokens=1)


def test_a_model_that_forgets_its_cache_is_found_out_and_scored_without_sharing() -> None:
    model = tiny_model("llama")
    decoder = model.get_decoder()
    forward = decoder.forward
    decoder.forward = lambda *args, past_key_values=None, **kwargs: forward(*args, **kwargs)

    assert check_cache(tiny_model("llama"))
    assert not check_cache(model)
    assert not check_cache(tiny_model_from(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)))

    loaded = dataclasses.replace(tiny_loaded(), shared_prompts=False)
    scores = candidate_scores(loaded, UNEQUAL, tokens_per_batch=MANY, forward_cost_tokens=0)
    assert_scores(scores, loaded.model, UNEQUAL)


def test_memory_of_a_cached_position_by_hand() -> None:
    # llama: 2 layers of 2 key heads of 8, twice; a token of a forward: 6 * 32 + 3 * 64
    assert cache_tokens(tiny_model("llama")) == 2 * 2 * 2 * 8 / 384
    assert cache_tokens(tiny_model("gpt2")) == 2 * 2 * 4 * 8 / (6 * 32 + 3 * 128)


def test_a_plan_by_hand() -> None:
    plan = plan_shared([10, 30], [[2, 4], [0, 3, 3]], tokens_per_batch=1000, forward_cost_tokens=0, cache_tokens=0.5)

    assert plan.batches == [[1], [0]]  # 30 + 2 * 3 and 10 + 2 * 4, against 30 + 2 * 33 and 12 + 14
    assert plan.others == []


def test_nothing_is_shared_where_two_forwards_cost_more_than_the_prompts() -> None:
    def shares(cost: int) -> bool:
        plan = plan_shared([10], [[2, 4]], tokens_per_batch=1000, forward_cost_tokens=cost, cache_tokens=0.5)
        assert plan.others == ([] if plan.batches else [0])
        return bool(plan.batches)

    # apart, in one batch: 2 * 14 + cost (in two: 12 + 14 + 2 cost); shared: 10 + 2 * 4 + 2 cost
    assert shares(9)
    assert not shares(10)
    assert not shares(FEW_FORWARDS)


def test_candidates_that_need_no_second_forward_cost_none() -> None:
    plan = plan_shared([10], [[0, 0]], tokens_per_batch=100, forward_cost_tokens=FEW_FORWARDS, cache_tokens=0.5)

    assert plan.batches == [[0]]


@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 9), min_size=1, max_size=5)), max_size=12),
    limit=st.integers(1, 300),
    cost=st.integers(0, 60),
    cache=st.floats(0, 3),
    padding=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_plans_hold_every_example_once_within_the_limit_and_never_cost_more(
    rows: list[tuple[int, list[int]]], limit: int, cost: int, cache: float, padding: bool
) -> None:
    prompts, answers = [p for p, _ in rows], [a for _, a in rows]

    plan = plan_shared(
        prompts, answers, tokens_per_batch=limit, forward_cost_tokens=cost, cache_tokens=cache, padding=padding
    )

    assert sorted([i for batch in plan.batches for i in batch] + plan.others) == list(range(len(rows)))
    total = 0
    for batch in plan.batches:
        widest = max(prompts[i] for i in batch)
        second = [length for i in batch for length in answers[i] if length]
        kept = cache * widest * len(batch)
        assert widest * len(batch) + kept <= limit
        assert len(second) * max(second, default=0) + kept <= limit
        assert padding or len({prompts[i] for i in batch}) == 1
        total += widest * len(batch) + len(second) * max(second, default=0) + cost * (2 if second else 1)
    taken = [prompts[i] + length for batch in plan.batches for i in batch for length in answers[i]]
    apart = plan_batches(taken, tokens_per_batch=limit, forward_cost_tokens=cost)
    assert total <= sum(len(batch) * max(taken[i] for i in batch) + cost for batch in apart)
