"""Spaces against a dense twin: a copy of the model whose every weight is moved by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedzo.errors import ConfigError
from fedzo.testing.tiny_models import FAMILIES, tiny_model
from fedzo.zo.directions import direction
from fedzo.zo.spaces import masked
from fedzo.zo.spaces.base import Space
from fedzo.zo.spaces.full import FullSpace
from fedzo.zo.spaces.masked import MaskedSpace

IDS = torch.arange(24).reshape(2, 12) * 7 % 256
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIXTEENTH = 0.0625


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone().view(torch.uint8) for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = bits(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def some_indices(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: torch.arange(3, parameter.numel(), 17)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and "embed" not in name and "wte" not in name
    }


def moved_by_hand(model: nn.Module, *, scale: float, key: int) -> nn.Module:
    """theta + scale z for all weights, one whole vector z, plain torch."""
    twin = copy.deepcopy(model)
    parameters = list(twin.parameters())
    z = torch.from_numpy(direction(key, sum(p.numel() for p in parameters)))
    with torch.no_grad():
        for parameter, part in zip(parameters, z.split([p.numel() for p in parameters]), strict=True):
            moved = parameter.float() + part.view(parameter.shape) * torch.tensor(scale, dtype=torch.float32)
            parameter.copy_(moved.to(parameter.dtype))
    return twin


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_probe_computes_what_a_perturbed_copy_computes(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    before = bits(model)
    space = FullSpace(model)

    with space.probe(SIXTEENTH, key=5):
        plus = logits(model)
    with space.probe(-SIXTEENTH, key=5):
        minus = logits(model)

    assert torch.equal(plus, logits(moved_by_hand(model, scale=SIXTEENTH, key=5)))
    assert torch.equal(minus, logits(moved_by_hand(model, scale=-SIXTEENTH, key=5)))
    assert not torch.equal(plus, logits(model))
    assert_same_bits(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_probe_reaches_code_that_bypasses_the_head(family: str) -> None:
    model = tiny_model(family)
    space = FullSpace(model)
    rows = torch.tensor([3, 250, 3])

    def direct(target: nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            hidden = target.base_model(input_ids=IDS, use_cache=False).last_hidden_state[:, -1]
            weight = target.get_output_embeddings().weight
            return torch.cat(
                [F.linear(hidden, weight[rows]), hidden @ weight.T[:, :5], F.linear(hidden, weight[7:9])], dim=1
            )

    with space.probe(SIXTEENTH, key=5):
        probed = direct(model)

    assert torch.equal(probed, direct(moved_by_hand(model, scale=SIXTEENTH, key=5)))


def test_a_kernel_that_takes_a_weight_by_its_address_is_refused_in_a_full_probe() -> None:
    """As Triton's launcher does with a parameter: the kernel would compute with the unperturbed weight."""
    model = torch.nn.Linear(4, 4)
    space = FullSpace(model)

    with space.probe(0.01, 1), pytest.raises(ConfigError, match=r"^FullSpace must .* weight by its address"):
        model.weight.data_ptr()

    assert model.weight.data_ptr()


def test_full_probe_makes_only_the_embedding_rows_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    made: list[int] = []
    from fedzo.zo import perturb

    original = perturb.add_direction
    monkeypatch.setattr(
        perturb, "add_direction", lambda base, *a, **k: made.append(base.numel()) or original(base, *a, **k)
    )
    embedding = model.get_input_embeddings().weight

    with FullSpace(model).probe(SIXTEENTH, key=5), torch.inference_mode():
        model.base_model(input_ids=IDS, use_cache=False)

    assert made
    assert embedding.numel() not in made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_probe_computes_what_a_perturbed_copy_computes(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    indices = some_indices(model)
    before = bits(model)
    space = MaskedSpace(model, indices)
    twin = copy.deepcopy(model)
    z = torch.from_numpy(direction(9, space.size))
    with torch.no_grad():
        for (name, flat), part in zip(indices.items(), z.split([i.numel() for i in indices.values()]), strict=True):
            weight = dict(twin.named_parameters())[name].view(-1)
            weight[flat] = (weight[flat].float() + part * torch.tensor(0.25)).to(dtype)

    with space.probe(0.25, key=9):
        plus = logits(model)

    assert torch.equal(plus, logits(twin))
    assert_same_bits(model, before)


@pytest.fixture(params=["masked", "full"])
def make_space(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], Space]]:
    if request.param == "full":
        yield FullSpace
    else:
        yield lambda model: MaskedSpace(model, some_indices(model))


