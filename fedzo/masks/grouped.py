"""Choosing by sensitivity within the memory that is left: the sums of a large model do not fit beside it.

Where the squared and the signed sums of all tensors fit, one pass over the calibration text makes both. Else the
squared sums are made for one group of tensors after the other, and a last pass makes the signed sums at the chosen
places alone. A group costs one more pass. On a CPU the mask and its gradient are the same, bit for bit; on a GPU two
passes differ in their last bits (``fedzo.masks.sensitivity``), and with them weights at the edge of the choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import nn

from fedzo.errors import ConfigError
from fedzo.masks.ranking import ScoreFn
from fedzo.masks.sensitivity import LossFn, WindowGradients
from fedzo.system import OnProgress, consecutive

logger = logging.getLogger(__name__)
ChooseFn = Callable[[ScoreFn, Container[str]], dict[str, torch.Tensor]]
"""Scores and names of tensors to the chosen indices of each that has any."""
_SUM_BYTES = 4  # of a float32
_PLACE_BYTES = 12  # of a signed sum and its index


def choose_most_sensitive(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    windows: Sequence[torch.Tensor],
    choose: ChooseFn,
    *,
    together: bool,
    num_chosen: int,
    loss_fn: LossFn,
    memory_bytes: float,
    host_bytes: float,
    on_window: OnProgress,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The most sensitive weights, and the signed sum of their gradients.

    Args:
        model: A causal language model; it is left as it was found.
        parameters: Those to choose from.
        windows: Token ids, int64 [num_tokens] each.
        choose: Makes the choice, from the squared sums of some tensors.
        together: Whether all tensors compete with one another. The squared sums of earlier groups then wait on the CPU.
        num_chosen: How many weights ``choose`` chooses of all.
        loss_fn: The loss of a window.
        memory_bytes: What the sums may take on the model's device.
        host_bytes: What sums that wait may take on the CPU, if that is another device.
        on_window: Called with (windows done, windows in all), all passes counted.

    Returns:
        Flat indices, int64, and float32 sums, by name; on the parameters' device, or the CPU.

    Raises:
        ConfigError: The sums of one tensor, of the chosen weights, or of those that wait do not fit.
        NumericsError: A window's loss is not finite.
    """
    sizes = {name: each.numel() for name, each in parameters.items()}
    needed = _SUM_BYTES * sum(sizes.values())
    if 2 * needed <= memory_bytes:
        once = "mask: the sums of %d tensors take %.0f MiB, so calibration passes over its text once"
        logger.info(once, len(parameters), 2 * needed / 2**20)
        squares, signed = WindowGradients(model, windows, loss_fn, on_window).sums(parameters)
        chosen = _chosen_of(choose, squares)
        return chosen, {name: signed[name][flat] for name, flat in chosen.items()}

    groups = plan_groups(sizes, memory_bytes)
    if together and needed > (room := memory_bytes if _is_cpu(parameters) else host_bytes):
        raise _too_little("of all eligible weights", needed, room, "trainer.granularity=per_tensor")
    if (at_places := _PLACE_BYTES * num_chosen) > memory_bytes:
        raise _too_little("of the chosen weights", at_places, memory_bytes, "a lower trainer.density")
    passes = len(groups) + 1
    logger.warning(
        "mask: the sums of %d tensors do not fit into %.0f MiB at once, so calibration passes over its text %d times",
        len(parameters),
        memory_bytes / 2**20,
        passes,
    )
    gradients = WindowGradients(model, windows, loss_fn, on_window, passes)
    chosen, waiting = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for group in groups:
        squares = gradients.sums({name: parameters[name] for name in group}, signed=False).squares
        if together:
            waiting |= {name: each.cpu() for name, each in squares.items()}
        else:
            chosen |= _chosen_of(choose, squares)
        del squares  # or they would be held beside the next
    if together:
        chosen = _chosen_of(choose, waiting)
    places = {name: flat.to(parameters[name].device) for name, flat in chosen.items()}
    sums = gradients.sums({name: parameters[name] for name in places}, squares=False, places=places)
    return chosen, sums.signed


def plan_groups(sizes: Mapping[str, int], memory_bytes: float) -> list[list[str]]:
    """Tensors, in their order, in groups whose squared sums fit into ``memory_bytes``; as few as that order allows.

    Raises:
        ConfigError: A tensor alone does not fit.
    """
    needed = {name: _SUM_BYTES * size for name, size in sizes.items()}
    for name, of_tensor in needed.items():
        if of_tensor > memory_bytes:
            raise _too_little(f"of {name!r}", of_tensor, memory_bytes, "trainer.selector=magnitude")
    names = [*needed]
    return [names[part.start : part.stop] for part in consecutive([*needed.values()], most=memory_bytes)]


def _is_cpu(parameters: Mapping[str, nn.Parameter]) -> bool:
    return all(each.device.type == "cpu" for each in parameters.values())


def _too_little(what: str, needed: int, memory_bytes: float, instead: str) -> ConfigError:
    return ConfigError(
        f"trainer.selector=sensitivity: the squared gradients {what} must fit in memory beside the model and one "
        f"window of text, but need {needed / 2**20:.0f} MiB, left are {max(0.0, memory_bytes) / 2**20:.0f} MiB. Lower "
        f"trainer.calibration_tokens, use a smaller model.dtype, or write {instead}."
    )


def _chosen_of(choose: ChooseFn, squares: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    chosen = choose(squares.__getitem__, squares)
    _warn_of_zeros(squares, chosen)
    return chosen


def _warn_of_zeros(squares: Mapping[str, torch.Tensor], chosen: Mapping[str, torch.Tensor]) -> None:
    """Weights that no calibration window touches are poor choices; say so instead of choosing them silently."""
    for name, flat in chosen.items():
        if zeros := int((squares[name][flat] == 0).sum()):
            logger.warning("mask: %d of the %d weights chosen in %s have no gradient", zeros, flat.numel(), name)
