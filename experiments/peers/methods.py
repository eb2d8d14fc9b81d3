"""The methods that are compared: each as words of ``fedzo train``, with the first learning rate of its ladder."""

from __future__ import annotations

from typing import NamedTuple

NUM_CLIENTS = 8
JOINT_ROWS = 16
"""Of a step: what all clients that take part have together."""


class Method(NamedTuple):
    """A method.

    Attributes:
        title: As tables and figures name it.
        words: Overrides of ``fedzo train``.
        first_lr: Where its ladder of learning rates begins.
        forwards: Of a row in a step; a backward pass counts as two.
        rows: Of a step, of all clients that take part.
        steps: Local steps of a round.
        blocks_once: Whether a row runs the blocks once in a run.
        is_federated: Whether scalars or vectors travel; a single site sends nothing that could be counted.
    """

    title: str
    words: list[str]
    first_lr: float
    forwards: float = 2
    rows: int = JOINT_ROWS
    steps: int = 1
    blocks_once: bool = False
    is_federated: bool = True

    def whole_forwards(self, rounds: int, *, num_rows: int) -> float:
        """Forwards of single rows through the whole model in so many rounds, blocks counted."""
        visits = rounds * self.steps * self.rows
        return min(visits, num_rows) if self.blocks_once else visits * self.forwards


_ALL = ["trainer=mezo", "fl.batch_size=2"]
_TWO = ["fl.batch_size=8", "strategy.clients_per_round=2"]
_GRADIENT = ["estimator=backprop", "fl.local_steps=10", "fl.batch_size=2", "runtime=inline"]
_LAST_NORM = ["trainer=last_norm", "task.common_shift=0.3"]
METHODS = {
    "mezo": Method(
        "MeZO, one site with all rows",
        ["trainer=mezo", "fl.num_clients=1", "partition=iid", "fl.batch_size=16"],
        6.4e-5,
        is_federated=False,
    ),
    "full": Method("Full-FedZO, T = 10", [*_ALL, "fl.local_steps=10"], 6.4e-5, steps=10),
    "decomfl": Method("DeComFL", ["experiment=decomfl", *_TWO], 6.4e-5, forwards=6),
    "fedkseed": Method("FedKSeed", ["experiment=fedkseed", *_TWO, "runtime=inline"], 6.4e-5, steps=10),
    # a step of one bit has the length of the learning rate: those of plain SGD were lr times a |g| of 5 to 10
    "feedsign": Method("FeedSign", ["experiment=feedsign", "fl.num_clients=8", "fl.batch_size=2"], 3.2e-4),
    "lora": Method("LoRA-FedZO", ["trainer=lora", "fl.batch_size=2"], 2e-3),
    "meerkat": Method("Meerkat", ["trainer=meerkat", "fl.batch_size=2"], 4e-4),
    "quickstart": Method(
        "fedzo's quickstart: the last norm",
        [*_LAST_NORM, "model.lower_layers_cache_mb=16", "estimator.num_probes=4", "fl.batch_size=64"],
        3.0,
        forwards=8,
        rows=512,
        blocks_once=True,
    ),
    "mask_gradient": Method(
        "FedAvg by backpropagation, Meerkat's mask", ["trainer=meerkat", *_GRADIENT], 4e-3, forwards=3, steps=10
    ),
    "lora_gradient": Method(
        "FedAvg by backpropagation, LoRA", ["trainer=lora", *_GRADIENT], 2e-2, forwards=3, steps=10
    ),
    # the backward pass ends at the last norm
    "norm_gradient": Method(
        "FedAvg by backpropagation, the last norm", [*_LAST_NORM, *_GRADIENT], 3.0, forwards=1, steps=10
    ),
}