def test_a_masked_probe_that_fails_half_way_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may be short while values are written; who asks again must find the model that it was."""
    model, own, written = tiny_model("llama"), masked._put, []
    space, before = MaskedSpace(model, some_indices(model)), bits(model)

    def put(*given: torch.Tensor) -> None:
        written.append(1)
        if len(written) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        own(*given)

    monkeypatch.setattr(masked, "_put", put)
    with pytest.raises(torch.OutOfMemoryError), space.probe(SIXTEENTH, key=3):
        pytest.fail("the probe has begun")

    assert_same_bits(model, before)


def test_small_steps_do_not_vanish_in_a_masked_bfloat16_model() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    space = MaskedSpace(model, some_indices(model))
    start = space.values()

    for key in range(100):
        space.step(1e-6, key)

    drift = space.values() - start
    assert np.abs(drift).max() > 0
    assert abs(float(drift.std()) / (1e-6 * 10) - 1) < 0.2  # a random walk of 100 steps of 1e-6


def test_full_steps_move_all_weights_as_a_dense_twin() -> None:
    model = tiny_model("gpt2")
    twin = moved_by_hand(model, scale=-0.125, key=8)

    FullSpace(model).step(0.125, key=8)

    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_values_load_round_trip(make_space: Callable[..., Space]) -> None:
    model = tiny_model("qwen3")
    space = make_space(model)
    values, before = space.values(), bits(model)

    space.step(0.5, key=1)
    space.load(values)

    assert_same_bits(model, before)
    with pytest.raises(ValueError, match="float32 of shape"):
        space.load(values[:-1])


def test_masked_space_works_on_weights_that_are_not_contiguous() -> None:
    layer = nn.Linear(6, 4, bias=False)
    layer.weight = nn.Parameter(torch.arange(24.0).reshape(6, 4).T, requires_grad=False)
    flat = torch.tensor([0, 5, 23])
    space = MaskedSpace(layer, {"weight": flat})

    assert space.values().tolist() == layer.weight.reshape(-1)[flat].tolist()
    space.load(np.array([-1, -2, -3], np.float32))

    assert layer.weight.reshape(-1)[flat].tolist() == [-1, -2, -3]


def test_tied_weights_are_counted_once() -> None:
    model = tiny_model("llama")

    assert FullSpace(model).size == sum(p.numel() for p in model.parameters())


def test_masked_space_refuses_a_mask_of_another_model_and_an_empty_one() -> None:
    model = tiny_model("llama")

    with pytest.raises(ConfigError, match="no parameter 'nowhere'"):
        MaskedSpace(model, {"nowhere": torch.tensor([1])})
    with pytest.raises(ConfigError, match="at least one weight"):
        MaskedSpace(model, {})


@pytest.mark.parametrize(
    ("flat", "rule"),
    [
        (torch.tensor([0, 5, 1]), r"must ascend without repeats, .*indices\.unique\(\)"),  # as topk gives them
        (torch.tensor([1, 1, 2]), "must ascend without repeats"),
        (torch.tensor([0, 5], dtype=torch.int32), r"must be an int64 vector, got torch\.int32"),
        (torch.tensor([[0, 5]]), r"must be an int64 vector, got torch\.int64 of shape \(1, 2\)"),
        (torch.eye(4, 6).bool(), r"must be an int64 vector, got torch\.bool .*nonzero\(\)"),
        (torch.tensor([-1, 5]), r"must lie in 0\.\.23, got -1\.\.5"),
        (torch.tensor([5, 24]), r"must lie in 0\.\.23, got 5\.\.24"),
    ],
)
def test_masked_space_refuses_indices_that_name_no_values_or_some_twice(flat: torch.Tensor, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"indices of 'weight' {rule}"):
        MaskedSpace(nn.Linear(6, 4), {"weight": flat})

    ends = MaskedSpace(nn.Linear(6, 4), {"weight": torch.tensor([0, 23]), "bias": torch.tensor([], dtype=torch.int64)})
    assert ends.size == 2


def scripted(layer: nn.Module) -> nn.Module:
    return torch.jit.script(layer)


def traced(layer: nn.Module) -> nn.Module:
    return torch.jit.trace(layer, torch.ones(2, 3))


def compiled_in_place(layer: nn.Module) -> nn.Module:
    layer.compile()
    return layer


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it gives up
@pytest.mark.parametrize(
    ("compiled", "kind"),
    [
        (scripted, "RecursiveScriptModule"),
        (traced, "TopLevelTracedModule"),
        (torch.compile, "OptimizedModule"),
        (compiled_in_place, "Linear"),
    ],
)
def test_full_space_refuses_compiled_modules_that_hold_trained_weights(
    compiled: Callable[[nn.Module], nn.Module], kind: str
) -> None:
    """TorchScript would compute with the unperturbed weights, so that every g were 0 without a word."""
    model = nn.Sequential(nn.Linear(3, 3), compiled(nn.Linear(3, 2))).requires_grad_(False)

    with pytest.raises(ConfigError, match=f"1 is a {kind}, and compiled code hides them"):
        FullSpace(model)
    with pytest.raises(ConfigError, match=f"the model is a {kind}"):
        FullSpace(compiled(nn.Linear(3, 2)))
    assert FullSpace(model, parameters={"0.weight": model[0].weight}).size == 9


@pytest.fixture
def fast_path() -> Iterator[Callable[[bool], None]]:
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    yield mha.set_fastpath_enabled
    mha.set_fastpath_enabled(before)


@pytest.mark.filterwarnings("ignore")  # nested tensors are a prototype
def test_full_space_refuses_attention_that_is_fast_outside_of_a_probe_only(fast_path: Callable[[bool], None]) -> None:
    """There padded positions are 0, here they are not: a difference of two such losses is no slope."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 1)).requires_grad_(False).eval()
    x, padded = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])

    def outputs() -> torch.Tensor:
        return model[1](model[0](x), src_key_padding_mask=padded)

    fast_path(True)
    with pytest.raises(ConfigError, match=r"1\.layers\.0 is a TransformerEncoderLayer, .*fastpath_enabled\(False\)"):
        FullSpace(model)
    with pytest.raises(ConfigError, match="the model is a MultiheadAttention"):
        FullSpace(nn.MultiheadAttention(8, 2, batch_first=True))
    assert FullSpace(nn.MultiheadAttention(8, 2)).size > 0  # which has no such path
    assert FullSpace(model, parameters={"0.weight": model[0].weight}).size == 64
    fast = outputs()
    fast_path(False)
    space, slow = FullSpace(model), outputs()
    with space.probe(1e-30, 3):
        torch.testing.assert_close(outputs(), slow)
    assert (fast - slow)[padded].abs().max() > 0.1


