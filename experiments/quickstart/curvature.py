"""What bounds the learning rate of the quickstart: how the loss of its training rows curves; adds to claims.json.

    python experiments/quickstart/curvature.py    # two minutes on 2 cores

With two answers of one token a row's loss is that of its margin m = w * x, which is linear in the weights w of the last
norm. So the second derivatives are known in closed form: the mean of p (1 - p) x x' over rows, once common_shift has
taken its part of the mean from x. The largest eigenvalue bounds the learning rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedzo.bench.claims import Claims
from fedzo.config.load import load
from fedzo.data.encode import encode
from fedzo.data.rows import SimulatedRows
from fedzo.models.forwards import Planning, run_texts
from fedzo.models.kept_rows import Read
from fedzo.models.memory import TOKENS_PER_BATCH
from fedzo.models.plan import forward_cost
from fedzo.run.peer import open_model

HERE = Path(__file__).parent


@torch.inference_mode()
def main() -> None:
    launch = load(["experiment=quickstart"])
    loaded = open_model(launch.site(), launch.task.max_length)
    rows = SimulatedRows(launch.data, launch.split, launch.task, launch.partition, launch.fl.num_clients, launch.seed)
    examples = encode(rows.splits.train, launch.task, tokenizer=loaded.tokenizer, max_length=launch.task.max_length)
    planning = Planning(TOKENS_PER_BATCH, forward_cost(loaded.device))
    texts = [Read(example.prompt, 1) for example in examples]
    hidden = torch.cat([states for _, states in run_texts(loaded, texts, planning)]).double().numpy()

    model: Any = loaded.model
    first, second = (model.lm_head.weight[candidate[0]].double().numpy() for candidate in examples[0].candidates)
    weight = model.model.norm.weight.double().numpy()
    features = hidden / weight * (second - first)  # [rows, H]: a margin is their product with the weights
    claims = Claims(command="python experiments/quickstart/curvature.py")
    for factor in (1.0, launch.task.common_shift):
        largest, next_one = eigenvalues(features, weight, factor)[:2]
        claims.add(f"common_shift {factor:g}: largest eigenvalue", largest, "")
        claims.add(f"common_shift {factor:g}: next eigenvalue", next_one, "")
    claims.write(HERE / "claims.json")
    claims.show()


def eigenvalues(features: np.ndarray, weight: np.ndarray, factor: float) -> np.ndarray:
    """Of the second derivatives of the mean loss at ``weight``, all rows being one batch; the largest first."""
    damped = features - (1 - factor) * features.mean(0)
    chance = 1 / (1 + np.exp(-damped @ weight))
    second = (damped * (chance * (1 - chance))[:, None]).T @ damped / len(damped)
    return np.linalg.eigvalsh(second)[::-1]


if __name__ == "__main__":
    main()
