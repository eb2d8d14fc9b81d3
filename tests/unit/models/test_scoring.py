"""Losses and scores against a slow twin: one unpadded sequence at a time, all logits, sums in plain Python."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import CohereConfig, FalconH1Config, GraniteConfig

from fedzo.data.config import Loss
from fedzo.data.encode import Example
from fedzo.errors import ConfigError
from fedzo.models import scoring
from fedzo.models.load import wrap_model
from fedzo.models.loaded import LoadedModel
from fedzo.models.plan import plan_batches
from fedzo.models.scoring import candidate_scores, mean_loss
from fedzo.testing.tiny_models import FAMILIES, byte_tokenizer, tiny_loaded, tiny_model_from, tiny_tokens
from fedzo.zo import perturb
from fedzo.zo.directions import direction
from fedzo.zo.spaces.full import FullSpace

MANY = 4096
LOSSES = [Loss.candidates, Loss.lm]
"""Those that a row has."""


LONG_ANSWERS = [
    Example(tiny_tokens(1, 5), (tiny_tokens(2, 3), tiny_tokens(3, 1), tiny_tokens(4, 2)), 2),
    Example(tiny_tokens(5, 23), (tiny_tokens(6, 2), tiny_tokens(7, 4)), 0),
    Example(tiny_tokens(8, 1), (tiny_tokens(9, 6), tiny_tokens(10, 1)), 1),
]
SHORT_ANSWERS = [
    Example(tiny_tokens(11, 9), ((7,), (250,)), 1),
    Example(tiny_tokens(12, 31), ((250,), (7,), (99,)), 0),
    Example(tiny_tokens(13, 2), ((1,), (2,)), 0),
]
MIXED = [LONG_ANSWERS[0], *SHORT_ANSWERS, *LONG_ANSWERS[1:]]


def slow_scores(model: Any, example: Example) -> list[float]:
    """Mean log-probability of each candidate's tokens, over the whole vocabulary."""
    scores = []
    for candidate in example.candidates:
        with torch.no_grad():
            logits = model(torch.tensor([example.prompt + candidate])).logits[0].double()
        total = 0.0
        for i, token in enumerate(candidate):
            row = logits[len(example.prompt) + i - 1]
            total += float(row[token]) - math.log(sum(math.exp(value) for value in row.tolist()))
        scores.append(total / len(candidate))
    return scores


def slow_loss(model: Any, examples: Sequence[Example], loss: Loss) -> float:
    total = 0.0
    for example in examples:
        scores = slow_scores(model, example)
        normaliser = math.log(sum(math.exp(score) for score in scores)) if loss is Loss.candidates else 0.0
        total += normaliser - scores[example.label]
    return total / len(examples)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny_loaded(request.param)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("examples", [LONG_ANSWERS, SHORT_ANSWERS, MIXED], ids=["long", "short", "mixed"])
def test_mean_loss_equals_the_slow_twin(loaded: LoadedModel, loss: Loss, examples: list[Example]) -> None:
    assert loaded.direct_head
    assert mean_loss(loaded, examples, loss=loss, tokens_per_batch=MANY) == pytest.approx(
        slow_loss(loaded.model, examples, loss), abs=1e-5
    )


def test_candidate_scores_over_the_vocabulary_equal_the_slow_twin(loaded: LoadedModel) -> None:
    scores = candidate_scores(loaded, MIXED, tokens_per_batch=MANY, full_vocabulary=True)

    assert scores.dtype == np.float32
    assert scores.shape == (6, 3)
    for row, example in zip(scores, MIXED, strict=True):
        assert row[: len(example.candidates)].tolist() == pytest.approx(slow_scores(loaded.model, example), abs=1e-5)
        assert np.all(np.isneginf(row[len(example.candidates) :]))


