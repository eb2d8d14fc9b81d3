"""Choosing a mask: the top share of the eligible weights by a score.

``sensitivity`` is that of Meerkat and SensZOQ (arXiv 2506.03337, 2406.02913; see ``fedzo.masks.sensitivity``);
``magnitude`` and ``random`` are what they compare with.

Deviations: of equal scores the earlier tensor's and then the lower index wins, where the papers leave it to the sort;
``magnitude`` is the true top of ``abs(w)``, not that of the released trainer, which negates the indices in place of the
scores; ``random`` is drawn from the counter-based generator.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from enum import StrEnum

import torch
from torch import nn

import fedzo
from fedzo.errors import ConfigError
from fedzo.masks.calibration import windows_digest
from fedzo.masks.eligible import eligible_parameters
from fedzo.masks.grouped import choose_most_sensitive
from fedzo.masks.mask import Mask
from fedzo.masks.ranking import ScoreFn, largest
from fedzo.masks.sensitivity import LossFn, next_token_loss
from fedzo.system import OnProgress, no_progress
from fedzo.zo.directions import lots, stream_key


class Selector(StrEnum):
    """How a mask ranks the weights."""

    sensitivity = "sensitivity"
    """Squared gradient on calibration text."""
    magnitude = "magnitude"
    """Absolute value: the largest weights."""
    random = "random"
    """A uniform draw, from the run seed."""


class Granularity(StrEnum):
    """Where the top share is taken."""

    per_tensor = "per_tensor"
    """``density`` of each tensor."""
    everywhere = "everywhere"
    """``density`` of all eligible weights together."""


def select_mask(
    model: nn.Module,
    *,
    density: float,
    selector: Selector = Selector.sensitivity,
    granularity: Granularity = Granularity.per_tensor,
    windows: Sequence[torch.Tensor] = (),
    seed: int = 0,
    loss_fn: LossFn | None = None,
    on_window: OnProgress = no_progress,
    base_digest: str | None = None,
    among: Container[str] | None = None,
    memory_bytes: float = math.inf,
    host_bytes: float = math.inf,
) -> Mask:
    """Choose the weights to train.

    The model is left as it was found: bits, ``requires_grad``, gradients, training mode. In one pass, sensitivity needs
    two float32 values for each eligible weight beside one window's activations; gradients are freed one tensor at a
    time.

    Args:
        model: A causal language model, called as ``model(input_ids=..., use_cache=False).logits`` for sensitivity.
        density: Share of the eligible weights, above 0 and at most 1.
        selector: Their score.
        granularity: int(numel * density) of each tensor, or int(total * density).
        windows: Token ids, int64 [num_tokens] each; for sensitivity.
        seed: Seed of ``random``.
        loss_fn: ``loss_fn(model, input_ids [1, num_tokens])``; by default the mean cross-entropy of the next token.
        on_window: Called with (windows done, windows in all).
        base_digest: Digest of the model's weights, for the manifest.
        among: Names of the parameters that may be chosen from; all that are eligible by default. With ``per_tensor``
            each gives the weights that it would give beside the others.
        memory_bytes: For sensitivity: what sums of gradients may take on the model's device. With less than 8 bytes an
            eligible weight they are made in groups (``fedzo.masks.grouped``).
        host_bytes: What sums that wait on the CPU may take, where tensors of another device compete.

    Returns:
        The mask, on the CPU; with the signed mean gradient if the selector is ``sensitivity``.

    Raises:
        ConfigError: The density is out of its range, the mask would be empty, the model has no eligible weight, or
            there are no windows for sensitivity.
        NumericsError: A loss or a score is not finite.
    """
    if not 0 < density <= 1:
        raise ConfigError(f"trainer.density must be > 0 and <= 1, got {density}. It is a share: 0.001 is 0.1 %.")
    if selector == Selector.sensitivity and not windows:
        raise ConfigError("trainer.selector=sensitivity needs calibration windows, got none. Set trainer.calibration.")
    eligible = eligible_parameters(model)
    parameters = {name: each for name, each in eligible.items() if among is None or name in among}
    if not parameters:
        raise ConfigError(
            f"mask: the chosen part of the model must hold an eligible weight, got none of the {len(eligible)} tensors "
            "that do. Lower trainer.first_layer."
        )
    together = granularity == Granularity.everywhere
    pools = [[*parameters]] if together else [[name] for name in parameters]
    counts = _counts([sum(parameters[name].numel() for name in pool) for pool in pools], density)

    # ``names`` has each pool whole or not at all
    def choose(score: ScoreFn, names: Container[str]) -> dict[str, torch.Tensor]:
        tops = [largest(score, pool, k) for pool, k in zip(pools, counts, strict=True) if k and pool[0] in names]
        return {name: flat for top in tops for name, flat in top.items()}

    signed: dict[str, torch.Tensor] | None = None
    if selector == Selector.sensitivity:
        chosen, signed = choose_most_sensitive(
            model,
            parameters,
            windows,
            choose,
            together=together,
            num_chosen=sum(counts),
            loss_fn=loss_fn or next_token_loss,
            memory_bytes=memory_bytes,
            host_bytes=host_bytes,
            on_window=on_window,
        )
    else:
        scores = {Selector.magnitude: _magnitudes(eligible), Selector.random: _draws(eligible, seed)}
        chosen = choose(scores[selector], parameters)
    manifest = {
        "selector": str(selector),
        "density": repr(float(density)),
        "granularity": str(granularity),
        "num_coordinates": str(sum(flat.numel() for flat in chosen.values())),
        "num_eligible": str(sum(p.numel() for p in parameters.values())),
        "num_tensors": str(len(chosen)),
        "fedzo": fedzo.__version__,
    }
    if signed is not None:
        manifest["calibration_docs"] = str(len(windows))
        manifest["calibration_tokens"] = str(sum(window.numel() for window in windows))
        manifest["calibration_sha256"] = windows_digest(windows)
    if selector == Selector.random:
        manifest["seed"] = str(seed)
    if base_digest is not None:
        manifest["base_digest"] = base_digest
    return Mask(
        indices={name: flat.cpu() for name, flat in chosen.items()},
        shapes={name: tuple(parameters[name].shape) for name in chosen},
        gradient=None if signed is None else {name: (each / len(windows)).cpu() for name, each in signed.items()},
        manifest=manifest,
    )


def _counts(sizes: list[int], density: float) -> list[int]:
    """How many weights are chosen from each of some pools."""
    counts = [int(size * density) for size in sizes]
    if sum(counts) == 0:
        # a little above 1 / max, so that the rounded number that is shown does keep one
        enough = f"{1.001 / max(sizes):.3e}"
        raise ConfigError(
            f"trainer.density must keep one weight or more, got {density}, which keeps none of {sum(sizes)} eligible "
            f"weights. Set it to {enough} or more."
        )
    return counts


def _magnitudes(eligible: Mapping[str, nn.Parameter]) -> ScoreFn:
    return lambda name: eligible[name].detach().reshape(-1).float().abs()


def _draws(eligible: Mapping[str, nn.Parameter], seed: int) -> ScoreFn:
    """Each tensor has a stream of its own, by its number among all that are eligible."""
    numbers = {name: number for number, name in enumerate(eligible)}
    return lambda name: lots(stream_key(seed, round=numbers[name]), eligible[name].numel(), eligible[name].device)
