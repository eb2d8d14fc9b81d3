"""The baselines against torch's own optimiser and a walk written the other way round."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from fedzo.bench.rivals import first_order_step, mezo_walk_step
from fedzo.testing.tiny_models import tiny_model


def test_first_order_step_is_that_of_torch_sgd() -> None:
    model = tiny_model("llama", seed=0)
    twin = copy.deepcopy(model).requires_grad_(True)
    ids, choices = torch.arange(24).view(2, 12), torch.tensor([5, 9])
    server_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    logits = twin(input_ids=ids).logits[:, -1, choices]
    F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
    server_optimizer.step()

    first_order_step(model, ids, choices, lr=0.1)

    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
        assert not ours.requires_grad
        assert ours.grad is None


def test_walk_steps_along_its_own_direction() -> None:
    """With the loss <a, theta> the walk ends at theta - lr <a, z> z."""
    model = torch.nn.Linear(3, 2).requires_grad_(False)
    start = [parameter.clone() for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(4)
    z = [torch.normal(0.0, 1.0, size=parameter.shape, generator=generator) for parameter in start]
    a = [torch.arange(float(parameter.numel())).view(parameter.shape) for parameter in start]

    def loss() -> float:
        return float(sum((x * y).sum() for x, y in zip(a, model.parameters(), strict=True)))

    mezo_walk_step(model, loss, eps=1e-2, lr=0.5, seed=4)

    g = float(sum((x * y).sum() for x, y in zip(a, z, strict=True)))
    for before, after, direction in zip(start, model.parameters(), z, strict=True):
        assert torch.allclose(after, before - 0.5 * g * direction, atol=1e-3)
