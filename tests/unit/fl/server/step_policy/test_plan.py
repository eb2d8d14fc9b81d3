"""From verdicts to steps, and what each step_policy makes of an audit log."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedzo.errors import ConfigError, RunFolderError
from fedzo.fl.config import FlConfig
from fedzo.fl.server.step_policy import STEP_POLICIES
from fedzo.fl.server.step_policy.baselines import NoStepPolicyConfig, OracleConfig, RandomConfig
from fedzo.fl.server.step_policy.cusum import CusumConfig
from fedzo.fl.server.step_policy.plan import EarlyStop, EarlyStopConfig, Plan, StepPolicyConfig, Verdict, describe, news
from fedzo.fl.server.step_policy.statistics import Statistic
from fedzo.fl.server.step_policy.vpcs import Combine, VpcsConfig, VpcsTest, evidence, judge
from fedzo.records.decode import decode_json, to_json
from fedzo.records.log import ScalarAuditLine
from fedzo.records.metrics import StepDecision
from fedzo.testing.logs import audit_line

PHASES = {"calibration_steps": 4, "initial_steps": 2, "later_steps": 2}


def build(config: StepPolicyConfig, *, num_clients: int = 4, local_steps: int = 8, run_seed: int = 3) -> Any:
    return STEP_POLICIES.build(config, num_clients=num_clients, local_steps=local_steps, run_seed=run_seed)


def line(paths: dict[int, list[float]], *, round: int = 0, lost: int | None = None) -> ScalarAuditLine:
    dropped = {k: [[k == lost]] * len(v) for k, v in paths.items()}
    return audit_line({k: [[x] for x in v] for k, v in paths.items()}, dropped=dropped, round=round)


def read_back(log: list[ScalarAuditLine]) -> list[ScalarAuditLine]:
    return [decode_json(ScalarAuditLine, to_json(each), where="audit", error=RunFolderError) for each in log]


# --- steps


def test_flagged_clients_stop_early_and_the_others_do_not() -> None:
    stop = EarlyStop(EarlyStopConfig(early_steps=2), num_clients=4, local_steps=10)

    plan = stop({0: Verdict(False), 2: Verdict(True)})

    assert plan.steps == {0: 10, 1: 10, 2: 2, 3: 10}
    assert (plan.flagged, plan.fallback) == ([2], False)


def test_a_graded_stop_halves_once_more_with_every_doubling_of_the_strength() -> None:
    stop = EarlyStop(EarlyStopConfig(early_steps=3, max_share=1), num_clients=7, local_steps=40, graded=True)

    plan = stop(
        dict(enumerate(Verdict(True, strength) for strength in (1.0, 1.99, 2.0, 4.1, 8.0, 1e300, float("inf"))))
    )

    assert plan.steps == {0: 20, 1: 20, 2: 10, 3: 5, 4: 3, 5: 3, 6: 3}


@pytest.mark.parametrize(("share", "clients"), [(0.29, 100), (0.58, 50), (0.7, 90)])
def test_exactly_the_allowed_share_is_no_fallback(share: float, clients: int) -> None:
    """Each product lies a little below its whole number in float64."""
    stop = EarlyStop(EarlyStopConfig(max_share=share), num_clients=clients, local_steps=10)
    most = round(share * clients)

    assert not stop({k: Verdict(k < most) for k in range(clients)}).fallback
    assert stop({k: Verdict(k <= most) for k in range(clients)}).fallback


@pytest.mark.parametrize(("flagged", "fallback"), [(2, False), (3, True)])
def test_above_the_largest_share_all_clients_take_fewer_steps(flagged: int, fallback: bool) -> None:
    verdicts = {client: Verdict(client < flagged) for client in range(4)}

    plan = EarlyStop(EarlyStopConfig(), num_clients=4, local_steps=10)(verdicts)
    chosen = EarlyStop(EarlyStopConfig(fallback_steps=3), num_clients=4, local_steps=10)(verdicts)

    assert plan.fallback is fallback
    assert plan.steps == (dict.fromkeys(range(4), 5) if fallback else {0: 1, 1: 1, 2: 10, 3: 10})
    assert chosen.steps[3] == (3 if fallback else 10)


def test_at_one_local_step_nothing_changes() -> None:
    verdicts = {0: Verdict(True), 1: Verdict(True), 2: Verdict(True)}

    for graded in (False, True):
        plan = EarlyStop(EarlyStopConfig(), num_clients=4, local_steps=1, graded=graded)(verdicts)
        assert set(plan.steps.values()) == {1}


# --- vpcs


LOUD, FALLING, SOFT = [8.0, 8.0, 8.0, 8.0], [8.0, 8.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]


def test_the_first_round_calibrates_and_the_others_follow_from_it_alone() -> None:
    step_policy = build(VpcsConfig(**PHASES))
    calibration = line({0: LOUD, 1: LOUD, 2: FALLING, 3: SOFT})

    first = step_policy.plan([], {})
    second = step_policy.plan([calibration], {})
    later = step_policy.plan(read_back([calibration, line({0: SOFT, 1: SOFT}, round=1)]), {})

    assert (first.calibration, first.steps, first.verdicts) == (True, dict.fromkeys(range(4), 4), {})
    assert (second.calibration, second.flagged) == (False, [2, 3])
    assert second.steps == {0: 8, 1: 8, 2: 1, 3: 1}
    assert second.windows == {"initial": (0, 2), "later": (2, 4)}
    assert later == second


def test_without_a_limit_most_clients_may_be_stopped_early() -> None:
    config = VpcsConfig(tests=[VpcsTest.ratio, VpcsTest.quiet], max_share=1, **PHASES)

    plan = build(config).plan([line({0: LOUD, 1: FALLING, 2: FALLING, 3: FALLING})], {})

    assert (plan.flagged, plan.fallback) == ([1, 2, 3], False)
    assert plan.steps == {0: 8, 1: 1, 2: 1, 3: 1}


def test_the_ratio_finds_the_client_that_falls_and_the_level_the_one_that_was_always_soft() -> None:
    paths = {k: np.array(v) for k, v in enumerate((LOUD, LOUD, FALLING, SOFT))}

    verdicts = judge(paths, VpcsConfig(**PHASES))

    assert [verdict.statistics["ratio"] for verdict in verdicts.values()] == [1.0, 1.0, 16.0, 1.0]
    # sigma is 0.1 times the median of 8, 8, 8, 1
    assert [verdict.statistics["quiet"] for verdict in verdicts.values()] == [0.0, 0.0, 1.0, 0.0]
    assert [verdict.statistics["level"] for verdict in verdicts.values()] == [1 / 8, 1 / 8, 16.0, 8.0]
    for tests, flagged in (
        ([VpcsTest.ratio], [2]),
        ([VpcsTest.quiet], [2]),
        ([VpcsTest.level], [2, 3]),
        ([VpcsTest.ratio, VpcsTest.level], [2, 3]),
    ):
        found = judge(paths, VpcsConfig(tests=tests, **PHASES))
        assert [client for client, verdict in found.items() if verdict.flagged] == flagged, tests


@pytest.mark.parametrize(
    ("ratio", "quiet", "level", "both", "either"),
    [
        (3.1, 0.51, 0.0, True, True),
        (3.0, 0.51, 0.0, False, True),  # a threshold has to be exceeded
        (9.0, 0.0, 0.0, False, True),
        (0.0, 0.9, 0.0, False, True),
        (0.0, 0.0, 2.1, True, True),
        (3.0, 0.5, 2.0, False, False),
        (float("nan"), 0.9, 0.0, False, True),
        (float("nan"), float("nan"), float("nan"), False, False),
    ],
)
def test_ratio_and_quiet_are_combined_and_level_flags_alone(
    ratio: float, quiet: float, level: float, both: bool, either: bool
) -> None:
    statistics = {"ratio": ratio, "quiet": quiet, "level": level}

    assert (evidence(statistics, VpcsConfig()) > 1) is both
    assert (evidence(statistics, VpcsConfig(combine=Combine.either)) > 1) is either


def test_evidence_is_in_units_of_the_threshold() -> None:
    statistics = {"ratio": 9.0, "quiet": 0.8, "level": 1.0}

    assert evidence(statistics, VpcsConfig()) == 0.8 / 0.5
    assert evidence(statistics, VpcsConfig(combine=Combine.either)) == 3.0
    assert evidence(statistics, VpcsConfig(tests=[VpcsTest.ratio])) == 3.0
    assert evidence(statistics, VpcsConfig(tests=[VpcsTest.level], level_threshold=0.25)) == 4.0


def test_a_client_whose_probes_were_all_dropped_is_not_judged() -> None:
    calibration = line({0: LOUD, 1: [0.0] * 4, 2: LOUD}, lost=1)

    plan = build(VpcsConfig(**PHASES), num_clients=3).plan([calibration], {})

    assert plan.flagged == []
    record = news(plan, None, round=1, last=False, seconds=0.0, local_steps=8)
    assert record is not None
    assert record.clients[1].statistics == {"ratio": None, "quiet": None, "level": None}


def test_gradip_needs_a_gradient() -> None:
    config = VpcsConfig(statistic=Statistic.gradip, **PHASES)

    with pytest.raises(ConfigError, match=r"step_policy\.statistic=gradip must find a gradient .* trainer=meerkat"):
        build(config).plan([line({0: LOUD})], {})
    with pytest.raises(ConfigError, match="must find a gradient"):
        config.check_start(FlConfig(local_steps=2), has_gradient=False)
    config.check_start(FlConfig(local_steps=2), has_gradient=True)


def test_one_local_step_leaves_nothing_to_stop_and_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    NoStepPolicyConfig().check_start(FlConfig(local_steps=1), has_gradient=False)
    CusumConfig().check_start(FlConfig(local_steps=2), has_gradient=False)
    assert caplog.text == ""

    CusumConfig().check_start(FlConfig(local_steps=1), has_gradient=False)

    assert "fl.local_steps is 1" in caplog.text
    assert "Raise fl.local_steps" in caplog.text


def test_a_run_of_nothing_but_the_calibration_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    VpcsConfig().check_start(FlConfig(local_steps=2, rounds=2), has_gradient=False)
    CusumConfig().check_start(FlConfig(local_steps=2, rounds=1), has_gradient=False)
    assert caplog.text == ""

    VpcsConfig().check_start(FlConfig(local_steps=2, rounds=1), has_gradient=False)

    assert "the model will not move. Raise fl.rounds." in caplog.text


def test_the_most_steps_of_a_round_are_those_of_the_calibration() -> None:
    assert VpcsConfig().max_steps(FlConfig(local_steps=1)) == 100
    assert VpcsConfig().max_steps(FlConfig(local_steps=200)) == 200
    assert CusumConfig().max_steps(FlConfig(local_steps=3)) == 3


# --- cusum


def rounds(count: int, *, quiet: int = 3, by: float = 1e-9, steps: int = 1) -> list[ScalarAuditLine]:
    return [line({k: [by if k == quiet else 1.0] * steps for k in range(4)}, round=round) for round in range(count)]


def test_a_silent_client_is_flagged_once_its_sum_is_above_the_threshold_and_stays_so() -> None:
    # each silent step counts 2 - 1; the sum is 8 after 8 steps and above it after 9
    flagged = [build(CusumConfig()).plan(rounds(count), {}).flagged for count in (0, 8, 9)]
    assert flagged == [[], [], [3]]

    recovered = [*rounds(9), *rounds(50, by=100.0)]
    plan = build(CusumConfig()).plan(recovered, {})

    assert plan.flagged == [3]
    assert plan.verdicts[3].statistics == {"cusum": 9.0}
    assert plan.steps == {0: 8, 1: 8, 2: 8, 3: 1}


def test_a_round_of_many_steps_counts_as_as_many_rounds_of_one() -> None:
    assert build(CusumConfig()).plan(rounds(2, steps=3), {}) == build(CusumConfig()).plan(rounds(6), {})


def test_the_sums_kept_between_rounds_are_those_of_the_whole_log() -> None:
    rng = np.random.default_rng(0)
    log: list[ScalarAuditLine] = []
    kept = build(CusumConfig(drift=0.2, threshold=2.0))
    for round in range(40):
        took = {k: int(rng.integers(1, 4)) for k in rng.permutation(5)[:4].tolist()}
        log.append(line({k: rng.normal(size=n).tolist() for k, n in took.items() if k < 4}, round=round))
        fresh = build(CusumConfig(drift=0.2, threshold=2.0))
        assert kept.plan(log, {}) == fresh.plan(read_back(log), {})
    assert kept.plan(log, {}).flagged
    assert kept.plan([], {}).flagged == []
    assert kept.plan(log[:7], {}) == build(CusumConfig(drift=0.2, threshold=2.0)).plan(log[:7], {})


def test_of_a_log_that_lies_on_the_disk_each_line_is_asked_for_once_and_alone() -> None:
    """All that are new to a resumed server would not fit in memory."""
    asked: list[int] = []

    class OnDisk(list[ScalarAuditLine]):
        def __iter__(self) -> Any:
            raise AssertionError("all lines are asked for at once")

        def __getitem__(self, number: Any) -> Any:
            asked.append(number)
            assert isinstance(number, int)
            return super().__getitem__(number)

    for config, once in ((CusumConfig(), [0, 1, 2, 3, 4, 5]), (VpcsConfig(**PHASES), [0])):
        asked.clear()
        step_policy, log = build(config), OnDisk([line(dict.fromkeys(range(4), LOUD), round=r) for r in range(4)])
        for round in (4, 5, 6):
            step_policy.plan(log, {})
            log.append(line(dict.fromkeys(range(4), LOUD), round=round))

        assert asked == once


def test_what_all_clients_share_flags_nobody() -> None:
    """The model learns: everybody's |g| falls a thousandfold, and each direction has a factor of its own."""
    rng = np.random.default_rng(1)
    own = rng.uniform(0.7, 1.4, size=(300, 4))
    common = 10.0 ** -np.linspace(0, 3, 300) * np.abs(rng.normal(size=300))
    log = [line({k: [float(common[r] * own[r, k])] for k in range(4)}, round=r) for r in range(300)]

    assert build(CusumConfig()).plan(log, {}).flagged == []


