"""A trainer from a package of its own is accepted, refused and run by the rules that fedzo's own trainers are under.

Every program is a process of its own, in which the package is found by its entry point: here the registries stay
closed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Ask = Callable[[str, object], Any]
PACKAGE = Path(__file__).resolve().parents[1] / "third_party"
LOAD = """
import json, sys
from fedzo.config.load import load
from fedzo.errors import ConfigError

def told(overrides):
    try:
        load(overrides)
    except ConfigError as error:
        return str(error)
    return ""

print(json.dumps([told(overrides) for overrides in json.loads(sys.argv[1])]))
"""
RUN = """
import json, sys
from pathlib import Path
from fedzo.commands.train import start_run
from fedzo.commands.replay import replay_run
from fedzo.config.load import load
from fedzo.zo.spaces.own_weights import OwnWeights

calls, follow = [], OwnWeights.follow
OwnWeights.follow = lambda self, *args: (calls.append(1), follow(self, *args))[1]
overrides, folder = json.loads(sys.argv[1])
start_run(load(overrides), Path(folder), overrides=[])
print(json.dumps([len(calls), replay_run(Path(folder))["space_size"]]))
"""


@pytest.fixture
def answer_of(forked: Callable[..., tuple[int, str]]) -> Ask:
    def answer(program: str, argument: object) -> Any:
        code, said = forked(program, json.dumps(argument), path=PACKAGE)
        assert code == 0, said
        return json.loads(said.splitlines()[-1])

    return answer


def test_it_is_refused_and_accepted_by_the_rules_of_fedzos_own(answer_of: Ask) -> None:
    compiled, packed, auto = "model.compile=true", "model.quantization=nf4", "model.dtype=auto"
    adam, gradip = "server_optimizer=adam", ["step_policy=vpcs", "step_policy.statistic=gradip"]
    cases: dict[str, list[str]] = {
        "compiled": ["trainer=stripes", compiled],
        "compiled mezo": ["trainer=mezo", compiled],
        "packed": ["trainer=stripes", packed],
        "packed meerkat": ["trainer=meerkat", packed],
        "gradip": ["trainer=stripes", *gradip],
        "gradip meerkat": ["trainer=meerkat", "trainer.selector=random", *gradip],
        "narrow auto": ["trainer=narrow", auto],
        "mezo auto": ["trainer=mezo", auto],
        "narrow adam": ["trainer=narrow", adam],
        "mezo adam": ["trainer=mezo", adam],
        "own rule": ["trainer=stripes", "trainer.stride=0", "trainer.eps=0"],
        "inherited rule": ["trainer=narrow", "trainer.stride=0"],
        "accepted": ["trainer=stripes", "trainer.stride=7", adam, auto, "step_policy=vpcs"],
        "frozen": ["trainer=stripes", "estimator.freeze_routing=true"],
        "narrow accepted": ["trainer=narrow", compiled],
    }
    told = dict(zip(cases, answer_of(LOAD, list(cases.values())), strict=True))

    assert {name for name, text in told.items() if not text} == {"accepted", "frozen", "narrow accepted"}
    reason = told["compiled mezo"].partition("trainer=mezo: ")[2].partition(", got")[0]
    assert told["compiled"] == told["compiled mezo"].replace("mezo", "stripes").replace(reason, "its author says so")
    assert told["packed"] == told["packed meerkat"]
    assert told["gradip"] == told["gradip meerkat"]
    for rule in ("auto", "adam"):
        assert told[f"narrow {rule}"] == told[f"mezo {rule}"].replace("trainer=mezo", "trainer=narrow")
    assert "trainer.eps must be > 0 and finite, got 0.0." in told["own rule"]
    stride = "trainer.stride must be >= 1, got 0. 1 trains them all."
    assert stride in told["own rule"]
    assert told["inherited rule"] == stride


@pytest.mark.slow
def test_its_clients_share_the_forwards_of_all_their_steps(
    answer_of: Ask,
    overrides: Callable[..., list[str]],
    lines: Callable[[Path, str], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    settings = overrides("trainer=stripes", "fl.local_steps=3", "fl.rounds=2")
    alone, together = tmp_path / "alone", tmp_path / "together"

    followed_alone, size = answer_of(RUN, [settings, str(alone)])
    followed, _ = answer_of(RUN, [[*settings, "runtime.batch_clients=true"], str(together)])

    assert followed_alone == 0 < followed
    assert size > 100
    separate, joint = (
        np.array([entry["g"] for line in lines(folder, "audit.jsonl") for entry in line["clients"]])
        for folder in (alone, together)
    )
    assert np.abs(separate).max() > 0.05
    np.testing.assert_allclose(joint, separate, atol=2e-3)
