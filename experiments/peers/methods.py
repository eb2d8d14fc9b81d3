"""The methods that are compared: each as words of ``fedzo train``, with the first learning rate of its ladder."""

from __future__ import annotations

from typing import NamedTuple

NUM_CLIENTS = 8
JOINT_ROWS = 16
"""Of a step: what all clients that take part have together."""
FIRST_LAYER, NUM_BLOCKS = 11, 30
MASK, UPPER_MASK = "runs/peers/mask.safetensors", "runs/peers/mask-upper.safetensors"


class Method(NamedTuple):
    """A method.

    Attributes:
        title: As tables and figures name it.
        words: Overrides of ``fedzo train``.
        first_lr: Where its ladder of learning rates begins.
        forwards: Of a row in a step; a backward pass counts as one for its inputs and one for its weights.
        rows: Of a step, of all clients that take part.
        steps: Local steps of a round.
        run_once: Share of the blocks that a row runs once in a run.
        num_scores: Dev scores of a run, where scores cost little.
        is_federated: Whether scalars or vectors travel; a single site sends nothing that could be counted.
    """

    title: str
    words: list[str]
    first_lr: float
    forwards: float = 2
    rows: int = JOINT_ROWS
    steps: int = 1
    run_once: float = 0.0
    num_scores: int = 6
    is_federated: bool = True

    def whole_forwards(self, rounds: int, *, num_rows: int) -> float:
        """Forwards of single rows through the whole model in so many rounds, by the blocks that they pass.

        Args:
            rounds: Rounds that are over.
            num_rows: Training rows of all clients, which all run the blocks that run once before the first step.
        """
        if not rounds:
            return 0.0
        return num_rows * self.run_once + rounds * self.steps * self.rows * self.forwards * (1 - self.run_once)


_ALL = ["trainer=mezo", "fl.batch_size=2"]
_MEERKAT = ["trainer=meerkat", "fl.batch_size=2"]
_GRADIENT = ["estimator=backprop", "fl.local_steps=10", "fl.batch_size=2", "runtime=inline"]
METHODS = {
    "mezo": Method(
        "MeZO, one site with all rows",
        ["trainer=mezo", "fl.num_clients=1", "partition=iid", "fl.batch_size=16"],
        6.4e-5,
        is_federated=False,
    ),
    "full": Method("Full-FedZO", _ALL, 6.4e-5),
    "decomfl": Method(
        "DeComFL, 5 probes",
        ["experiment=decomfl", "fl.batch_size=2", "strategy.clients_per_round=0"],
        6.4e-5,
        forwards=6,
    ),
    "fedkseed": Method(
        "FedKSeed, T = 10, 2 clients a round",
        ["experiment=fedkseed", "fl.batch_size=8", "runtime=inline"],
        6.4e-5,
        steps=10,
    ),
    # a step of one bit has the length of the learning rate: those of plain SGD were lr times a |g| of 5 to 10
    "feedsign": Method("FeedSign", ["experiment=feedsign", "fl.num_clients=8", "fl.batch_size=2"], 3.2e-4),
    "lora": Method("LoRA-FedZO", ["trainer=lora", "fl.batch_size=2"], 2e-3),
    "meerkat": Method("Meerkat", [*_MEERKAT, f"inputs.artifact={MASK}"], 4e-4),
    "upper": Method(
        f"Meerkat from block {FIRST_LAYER}, rows kept",
        [
            *_MEERKAT,
            f"trainer.first_layer={FIRST_LAYER}",
            f"inputs.artifact={UPPER_MASK}",
            "model.lower_layers_cache_mb=256",
        ],
        4e-4,
        run_once=FIRST_LAYER / NUM_BLOCKS,
    ),
    "last_norm": Method(
        "Last norm, 4 probes, 64 rows a client, rows kept",
        [
            *("trainer=last_norm", "task.common_shift=0.3", "model.lower_layers_cache_mb=16"),
            *("estimator.num_probes=4", "fl.batch_size=64"),
        ],
        1.5,
        forwards=8,
        rows=512,
        run_once=1.0,
        num_scores=60,
    ),
    "mask_gradient": Method(
        "FedAvg by backpropagation, Meerkat's mask, T = 10",
        ["trainer=meerkat", f"inputs.artifact={MASK}", *_GRADIENT],
        4e-3,
        forwards=3,
        steps=10,
    ),
    # no weight of the base model needs a gradient
    "lora_gradient": Method(
        "FedAvg by backpropagation, LoRA with AdamW, T = 10",
        ["trainer=lora", *_GRADIENT, "estimator.local_optimizer=adamw"],
        1e-3,
        forwards=2,
        steps=10,
    ),
}
