"""Local updates that are scalars along known directions, of one client or of several together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from fedzo.data.encode import Example
from fedzo.errors import PluginError
from fedzo.evaluate.base import Evaluator, value_as_loss
from fedzo.fl.client.local_update import Batches
from fedzo.fl.clip import NO_BOUND, clip, sent_losses
from fedzo.fl.config import Aggregation, directions_of
from fedzo.fl.messages import ScalarReply, TrainRequest, scalars_to_bytes, signs_to_bytes
from fedzo.fl.replica import Workspace
from fedzo.models.compiled import CompiledDecoder
from fedzo.models.forwards import OnRows, Planning
from fedzo.models.lower_layers import StepStates
from fedzo.models.products import use_products
from fedzo.models.scoring import example_losses
from fedzo.registry import returned
from fedzo.system import is_out_of_memory
from fedzo.zo.estimator import Estimator, Losses, Projection, estimate_together
from fedzo.zo.keys import step_keys
from fedzo.zo.log import Scalars
from fedzo.zo.spaces.base import MasterSpace, RowWeights, Space
from fedzo.zo.steps import Drift, local_step, probe_shares

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

log = logging.getLogger(__name__)
_KEPT_BYTES = 64 << 20  # of clients' places on their local paths
_ROWS_AT_ONCE = 256  # when a client's rows run to be kept


class ScalarUpdate:
    """Steps along directions that all peers know, by scalars: a client sends these, and keeps no vector.

    Args:
        config: The run's settings.
        batches: The rows of each step.
        estimator: Turns losses into scalars.
        evaluator: Whose value is the loss of a step; None where its rows have losses of their own.
    """

    reply_type: ClassVar[type[ScalarReply]] = ScalarReply

    def __init__(
        self, config: RunSettings, batches: Batches, estimator: Estimator, evaluator: Evaluator | None = None
    ) -> None:
        self.config = config
        self.num_probes = config.estimator.probes_per_step
        self.signs = config.strategy.aggregation is Aggregation.majority_sign
        self._batches = batches
        self._estimator = estimator
        self._evaluator = evaluator
        self._ahead: dict[tuple[int, int, int], list[Projection]] = {}  # by client, round and step
        self._most_shared = math.inf  # of a round's local steps, how many are shared: memory may say none or one

    def make(self, workspace: Workspace, request: TrainRequest) -> ScalarReply:
        replica = workspace.replica
        g = np.zeros((request.steps, self.num_probes), np.float32)
        loss = np.zeros_like(g)
        dropped = np.zeros(g.shape, np.uint8)
        end_check = 0
        walks = request.steps > 1
        drift = replica.drift(request.client, lr=request.lr) if walks else None
        if walks:
            replica.space.mark()
        try:
            for t in range(request.steps):
                projections = self.estimate(workspace, request, step=t)
                g[t], dropped[t] = self.as_sent(projections, request)
                loss[t] = sent_losses([projection.loss for projection in projections])
                if walks:
                    self.take(replica.space, request, g[t], step=t, drift=drift)
            end_check = replica.space.check() if walks else 0
        finally:
            if walks:
                replica.space.rewind()
        return ScalarReply(
            position=replica.position,
            g=signs_to_bytes(g) if self.signs else scalars_to_bytes(g),
            loss=scalars_to_bytes(loss),
            dropped=dropped.tobytes(),
            end_check=end_check,
        )

    def estimate(self, workspace: Workspace, request: TrainRequest, *, step: int) -> list[Projection]:
        """The projections of one step at the present theta; taken from ``look_ahead`` where it has them."""
        if (request.client, request.round, step) in self._ahead:
            return self._ahead.pop((request.client, request.round, step))
        batch = self._batches.of(request, step=step)
        keys = self._keys(request, step=step)
        if self._evaluator is not None:
            loaded = replace(workspace.loaded, shared_prompts=False)  # whose last bits differ between processes
            most = workspace.tokens_per_batch
            value = partial(value_as_loss, self._evaluator, loaded, batch, self.config.task, tokens_per_batch=most)
            return self._estimator.estimate(workspace.replica.space, value, keys)
        lower = self._step_states(workspace, [request.client])

        def loss_fn() -> float:
            return float(self._losses(workspace, batch, [request.client] * len(batch), lower=lower).mean())

        return self._estimator.estimate(workspace.replica.space, loss_fn, keys)

    def as_sent(self, projections: list[Projection], request: TrainRequest) -> tuple[Scalars, npt.NDArray[np.bool_]]:
        """The scalars that the step is taken with and the server is sent, and which of them were dropped; [P] each."""
        for each in returned(projections, list, by=self._estimator, method="estimate"):
            returned(each, Projection, by=self._estimator, method="estimate")
        if len(projections) != self.num_probes:  # numpy would hand one scalar to every probe
            raise PluginError(
                f"{type(self._estimator).__name__}.estimate must give a projection for each of {self.num_probes} keys, "
                f"got {len(projections)}. Correct the estimator; fedzo.testing.check_estimator has checks for it."
            )
        g = np.array([projection.g for projection in projections], np.float32)
        g = clip(g, request.max_abs_g if request.max_abs_g != NO_BOUND else self.config.strategy.scalar_bound)
        dropped = np.array([projection.dropped for projection in projections])
        if self.signs:
            g = np.sign(g)
            dropped |= g == 0  # without a sign: there is no bit for it
        return g, dropped

    def take(self, space: Space, request: TrainRequest, g: Scalars, *, step: int, drift: Drift | None) -> None:
        """Move by exactly the scalars that are sent, a mean over probes."""
        keys = self._keys(request, step=step)
        local_step(space, lr=request.lr, c=probe_shares(g), keys=keys, drift=drift)

    def look_ahead(self, workspace: Workspace, requests: Mapping[int, TrainRequest]) -> None:
        """Evaluate local steps of these clients in joint forwards; ``estimate`` then takes the results from here.

        Clients that share directions are at the same theta in a round's first step, so their rows can share
        forwards. In later steps (T > 1) each is somewhere else, and the space must have a way to compute rows with
        weights of their own (``row_weights``). Without one those steps are each client's own, and so is from then on
        what memory does not hold. The losses differ from those of separate forwards in their last bits only: a
        product's rounding depends on the number of its rows. An evaluator's values share none.

        Rows with weights of their own run eagerly where the others run as CUDA graphs, which do not know them.

        Args:
            workspace: The model, at the round's start.
            requests: Requests of one round, by client.
        """
        self._ahead.clear()
        if self._evaluator is not None or not self._most_shared:  # a value is of one batch
            return
        loaded, lower = workspace.loaded, workspace.lower
        later = self._most_shared > 1 and any(request.steps > 1 for request in requests.values())
        shareable = later and not isinstance(loaded.decoder, CompiledDecoder)
        own = workspace.replica.space.row_weights(loaded.model) if shareable else None
        eager = replace(workspace, loaded=replace(loaded, decoder=None), lower=lower and replace(lower, evaluate=None))
        walks = _Walks(workspace, requests, self.take)
        step, walking = 0, requests
        while walking:
            try:
                estimates = self._estimate_together(
                    eager if step else workspace, walking, step=step, own=own if step else None, offset_of=walks.offset
                )
            except (RuntimeError, MemoryError) as error:
                if not (is_out_of_memory(error) or (step and isinstance(error, NotImplementedError))):
                    raise
                log.warning(
                    "clients cannot share the forwards of %s with this model on this device: %s",
                    "later local steps" if step else "a round",
                    " ".join(str(error).split())[:400],
                )
                self._most_shared = 1 if step else 0
                return
            for (client, request), projections in zip(walking.items(), estimates, strict=True):
                self._ahead[client, request.round, step] = projections
                walks.go_on(client, self.as_sent(projections, request)[0])
            step += 1
            walking = {c: request for c, request in walking.items() if own and request.steps > step}

    def _estimate_together(
        self,
        workspace: Workspace,
        requests: Mapping[int, TrainRequest],
        *,
        step: int,
        own: RowWeights | None,
        offset_of: Callable[[int], torch.Tensor],
    ) -> list[list[Projection]]:
        """What ``estimate`` gives each client where it is on its path; without ``own``, at the round's start."""
        batches = {client: self._batches.of(request, step=step) for client, request in requests.items()}
        rows = [example for batch in batches.values() for example in batch]
        owners = [client for client, batch in batches.items() for _ in batch]
        ends = np.cumsum([len(batch) for batch in batches.values()])[:-1]
        lower = self._step_states(workspace, requests)

        def losses_fn() -> Losses:
            if own is None:
                losses = self._losses(workspace, rows, owners, lower=lower)
            else:
                with own:
                    losses = self._losses(workspace, rows, owners, lower=lower, before=partial(follow, own))
            return np.array([part.mean() for part in np.split(losses, ends)])

        def follow(weights: RowWeights, batch: list[int]) -> None:
            clients, index = np.unique([owners[row] for row in batch], return_inverse=True)
            weights.follow((offset_of(int(client)) for client in clients), index)

        keys = self._keys(next(iter(requests.values())), step=step)
        return estimate_together(self._estimator, workspace.replica.space, losses_fn, keys, count=len(requests))

    def _step_states(self, workspace: Workspace, clients: Iterable[int]) -> StepStates | None:
        """What a step of these clients keeps; where rows are kept over rounds, all of theirs have run before it."""
        if workspace.lower is None:
            return None
        step = workspace.lower.of_step()
        if (kept := workspace.lower.rows) is None:
            return step
        for client in clients:
            if client in kept.owners:
                continue
            train, num_run = self._batches.train_rows(client), 0
            while num_run < len(train) and not kept.is_full:
                part = train[num_run : num_run + _ROWS_AT_ONCE]
                self._losses(workspace, part, [client] * len(part), lower=workspace.lower.of_step(repeats=False))
                num_run += len(part)
            kept.owners.add(client)
            log.info("client %d: the lower blocks ran on %d of %d training rows", client, num_run, len(train))
        return step

    def _keys(self, request: TrainRequest, *, step: int) -> list[int]:
        return step_keys(
            self._batches.run_seed,
            round=request.round,
            step=step,
            probes=self.num_probes,
            owner=request.client,
            directions=directions_of(self.config.fl),
        )

    def _losses(
        self,
        workspace: Workspace,
        rows: list[Example],
        owners: list[int],
        *,
        lower: StepStates | None,
        before: OnRows | None = None,
    ) -> Losses:
        task = self.config.task
        planning = Planning(workspace.tokens_per_batch, workspace.forward_cost_tokens, before=before, lower=lower)
        with use_products(workspace.products):
            losses: Losses = example_losses(
                workspace.loaded, rows, planning, loss=task.loss, common_shift=task.common_shift, owners=owners
            )
        return losses