# --- baselines


def test_random_flags_as_many_as_told_by_the_run_seed_alone() -> None:
    plans = [build(RandomConfig(num_flagged=2), num_clients=6, run_seed=seed).plan([], {}) for seed in range(200)]

    assert plans[7] == build(RandomConfig(num_flagged=2), num_clients=6, run_seed=7).plan(rounds(3), {})
    assert {len(plan.flagged) for plan in plans} == {2}
    counts = np.bincount([client for plan in plans for client in plan.flagged], minlength=6)
    assert (np.abs(counts - 200 / 3) < 5 * np.sqrt(200 * 2 / 9)).all()


def test_random_is_not_the_clients_that_a_sampling_of_the_same_seed_takes() -> None:
    from fedzo.fl.server.turnout import sampling_order

    chosen = build(RandomConfig(num_flagged=5), num_clients=20).plan([], {}).flagged

    order = sampling_order(run_seed=3, round=0, num_clients=20, connected=range(20))
    assert set(chosen) != set(order[:5])


def test_the_oracle_goes_by_the_largest_label_share() -> None:
    labels = {0: {"0": 5, "1": 5}, 1: {"0": 9, "1": 1}, 2: {"1": 7}, 3: {}}

    plan = build(OracleConfig()).plan([], labels)

    assert plan.flagged == [1, 2]
    assert [plan.verdicts[k].statistics["label_share"] for k in range(4)] == [0.5, 0.9, 1.0, 0.0]


