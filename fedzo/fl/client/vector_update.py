"""Local updates that are vectors: where a client's local steps along gradients led, in the space's coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch

from fedzo.data.config import TaskConfig
from fedzo.data.encode import Example
from fedzo.errors import PluginError
from fedzo.fl.client.local_update import Batches
from fedzo.fl.clip import sent_losses
from fedzo.fl.messages import TrainRequest, VectorReply, scalars_to_bytes
from fedzo.fl.replica import Workspace
from fedzo.models.arithmetic import DIFFERENTIABLE
from fedzo.models.forwards import Planning
from fedzo.models.loaded import LoadedModel
from fedzo.models.scoring import example_losses
from fedzo.registry import returned
from fedzo.zo.estimator import GradientEstimator
from fedzo.zo.spaces.base import DifferentiableSpace, GraphLossFn


@dataclass(frozen=True, slots=True)
class VectorUpdate:
    """Steps along gradients: a client sends the round's start minus its end, n float32 numbers.

    Attributes:
        batches: The rows of each step.
        task: How examples are judged.
        estimator: Takes the steps; it remembers nothing from round to round.
    """

    reply_type: ClassVar[type[VectorReply]] = VectorReply
    batches: Batches
    task: TaskConfig
    estimator: GradientEstimator

    def make(self, workspace: Workspace, request: TrainRequest) -> VectorReply:
        # a run on any other space is refused when it is made
        space = cast(DifferentiableSpace, workspace.replica.space)
        start = space.values()
        try:
            losses = self.estimator.descend(space, self._losses(workspace, request), lr=request.lr)
            if len(returned(losses, list, by=self.estimator, method="descend")) != request.steps:
                raise PluginError(
                    f"{type(self.estimator).__name__}.descend must give a loss for each of {request.steps} steps, got "
                    f"{len(losses)}. Correct the estimator."
                )
            change = start - space.values()
        finally:
            space.load(start)
        return VectorReply(
            position=workspace.replica.position,
            change=scalars_to_bytes(change),
            loss=scalars_to_bytes(sent_losses(losses)),
        )

    def look_ahead(self, workspace: Workspace, requests: Mapping[int, TrainRequest]) -> None:
        """Nothing is shared: each client's gradient is its own."""

    def _losses(self, workspace: Workspace, request: TrainRequest) -> Iterator[GraphLossFn]:
        planning = Planning(workspace.tokens_per_batch, arithmetic=DIFFERENTIABLE)
        for step in range(request.steps):
            rows = self.batches.of(request, step=step)
            yield partial(self._loss, workspace.loaded, rows, planning)

    def _loss(self, loaded: LoadedModel, rows: list[Example], planning: Planning) -> torch.Tensor:
        """The mean, with its graph: of the model's parameters that require a gradient; float64."""
        losses: torch.Tensor = example_losses(
            loaded, rows, planning, loss=self.task.loss, common_shift=self.task.common_shift
        )
        return losses.mean()