class _Walks:
    """Where the clients of a round are on their local paths.

    A client's place is walked on from the last one, and kept while that fits; the others walk from the start each time,
    since their scalars take no memory.

    Args:
        workspace: The model, at the round's start.
        requests: Requests of the round, by client.
        take: ``ScalarUpdate.take``.
    """

    def __init__(self, workspace: Workspace, requests: Mapping[int, TrainRequest], take: Callable[..., None]) -> None:
        self._replica = workspace.replica
        self._device = workspace.loaded.device
        self._requests = requests
        self._take = take
        self._sent: dict[int, list[Scalars]] = {client: [] for client in requests}
        self._start: torch.Tensor | None = None
        self._kept: dict[int, tuple[int, MasterSpace]] = {}  # steps taken, and where they lead
        self._room = _KEPT_BYTES // (4 * workspace.replica.space.size)

    def go_on(self, client: int, g: Scalars) -> None:
        """The client's next step is taken with these scalars."""
        self._sent[client].append(g)

    def offset(self, client: int) -> torch.Tensor:
        """How far a client has come from the round's start, float32 [n] on the model's device."""
        if self._start is None:
            self._start = torch.from_numpy(self._replica.space.values()).to(self._device)
        space = self._replica.space
        taken, place = self._kept.get(client, (0, None))
        place = place or MasterSpace(self._start.clone(), space.distribution)
        if taken < (steps := len(self._sent[client])):
            request = self._requests[client]
            drift = self._replica.drift(client, lr=request.lr)
            for step in range(taken, steps):
                self._take(place, request, self._sent[client][step], step=step, drift=drift)
        if client in self._kept or len(self._kept) < self._room:
            self._kept[client] = steps, place
        return place.master - self._start