def test_none_asks_all_steps_of_all_and_has_nothing_to_tell() -> None:
    plan = build(NoStepPolicyConfig()).plan(rounds(2), {})

    assert plan == Plan(dict.fromkeys(range(4), 8))
    assert news(plan, None, round=0, last=True, seconds=0.0, local_steps=8) is None


# --- what is told


def test_only_what_changed_is_told_and_in_the_last_round_the_statistics(caplog: pytest.LogCaptureFixture) -> None:
    def tell(count: int, told: Any, *, last: bool = False) -> Any:
        plan = build(CusumConfig()).plan(rounds(count), {})
        return news(plan, told, round=count, last=last, seconds=1.5, local_steps=8)

    first = tell(0, None)
    assert first is not None
    assert tell(5, first) is None
    final = tell(5, first, last=True)
    assert [row.statistics["cusum"] for row in final.clients] == [0.0, 0.0, 0.0, 5.0]
    assert tell(5, final, last=True) is None
    flagged = tell(9, first)
    assert flagged == decode_json(StepDecision, to_json(flagged), where="metrics", error=RunFolderError)
    assert [row.flagged for row in flagged.clients] == [False, False, False, True]
    assert tell(10, flagged) is None
    tell(12, tell(10, first), last=True)  # its peak has grown: told in the metrics, but no decision
    words = "from round {} on: stopped early: client 3 after step 1 (cusum {})"
    assert [record.getMessage() for record in caplog.records] == [words.format(9, 9), words.format(10, 10)]


