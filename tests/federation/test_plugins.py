"""Estimators, server optimizers and the clip in whole federations: replay, resume, absence, budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.commands.replay import replay_run
from fedzo.commands.resume import resume_run
from fedzo.commands.run_folder import rebuild
from fedzo.config.load import load
from fedzo.errors import ConfigError
from fedzo.evaluate import EVALUATORS, EvaluatorConfig, Measure
from fedzo.fl.client import scalar_update
from fedzo.fl.clip import announced_bound
from fedzo.fl.log_store import RunStore
from fedzo.fl.server.step_policy import STEP_POLICIES, Plan, StepPolicyConfig, StepPolicyTraits
from fedzo.testing.tiny_models import save_tiny_model

Run = Callable[..., Path]
Lines = Callable[[Path, str], list[dict[str, Any]]]

RULES = {
    "momentum": ("server_optimizer=momentum", "server_optimizer.lr=0.01", "server_optimizer.nesterov=true"),
    "adam": (
        "server_optimizer=adam",
        "server_optimizer.lr=0.01",
        "server_optimizer.weight_decay=0.1",
        "server_optimizer.schedule=cosine",
    ),
    "scaffold": ("server_optimizer=scaffold", "server_optimizer.lr=0.01"),
    "feddyn": (
        "server_optimizer=feddyn",
        "server_optimizer.lr=0.01",
        "server_optimizer.alpha=5",
        "server_optimizer.schedule=linear",
    ),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_killed_and_resumed_is_the_unbroken_one_and_replays_to_its_digest(
    run: Run, lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, steps: int
) -> None:
    settings = (
        *RULES[rule],
        f"fl.local_steps={steps}",
        "fl.rounds=5",
        "faults.absent=['1@2','2@3']",
        "strategy.clip_factor=1.5",
        "evaluation.every_rounds=0",
        "fl.hash_every=2",
    )
    unbroken = run(*settings)
    commit = RunStore.commit

    def dies(self: RunStore, record: Any, **kwargs: Any) -> None:
        if record.round == 3:
            raise KeyboardInterrupt  # the replica has moved, the log has not
        commit(self, record, **kwargs)

    monkeypatch.setattr(RunStore, "commit", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*settings)
    monkeypatch.setattr(RunStore, "commit", commit)
    broken = tmp_path / "run1"
    assert len(lines(broken, "public.jsonl")) == 3
    resume_run(broken)

    for name in ("public.jsonl", "audit.jsonl"):
        assert (broken / name).read_bytes() == (unbroken / name).read_bytes()
    assert replay_run(unbroken)["digest"] == lines(unbroken, "public.jsonl")[-1]["digest"]
    assert lines(unbroken, "public.jsonl")[2]["attendance"] == [0, 2, 3]


@pytest.mark.parametrize("rule", RULES)
def test_transport_by_values_carries_the_moments_and_gives_the_same_run(run: Run, rule: str) -> None:
    by_log = run(*RULES[rule], "fl.local_steps=2")
    by_values = run(*RULES[rule], "fl.local_steps=2", "fl.transport=values")

    assert (by_log / "public.jsonl").read_bytes() == (by_values / "public.jsonl").read_bytes()


def test_the_log_of_momentum_leads_where_a_plain_loop_leads(run: Run, lines: Lines) -> None:
    from fedzo.zo.directions import direction, stream_key

    folder = run(
        "server_optimizer=momentum",
        "server_optimizer.lr=0.02",
        "server_optimizer.momentum=0.5",
        "server_optimizer.weight_decay=1.0",
    )

    theta = rebuild(folder, rounds=0).replica.space.values().astype(np.float64)
    m = np.zeros_like(theta)
    for line in lines(folder, "public.jsonl"):
        m = 0.5 * m + line["c"][0][0][0] * direction(stream_key(0, round=line["round"]), theta.size)
        theta = theta * (1 - 0.02) - 0.02 * m

    assert rebuild(folder, rounds=3).replica.space.values() == pytest.approx(theta, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "estimator",
    [
        ("estimator=one_sided",),
        ("estimator=one_sided", "estimator.baseline=mean", "estimator.num_probes=3"),
        ("estimator=one_sided", "estimator.baseline=leave_one_out", "estimator.num_probes=3"),
        ("estimator=fzoo", "estimator.num_probes=4", "server_optimizer=adam", "server_optimizer.lr=0.01"),
        ("estimator.freeze_routing=true",),
        ("estimator=fzoo", "estimator.freeze_routing=true", "server_optimizer.lr=1e-5", "fl.local_steps=2"),
        (
            "estimator=fzoo",
            "trainer=mezo",
            "server_optimizer.lr=1e-3",
            "server_optimizer.weight_decay=0.1",
            "fl.local_steps=2",
        ),
    ],
    ids=" ".join,
)
def test_every_estimator_runs_within_its_budget_and_replays(
    run: Run, lines: Lines, overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, estimator: Any
) -> None:
    calls: list[int] = []
    original = scalar_update.example_losses
    monkeypatch.setattr(scalar_update, "example_losses", lambda *a, **k: calls.append(1) or original(*a, **k))

    folder = run(*estimator, "fl.rounds=2", "evaluation.central=false", "evaluation.federated_every_rounds=-1")

    config = load(overrides(*estimator))
    from fedzo.zo.estimator import build_estimator

    a_step = build_estimator(config.estimator).forwards_per_step(config.estimator.num_probes)
    assert len(calls) == 2 * 4 * config.fl.local_steps * a_step
    assert replay_run(folder)["digest"] == lines(folder, "public.jsonl")[-1]["digest"]
    scalars = np.array([entry["g"] for line in lines(folder, "audit.jsonl") for entry in line["clients"]])
    assert np.abs(scalars).min() > 0


def test_a_mixture_of_experts_trains_with_its_routing_held_still(run: Run, lines: Lines, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "mixtral", "mixtral")
    frozen, plain = (
        run(f"model.name={model}", "trainer=mezo", f"estimator.freeze_routing={freeze}", "fl.rounds=1")
        for freeze in ("true", "false")
    )

    assert replay_run(frozen)["digest"] == lines(frozen, "public.jsonl")[-1]["digest"]
    spread = [
        np.ptp([entry["g"] for entry in lines(folder, "audit.jsonl")[0]["clients"]]) for folder in (frozen, plain)
    ]
    assert 0 < spread[0] < spread[1]  # no jumps of the loss over 2 eps


def test_clients_step_with_the_clipped_scalar_that_they_send(
    run: Run, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped: list[tuple[int, int, float]] = []
    original = scalar_update.ScalarUpdate.take

    def spy(self: Any, space: Any, request: Any, g: Any, **rest: Any) -> None:
        stepped.append((request.round, request.client, float(g[0])))
        original(self, space, request, g, **rest)

    monkeypatch.setattr(scalar_update.ScalarUpdate, "take", spy)

    folder = run("strategy.clip_factor=1.01", "strategy.clip_rounds=2", "fl.rounds=4", "fl.local_steps=2")

    audit = lines(folder, "audit.jsonl")
    sent = [(a["round"], e["client"], g[0]) for a in audit for e in a["clients"] for g in e["g"]]
    assert sent == stepped
    with RunStore(folder) as store:
        bounds = [announced_bound(store.audit[:r], store.records[:r], factor=1.01, rounds=2) for r in range(4)]
    assert bounds[0] == 0
    for round, _, g in sent:
        assert round == 0 or abs(g) <= bounds[round]
    clipped = [sum(abs(g) == bounds[r] for round, _, g in sent if round == r) for r in range(4)]
    metrics = [line for line in lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    assert [line["clipped"] for line in metrics] == clipped
    assert [line["clip_bound"] or 0 for line in metrics] == bounds
    assert sum(clipped) > 0
    assert all(not line["refused"] for line in audit)


def test_moments_for_all_weights_are_refused_before_any_work(overrides: Callable[..., list[str]]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            overrides(
                "trainer=mezo",
                "server_optimizer=adam",
                "server_optimizer.beta1=1.0",
                "estimator=fzoo",
                "estimator.num_probes=1",
            )
        )

    text = str(caught.value)
    for part in (
        "server_optimizer must be sgd for trainer=mezo: the others keep float32 numbers for every weight",
        "got 'adam'. Write server_optimizer=sgd, or train fewer values",
        "server_optimizer.beta1 must be >= 0 and < 1, got 1.0",
        "estimator.num_probes must be >= 2, got 1",
    ):
        assert part in text


def test_a_step_policy_that_needs_labels_gets_them_before_the_first_round(
    run: Run, lines: Lines, register: Callable[..., None]
) -> None:
    @dataclass(kw_only=True, slots=True)
    class ByLabelsConfig(StepPolicyConfig):
        """Theirs."""

        @property
        def traits(self) -> StepPolicyTraits:
            return StepPolicyTraits(needs_labels=True)

    class ByLabels:
        def plan(self, audit: Any, label_counts: Any) -> Plan:
            return Plan({client: min(len(label_counts[client]), 2) for client in range(4)})

    register("step_policy", "by_labels", STEP_POLICIES, ByLabelsConfig, lambda config, **run: ByLabels())

    folder = run("step_policy=by_labels", "fl.local_steps=2")

    assert lines(folder, "metrics.jsonl")[-1]["kind"] == "summary"


def test_an_evaluator_that_loses_its_range_ends_no_run_and_takes_no_other_score_along(
    run: Run, lines: Lines, register: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    @dataclass(kw_only=True, slots=True)
    class LostConfig(EvaluatorConfig):
        """Theirs."""

    class Lost:
        def measure(self, task: Any) -> Measure:
            return Measure(metric="lost")

        def evaluate(self, loaded: Any, examples: Any, task: Any, **limits: Any) -> Any:
            calls.append(len(examples))
            value = 0.5 if len(calls) <= 2 else float("nan")  # the test and dev rows before training
            return self.measure(task).score(value, num_examples=len(examples))

    register("evaluators", "lost", EVALUATORS, LostConfig, lambda config: Lost())

    folder = run("evaluators=[answers,lost]", "partition.holdout=0.25")

    told, both = lines(folder, "metrics.jsonl"), ("answers", "lost")
    scored = {name: [s["round"] for s in told if s.get("evaluator") == name and s["kind"] == "score"] for name in both}
    assert scored["lost"] == [0, 0]
    assert set(scored["answers"]) >= {0, 2, 3}
    assert [s["evaluator"] for s in told if s["kind"] == "federated_score"] == ["answers"]
    assert (told[-1]["kind"], told[-1]["after"]["evaluator"]) == ("summary", "answers")
    assert "after round 2: dev was not scored by lost: evaluators.lost must have a value of 0 to 1, got nan" in (
        caplog.text
    )