def test_logits_over_the_vocabulary_are_made_in_parts_and_never_put_together(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = candidate_scores(loaded, SHORT_ANSWERS, tokens_per_batch=MANY, full_vocabulary=True)
    made: list[int] = []
    put_together: list[int] = []
    project, cat = scoring.project, torch.cat

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = project(*args, **kwargs)
        made.append(len(logits))
        return logits

    def widths(tensors: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        made_one = cat(tensors, *args, **kwargs)
        put_together.append(made_one.shape[-1])
        return made_one

    monkeypatch.setattr(scoring, "project", counted)
    monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", widths)
        parts = candidate_scores(loaded, SHORT_ANSWERS, tokens_per_batch=MANY, full_vocabulary=True)

    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)
    assert made == [1] * len(SHORT_ANSWERS)
    assert max(put_together) < loaded.model.config.vocab_size


def test_single_token_scores_are_the_general_ones_up_to_a_constant_an_example(loaded: LoadedModel) -> None:
    fast = candidate_scores(loaded, SHORT_ANSWERS, tokens_per_batch=MANY)

    for row, example in zip(fast, SHORT_ANSWERS, strict=True):
        n = len(example.candidates)
        slow = np.array(slow_scores(loaded.model, example))
        assert (row[:n] - row[0]).tolist() == pytest.approx((slow - slow[0]).tolist(), abs=1e-5)
        assert np.exp(row[:n]).sum() == pytest.approx(1, abs=1e-5)


def test_lm_loss_equals_the_labels_loss_of_the_model_itself(loaded: LoadedModel) -> None:
    example = LONG_ANSWERS[1]
    answer = example.candidates[example.label]
    ids = torch.tensor([example.prompt + answer])
    labels = torch.tensor([(-100,) * len(example.prompt) + answer])
    with torch.no_grad():
        own = (
            float(loaded.model(input_ids=ids, labels=labels, output_router_logits=False).loss)
            if (loaded.model.config.model_type == "mixtral")
            else float(loaded.model(input_ids=ids, labels=labels).loss)
        )

    assert mean_loss(loaded, [example], loss=Loss.lm, tokens_per_batch=MANY) == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_batching_and_order_do_not_change_the_loss(loaded: LoadedModel, loss: Loss) -> None:
    whole = mean_loss(loaded, MIXED, loss=loss, tokens_per_batch=MANY)

    one_by_one = mean_loss(loaded, MIXED, loss=loss, tokens_per_batch=1)
    reversed_ = mean_loss(loaded, MIXED[::-1], loss=loss, tokens_per_batch=40)
    split = mean_loss(loaded, MIXED, loss=loss, tokens_per_batch=MANY, forward_cost_tokens=0)

    assert [one_by_one, reversed_, split] == pytest.approx([whole] * 3, abs=1e-5)


def test_scores_keep_the_order_of_the_examples() -> None:
    loaded = tiny_loaded()
    alone = [candidate_scores(loaded, [example], tokens_per_batch=MANY)[0] for example in MIXED]

    together = candidate_scores(loaded, MIXED, tokens_per_batch=50)

    for row, one in zip(together, alone, strict=True):
        assert row[: len(one)].tolist() == pytest.approx(one.tolist(), abs=1e-5)


class HeadRows(TorchFunctionMode):
    """Counts the rows that reach the head's weight and the rows of the weight that are used."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.hidden, self.vocabulary = weight, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[1] is self.weight:
            self.hidden += args[0].numel() // args[0].shape[-1]
        if func is torch.Tensor.__getitem__ and args[0] is self.weight:
            self.vocabulary += len(args[1])
        return func(*args, **(kwargs or {}))


def test_only_answer_positions_pay_for_the_head() -> None:
    loaded = tiny_loaded("qwen3")
    counting = HeadRows(loaded.model.get_output_embeddings().weight)

    with counting:
        mean_loss(loaded, LONG_ANSWERS, loss=Loss.lm, tokens_per_batch=MANY)

    assert counting.hidden == sum(len(example.candidates[example.label]) for example in LONG_ANSWERS)
    assert counting.vocabulary == 0
    assert loaded.counter.num_head_rows == counting.hidden


def test_single_token_candidates_cost_one_forward_of_the_prompts_and_their_own_rows_of_the_head() -> None:
    loaded = tiny_loaded("qwen3")
    counting = HeadRows(loaded.model.get_output_embeddings().weight)

    with counting:
        mean_loss(loaded, SHORT_ANSWERS, loss=Loss.candidates, tokens_per_batch=MANY)

    assert (counting.hidden, counting.vocabulary) == (0, len({7, 250, 99, 1, 2}))
    assert (loaded.counter.num_forwards, loaded.counter.num_tokens) == (1, 3 * 31)
    assert loaded.counter.num_padding == 3 * 31 - (9 + 31 + 2)


def test_the_head_is_applied_in_pieces_that_give_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded()
    whole = mean_loss(loaded, LONG_ANSWERS, loss=Loss.candidates, tokens_per_batch=MANY)

    monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 2 * 259)

    assert mean_loss(loaded, LONG_ANSWERS, loss=Loss.candidates, tokens_per_batch=MANY) == pytest.approx(
        whole, abs=1e-6
    )


def test_a_model_whose_head_is_not_apart_gives_the_same_loss_through_its_own_logits() -> None:
    loaded = tiny_loaded("gemma2")
    slow = dataclasses.replace(loaded, direct_head=False)

    for loss in LOSSES:
        assert mean_loss(slow, MIXED, loss=loss, tokens_per_batch=MANY) == pytest.approx(
            mean_loss(loaded, MIXED, loss=loss, tokens_per_batch=MANY), abs=1e-5
        )


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(logit_scale=0.25, vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0),
        GraniteConfig(logits_scaling=4.0, vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                      num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2),
        FalconH1Config(lm_head_multiplier=0.25, vocab_size=300, hidden_size=32, intermediate_size=32,
                       num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.1,
                       mamba_d_ssm=64, mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=16),
    ],
    ids=["cohere", "granite", "falcon h1"],
)  # fmt: skip
def test_families_that_scale_their_logits_equal_the_slow_twin(config: Any) -> None:
    loaded = wrap_model(tiny_model_from(config), byte_tokenizer())

    assert loaded.direct_head
    for loss in LOSSES:
        assert mean_loss(loaded, MIXED, loss=loss, tokens_per_batch=MANY) == pytest.approx(
            slow_loss(loaded.model, MIXED, loss), abs=1e-5
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_full_space_probe_gives_the_loss_of_a_perturbed_copy(loaded: LoadedModel, loss: Loss) -> None:
    twin = copy.deepcopy(loaded.model)
    parameters = list(twin.parameters())
    z = torch.from_numpy(direction(3, sum(p.numel() for p in parameters)))
    with torch.no_grad():
        for parameter, part in zip(parameters, z.split([p.numel() for p in parameters]), strict=True):
            parameter.add_(part.view(parameter.shape) * 0.03125)

    with FullSpace(loaded.model).probe(0.03125, 3):
        probed = mean_loss(loaded, MIXED, loss=loss, tokens_per_batch=MANY)

    assert probed == pytest.approx(slow_loss(twin, MIXED, loss), abs=1e-5)
    assert abs(probed - mean_loss(loaded, MIXED, loss=loss, tokens_per_batch=MANY)) > 1e-4


def test_a_probe_makes_the_head_once_for_all_parts_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded("qwen3")
    head = loaded.model.get_output_embeddings().weight.data_ptr()
    made: list[int] = []
    original = perturb.add_direction

    def counted(base: torch.Tensor, *args: Any, **how: Any) -> torch.Tensor:
        made.append(base.data_ptr())
        return original(base, *args, **how)

    monkeypatch.setattr(perturb, "add_direction", counted)
    monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 1)

    with FullSpace(loaded.model).probe(0.03125, 3):
        mean_loss(loaded, LONG_ANSWERS, loss=Loss.lm, tokens_per_batch=MANY)

    assert made.count(head) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_losses_are_near_the_float32_ones(dtype: torch.dtype) -> None:
    exact = tiny_loaded("llama")
    coarse = tiny_loaded("llama", dtype=dtype)

    for loss in LOSSES:
        assert mean_loss(coarse, MIXED, loss=loss, tokens_per_batch=MANY) == pytest.approx(
            mean_loss(exact, MIXED, loss=loss, tokens_per_batch=MANY), abs=0.05
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("examples", [LONG_ANSWERS, SHORT_ANSWERS], ids=["long", "short"])
def test_numbers_that_are_not_finite_are_returned(loss: Loss, examples: list[Example]) -> None:
    loaded = tiny_loaded()
    loaded.model.get_input_embeddings().weight.fill_(math.nan)

    assert math.isnan(mean_loss(loaded, examples, loss=loss, tokens_per_batch=MANY))


def test_no_row_has_the_value_of_an_evaluator_as_its_loss() -> None:
    with pytest.raises(ConfigError, match=r"the loss of rows must be candidates or lm, got score, .* Pass Loss\.lm\."):
        mean_loss(tiny_loaded(), MIXED, loss=Loss.score, tokens_per_batch=MANY)


def test_global_generators_are_untouched() -> None:
    loaded = tiny_loaded()
    before = torch.random.get_rng_state()

    mean_loss(loaded, MIXED, loss=Loss.candidates, tokens_per_batch=MANY)

    assert torch.equal(before, torch.random.get_rng_state())


def test_every_forward_is_reported() -> None:
    calls: list[tuple[int, int]] = []

    candidate_scores(tiny_loaded(), SHORT_ANSWERS, tokens_per_batch=1, on_batch=lambda *at: calls.append(at))

    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "at least one example, got none"),
        ([Example((), ((1,),), 0)], "prompt must have at least one token"),
        ([Example((1,), ((),), 0)], "candidate must have at least one token"),
    ],
)
def test_examples_that_cannot_be_scored_are_refused(examples: list[Example], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mean_loss(tiny_loaded(), examples, loss=Loss.lm, tokens_per_batch=8)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_batches_hold_every_sequence_once_within_the_limit(lengths: list[int], limit: int, cost: int) -> None:
    batches = plan_batches(lengths, tokens_per_batch=limit, forward_cost_tokens=cost)

    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= limit


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(20, 90), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_batches_are_the_cheapest_cut_of_the_sorted_lengths(lengths: list[int], limit: int, cost: int) -> None:
    down = sorted(lengths, reverse=True)
    best = min(
        total for cuts in range(1 << (len(down) - 1)) if (total := cut_cost(down, cuts, limit, cost)) is not None
    )

    batches = plan_batches(lengths, tokens_per_batch=limit, forward_cost_tokens=cost)

    assert sum(len(batch) * max(lengths[i] for i in batch) + cost for batch in batches) == best


def cut_cost(down: list[int], cuts: int, limit: int, cost: int) -> int | None:
    parts: list[list[int]] = [[down[0]]]
    for i, length in enumerate(down[1:]):
        if cuts >> i & 1:
            parts.append([length])
        else:
            parts[-1].append(length)
    if any(len(part) > 1 and len(part) * part[0] > limit for part in parts):
        return None
    return sum(len(part) * part[0] + cost for part in parts)