def test_full_space_refuses_quantised_weights() -> None:
    model = nn.Module()
    model.register_parameter("packed", nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False))
    model.register_parameter("whole", nn.Parameter(torch.zeros(3)))

    with pytest.raises(ConfigError, match=r"^FullSpace: every .*, but 'packed' is torch\.int8\. Leave it out of"):
        FullSpace(model)
    assert FullSpace(model, parameters={"whole": model.whole}).size == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_weights_are_refused_that_a_probe_or_step_would_round_to_float32(dtype: torch.dtype) -> None:
    """The first probe would change bits of float64 weights, and a GPU has no kernel for them."""
    layer = nn.Linear(6, 4).requires_grad_(False).to(dtype)

    with pytest.raises(ConfigError, match=rf"^FullSpace: every .* must be float32, .* is {dtype}\. .*model\.float\(\)"):
        FullSpace(layer)
    with pytest.raises(ConfigError, match=rf"^mask: 'weight' must be float32, .* got {dtype}\. Call model\.float\(\)"):
        MaskedSpace(layer, {"weight": torch.tensor([0, 5])})


def test_weights_of_any_dtype_may_lie_beside_those_that_a_mask_trains() -> None:
    model, none = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2).double()), torch.tensor([], dtype=torch.int64)

    assert MaskedSpace(model, {"0.weight": torch.tensor([1]), "1.weight": none}).size == 1


def test_scaling_a_masked_16_bit_model_moves_the_float32_master() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    space = MaskedSpace(model, some_indices(model))
    start = space.values()

    for _ in range(100):
        space.scale_by(float(np.float32(1 - 1e-5)))

    assert space.values() == pytest.approx(start * (1 - 1e-5) ** 100, rel=1e-5)


def test_scaling_goes_through_large_weights_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedzo.zo.spaces import full as module

    monkeypatch.setattr(module, "_CHUNK", 7)
    layer = nn.Linear(6, 4, bias=False)
    before = layer.weight.detach().clone()

    FullSpace(layer).scale_by(0.5)

    assert torch.equal(layer.weight.detach(), before * 0.5)