def test_a_calibration_that_finds_nobody_says_so(caplog: pytest.LogCaptureFixture) -> None:
    plan = build(VpcsConfig(**PHASES)).plan([line(dict.fromkeys(range(4), LOUD))], {})

    assert news(plan, None, round=1, last=False, seconds=0.0, local_steps=8) is not None
    assert [record.getMessage() for record in caplog.records] == ["from round 1 on: no client is flagged"]


def test_who_could_not_be_judged_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Clients 2 and 3 missed the calibration; of two left, none can be compared with a median of the others."""
    tests = [VpcsTest.ratio, VpcsTest.level]
    build(VpcsConfig(tests=tests, **PHASES)).plan([line(dict.fromkeys(range(2), LOUD))], {})

    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "the test ratio could not judge client 2, 3:" in told[0]
    assert "the test level could not judge any client:" in told[1]


def test_a_calibration_that_lost_its_initial_phase_has_no_quiet_test(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody has a first step that sigma could be a share of, though all have later ones."""
    g, dropped = [[0.0], [0.0], [8.0], [8.0]], [[True], [True], [False], [False]]
    calibration = audit_line(dict.fromkeys(range(4), g), dropped=dict.fromkeys(range(4), dropped))

    plan = build(VpcsConfig(tests=[VpcsTest.quiet], **PHASES)).plan([calibration], {})

    assert all(np.isnan(verdict.statistics["quiet"]) for verdict in plan.verdicts.values())
    assert plan.flagged == []
    assert "the test quiet could not judge any client:" in caplog.text


