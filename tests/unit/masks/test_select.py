"""Selecting a mask, against hand-computed gradients, a slow twin, and Python's sort."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from fedzo.errors import ConfigError, NumericsError
from fedzo.masks import Granularity, Selector, eligible_parameters, ranking, select, select_mask
from fedzo.masks.sensitivity import next_token_loss
from fedzo.testing.tiny_models import tiny_model
from fedzo.zo.directions import philox, stream_key


def random_windows(num: int, *, length: int = 12, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator) for _ in range(num)]


def ranked(scores: dict[str, list[float]], k: int) -> dict[str, list[int]]:
    """The k largest by Python's sort: of equal scores the earlier tensor's, then the lower index."""
    names = list(scores)
    order = sorted((-s, names.index(name), i) for name in names for i, s in enumerate(scores[name]))[:k]
    return {name: sorted(i for _, j, i in order if names[j] == name) for name in names}


def expected_choice(scores: dict[str, list[float]], density: float, granularity: Granularity) -> dict[str, list[int]]:
    if granularity is Granularity.everywhere:
        chosen = ranked(scores, int(sum(map(len, scores.values())) * density))
    else:
        chosen = {name: ranked({name: s}, int(len(s) * density))[name] for name, s in scores.items()}
    return {name: flat for name, flat in chosen.items() if flat}


def as_lists(indices: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: flat.tolist() for name, flat in indices.items()}


def twin_gradients(model: Any, windows: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """One dense gradient a window, by ``autograd.grad``."""
    weights = eligible_parameters(model)
    model.requires_grad_(True)
    gradients = []
    for window in windows:
        logits = model(input_ids=window.unsqueeze(0)).logits[0].float()
        loss = torch.stack([F.cross_entropy(logits[t], window[t + 1]) for t in range(len(window) - 1)]).mean()
        found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        gradients.append({name: g.detach().double().flatten() for name, g in zip(weights, found, strict=True)})
    model.requires_grad_(False)
    return gradients


class Pencil(nn.Module):
    """loss_fn(window) = sum of weight * (window - 10), so the gradient of weight is window - 10."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, 1, bias=False)

    @staticmethod
    def loss(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        return (model.proj.weight.flatten() * (input_ids[0] - 10).float()).sum()


class Bag(nn.Module):
    """Weights given as tensors, named a.weight, b.weight, ..."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in zip("abcdef", tensors, strict=False):
            holder = nn.Module()
            holder.weight = nn.Parameter(tensor)
            self.add_module(name, holder)


# --- sensitivity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_sensitivity_equals_a_dense_twin(family: str, granularity: Granularity) -> None:
    windows = random_windows(3)
    gradients = twin_gradients(tiny_model(family), windows)
    squares = {name: sum(g[name] ** 2 for g in gradients).tolist() for name in gradients[0]}

    mask = select_mask(tiny_model(family), density=0.02, granularity=granularity, windows=windows)

    assert as_lists(mask.indices) == expected_choice(squares, 0.02, granularity)
    assert mask.gradient is not None
    for name, flat in mask.indices.items():
        mean = sum(g[name][flat] for g in gradients) / 3
        assert mask.gradient[name].dtype == torch.float32
        torch.testing.assert_close(mask.gradient[name].double(), mean, rtol=1e-4, atol=1e-8)


def test_the_score_is_the_sum_of_squares_and_not_the_square_of_the_sum() -> None:
    # gradients of the two windows: (+3, -3) for weight 0 and (+1, +1) for weight 1
    windows = [torch.tensor([13, 11]), torch.tensor([7, 11])]

    mask = select_mask(Pencil(2), density=0.5, windows=windows, loss_fn=Pencil.loss)

    assert as_lists(mask.indices) == {"proj.weight": [0]}  # 18 > 2, while (sum g)**2 would give 0 < 4
    assert mask.gradient is not None
    assert mask.gradient["proj.weight"].tolist() == [0.0]


def test_the_kept_gradient_is_the_signed_mean() -> None:
    windows = [torch.tensor([4, 11, 10]), torch.tensor([6, 13, 10]), torch.tensor([5, 18, 10])]

    mask = select_mask(Pencil(3), density=0.7, windows=windows, loss_fn=Pencil.loss)

    assert as_lists(mask.indices) == {"proj.weight": [0, 1]}
    assert mask.gradient is not None
    assert mask.gradient["proj.weight"].tolist() == [-5.0, 4.0]


def test_a_bfloat16_model_accumulates_in_float32() -> None:
    # 256 gradients of 1 and one of 16: in bfloat16 the sum of squares sticks at 256
    windows = [torch.tensor([11, 10])] * 300 + [torch.tensor([10, 26])]
    model = Pencil(2).to(torch.bfloat16)

    mask = select_mask(model, density=0.5, windows=windows, loss_fn=Pencil.loss)

    assert as_lists(mask.indices) == {"proj.weight": [0]}  # 300 > 256
    assert mask.gradient is not None
    assert mask.gradient["proj.weight"].item() == pytest.approx(300 / 301, rel=1e-6)


def test_the_model_is_left_as_it_was_found() -> None:
    model = tiny_model("gpt2")
    model.train()
    model.transformer.h[0].eval()
    parameters = list(model.parameters())
    parameters[3].requires_grad_(True)
    parameters[4].requires_grad_(True)
    parameters[4].grad = torch.ones_like(parameters[4])
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in parameters]
    gradients = [p.grad for p in parameters]
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()

    select_mask(model, density=0.01, windows=random_windows(2))

    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in parameters] == flags
    assert all(p.grad is before for p, before in zip(parameters, gradients, strict=True))
    assert torch.equal(gradients[4], torch.ones_like(parameters[4]))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(p._post_accumulate_grad_hooks for p in parameters)


def test_the_model_is_restored_when_a_loss_fails() -> None:
    model = tiny_model()
    model.train()
    losses = iter([1.0, math.nan])

    def loss_fn(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        return next_token_loss(model, input_ids) * next(losses)

    with pytest.raises(NumericsError, match=r"^calibration window 1: its loss must be finite, got nan"):
        select_mask(model, density=0.01, windows=random_windows(2), loss_fn=loss_fn)

    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_dropout_is_off_even_in_a_model_in_training_mode() -> None:
    windows = random_windows(2)

    trained = select_mask(tiny_model("gpt2").train(), density=0.02, windows=windows)

    assert trained.digest() == select_mask(tiny_model("gpt2").eval(), density=0.02, windows=windows).digest()


def test_it_works_where_gradients_are_switched_off() -> None:
    windows = random_windows(1)
    expected = select_mask(tiny_model(), density=0.02, windows=windows)
    model = tiny_model()

    with torch.inference_mode():
        mask = select_mask(model, density=0.02, windows=windows)

    assert mask.digest() == expected.digest()


def test_progress_is_told_window_by_window() -> None:
    seen: list[tuple[int, int]] = []

    select_mask(tiny_model(), density=0.02, windows=random_windows(3), on_window=lambda *done: seen.append(done))

    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_gradient_that_is_not_finite_names_its_tensor() -> None:
    model = Bag(torch.ones(2, 2), torch.zeros(2, 2))

    def loss_fn(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        return model.a.weight.sum() + model.b.weight.sqrt().sum()  # slope of sqrt at 0

    with pytest.raises(NumericsError, match=r"every score of 'b\.weight' must be finite, got 4 of 4 that"):
        select_mask(model, density=0.5, windows=random_windows(1), loss_fn=loss_fn)


def test_weights_without_a_gradient_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    windows = [torch.tensor([10, 10, 12, 10])]

    with caplog.at_level(logging.WARNING):
        mask = select_mask(Pencil(4), density=0.5, windows=windows, loss_fn=Pencil.loss)

    assert as_lists(mask.indices) == {"proj.weight": [0, 2]}
    assert "1 of the 2 weights chosen in proj.weight have no gradient" in caplog.text


# --- magnitude --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.001, 0.05, 0.6, 1.0])
def test_no_unchosen_weight_is_larger_than_a_chosen_one(density: float, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)

    mask = select_mask(model, density=density, selector=Selector.magnitude)

    assert mask.size > 0
    assert mask.gradient is None
    for name, flat in mask.indices.items():
        sizes = eligible_parameters(model)[name].detach().flatten().abs()
        unchosen = torch.ones(sizes.numel(), dtype=torch.bool)
        unchosen[flat] = False
        assert flat.numel() == int(sizes.numel() * density)
        assert not unchosen.any() or sizes[flat].min() >= sizes[unchosen].max()


def test_everywhere_takes_the_largest_of_the_whole_model() -> None:
    model = tiny_model("opt")
    sizes = {name: p.detach().abs().flatten().tolist() for name, p in eligible_parameters(model).items()}

    mask = select_mask(model, density=0.01, selector=Selector.magnitude, granularity=Granularity.everywhere)

    assert as_lists(mask.indices) == expected_choice(sizes, 0.01, Granularity.everywhere)
    assert mask.size == int(sum(map(len, sizes.values())) * 0.01)


def test_a_weight_that_is_not_finite_names_its_tensor() -> None:
    model = Bag(torch.ones(2, 2), torch.tensor([[1.0, math.nan]]))

    with pytest.raises(NumericsError, match=r"every score of 'b\.weight' must be finite, got 1 of 2 that"):
        select_mask(model, density=0.5, selector=Selector.magnitude)


# --- ties -------------------------------------------------------------------------------------------------------------


def test_equal_scores_are_taken_from_the_lowest_index_on() -> None:
    model = Bag(torch.ones(40, 50), -torch.ones(30, 10))

    per_tensor = select_mask(model, density=0.1, selector=Selector.magnitude)
    everywhere = select_mask(model, density=0.1, selector=Selector.magnitude, granularity=Granularity.everywhere)

    assert as_lists(per_tensor.indices) == {"a.weight": list(range(200)), "b.weight": list(range(30))}
    assert as_lists(everywhere.indices) == {"a.weight": list(range(230))}


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 24])
@pytest.mark.parametrize("granularity", Granularity)
def test_many_ties_are_ranked_as_by_a_stable_sort(
    granularity: Granularity, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randint(-4, 5, shape, generator=generator).float() for shape in [(7, 11), (5, 40), (3, 3)]]
    sizes = {f"{name}.weight": t.abs().flatten().tolist() for name, t in zip("abc", tensors, strict=True)}
    monkeypatch.setattr(ranking, "_CHUNK", chunk)

    for density in (0.02, 0.3, 0.9, 1.0):
        mask = select_mask(Bag(*tensors), density=density, selector=Selector.magnitude, granularity=granularity)

        assert as_lists(mask.indices) == expected_choice(sizes, density, granularity)


# --- random -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", Granularity)
def test_random_takes_the_smallest_words_of_each_tensors_stream(granularity: Granularity) -> None:
    model = Bag(torch.zeros(9, 10), torch.zeros(7, 7))
    seed = 0x1_2345_6789

    def words(number: int, numel: int) -> list[int]:
        key = stream_key(seed, round=number)
        blocks = [philox((b, 0, 5, 0), (key & 0xFFFFFFFF, key >> 32)) for b in range(numel)]
        flat = [word for block in blocks for word in block]
        return [flat[2 * i] + 2**32 * flat[2 * i + 1] for i in range(numel)]

    scores = {"a.weight": [-w for w in words(0, 90)], "b.weight": [-w for w in words(1, 49)]}

    mask = select_mask(model, density=0.25, selector=Selector.random, granularity=granularity, seed=seed)

    assert as_lists(mask.indices) == expected_choice(scores, 0.25, granularity)  # type: ignore[arg-type]


# --- counts and settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "num_eligible", "n"),
    [
        (
            LlamaConfig(
                vocab_size=128256,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
                tie_word_embeddings=True,
            ),
            973_078_528,
            973_040,
        ),
        (
            Qwen2Config(
                vocab_size=151936,
                hidden_size=1536,
                intermediate_size=8960,
                num_hidden_layers=28,
                num_attention_heads=12,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            ),
            1_310_195_712,
            1_310_120,
        ),
        (
            Gemma2Config(
                vocab_size=256000,
                hidden_size=2304,
                intermediate_size=9216,
                num_hidden_layers=26,
                num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=256,
            ),
            2_024_275_968,
            2_024_178,
        ),
    ],
    ids=["llama-3.2-1b", "qwen2-1.5b", "gemma-2-2b"],
)
def test_counts_of_the_papers_models(config: PreTrainedConfig, num_eligible: int, n: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    sizes = [p.numel() for p in eligible_parameters(model).values()]

    assert sum(sizes) == num_eligible
    assert sum(select._counts(sizes, 1e-3)) == n
    assert select._counts([num_eligible], 1e-3) == [int(num_eligible * 1e-3)]


@pytest.mark.parametrize("selector", [Selector.magnitude, Selector.random])
def test_each_tensor_gives_its_whole_number_of_weights(selector: Selector) -> None:
    model = Bag(torch.rand(30, 33), torch.rand(5, 40), torch.rand(3, 3))

    mask = select_mask(model, density=0.01, selector=selector)

    assert {name: flat.numel() for name, flat in mask.indices.items()} == {"a.weight": 9, "b.weight": 2}
    assert mask.size == 11


def test_the_manifest_says_how_the_mask_was_made() -> None:
    mask = select_mask(tiny_model(), density=0.02, windows=random_windows(2, length=9), base_digest="abc")

    assert mask.manifest["selector"] == "sensitivity"
    assert mask.manifest["granularity"] == "per_tensor"
    assert float(mask.manifest["density"]) == 0.02
    assert (mask.manifest["calibration_docs"], mask.manifest["calibration_tokens"]) == ("2", "18")
    assert len(mask.manifest["calibration_sha256"]) == 64
    assert mask.manifest["base_digest"] == "abc"
    assert mask.manifest["num_coordinates"] == str(mask.size)


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, math.nan, math.inf])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.density must be > 0 and <= 1, got"):
        select_mask(tiny_model(), density=density, selector=Selector.magnitude)


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("numel", [49, 2048, 3333])
def test_an_empty_mask_is_refused_with_the_smallest_density_that_is_not(numel: int, granularity: Granularity) -> None:
    model = Bag(torch.rand(1, numel), torch.rand(1, 7))

    with pytest.raises(ConfigError, match="must keep one weight or more") as caught:
        select_mask(model, density=1e-5, selector=Selector.magnitude, granularity=granularity)

    enough = float(str(caught.value).split("Set it to ")[1].split(" or more")[0])
    assert select_mask(model, density=enough, selector=Selector.magnitude, granularity=granularity).size == 1
    assert enough * (numel + (7 if granularity is Granularity.everywhere else 0)) < 1.01


def test_sensitivity_without_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs calibration windows, got none"):
        select_mask(tiny_model(), density=0.1)


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("selector", Selector)
def test_a_word_is_as_good_as_its_name(selector: Selector, granularity: Granularity) -> None:
    how: dict[str, Any] = {"density": 0.1, "windows": random_windows(1), "seed": 5}

    named = select_mask(tiny_model(), selector=selector, granularity=granularity, **how)
    worded = select_mask(tiny_model(), selector=str(selector), granularity=str(granularity), **how)  # type: ignore[arg-type]

    assert (worded.digest(), worded.manifest) == (named.digest(), named.manifest)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", Granularity)
def test_cuda_draws_the_cpus_random_mask(granularity: Granularity) -> None:
    settings: dict[str, Any] = {
        "density": 0.03,
        "selector": Selector.random,
        "granularity": granularity,
        "seed": 2**63 + 1,
    }

    here = select_mask(tiny_model(), **settings)
    there = select_mask(tiny_model().cuda(), **settings)

    assert here.digest() == there.digest()


def test_windows_batched_together_would_give_another_mask() -> None:
    windows = random_windows(6)
    gradients = twin_gradients(tiny_model(), windows)
    square_of_sum = {name: (sum(g[name] for g in gradients) ** 2).tolist() for name in gradients[0]}

    mask = select_mask(tiny_model(), density=0.02, windows=windows)

    assert as_lists(mask.indices) != expected_choice(square_of_sum, 0.02, Granularity.per_tensor)


def test_random_is_a_function_of_the_seed() -> None:
    digests = [select_mask(tiny_model(), density=0.01, selector=Selector.random, seed=s).digest() for s in (0, 1, 0)]

    assert digests[0] == digests[2] != digests[1]


def test_random_is_uniform() -> None:
    model = Bag(torch.zeros(256, 256))
    num_bins = 16

    chosen = np.concatenate(
        [
            select_mask(model, density=0.05, selector=Selector.random, seed=s).indices["a.weight"].numpy()
            for s in range(20)
        ]
    )

    counts = np.bincount(chosen * num_bins // 65536, minlength=num_bins)
    expected = chosen.size / num_bins
    standard_error = math.sqrt(expected * (1 - 1 / num_bins) * (1 - 0.05))  # without replacement
    assert np.abs(counts - expected).max() < 5 * standard_error
    assert counts.std() > standard_error / 4  # and not a grid