@pytest.mark.parametrize(
    ("steps", "fallback", "words"),
    [
        ({0: 8, 1: 1, 2: 4}, False, "stopped early: client 1 after step 1, client 2 after step 4"),
        ({0: 8, 1: 8, 2: 8}, False, "flagged: 1, 2; they take as many steps as the others"),
        (
            {0: 4, 1: 4, 2: 4},
            True,
            "flagged: 1, 2; this is more than step_policy.max_share, so all clients take 4 of 8 steps",
        ),
        (
            {0: 8, 1: 8, 2: 8},
            True,
            "flagged: 1, 2; this is more than step_policy.max_share, so nobody takes fewer steps",
        ),
    ],
)
def test_a_decision_in_words(steps: dict[int, int], fallback: bool, words: str) -> None:
    plan = Plan(steps, verdicts={1: Verdict(True), 2: Verdict(True)}, fallback=fallback)

    assert describe(plan, local_steps=8) == words


def test_a_decision_is_taken_once_for_a_calibration_and_anew_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedzo.fl.server.step_policy import vpcs

    judged = []
    monkeypatch.setattr(vpcs, "judge", lambda paths, config: judged.append(paths) or judge(paths, config))
    step_policy = build(VpcsConfig(**PHASES))
    log = [line({0: LOUD, 1: LOUD, 2: FALLING, 3: SOFT})]
    for round in range(1, 5):
        assert step_policy.plan(log, {}).flagged == [2, 3]
        log.append(line({0: SOFT}, round=round))

    assert len(judged) == 1
    assert step_policy.plan([line(dict.fromkeys(range(4), LOUD))], {}).flagged == []
