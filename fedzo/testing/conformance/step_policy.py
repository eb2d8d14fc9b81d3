"""What every step policy must do: decide by the log alone, as a run that is resumed has nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedzo.errors import PluginError
from fedzo.fl.server.step_policy import StepPolicy
from fedzo.fl.server.step_policy.plan import checked_plan
from fedzo.records.log import ScalarAuditLine
from fedzo.records.scores import known
from fedzo.testing.conformance.bits import global_generators, must

LabelCounts = Mapping[int, Mapping[str, int]]


def check_step_policy(
    make: Callable[[], StepPolicy],
    lines: Sequence[ScalarAuditLine],
    *,
    label_counts: LabelCounts,
    num_clients: int,
    max_steps: int,
) -> None:
    """Check that a step policy keeps the contract of ``fedzo.fl.server.step_policy.StepPolicy``.

    - Its plans have steps of every client, from 1 to ``max_steps``.
    - After each round a policy that has seen the log grow plans as a new one does, and the same when asked again.
    - The global random generators are neither used nor needed.

    Args:
        make: Makes the policy, for example
            ``lambda: STEP_POLICIES.build(CusumConfig(), num_clients=3, local_steps=2, run_seed=0)``.
        lines: Of the audit log, in their order (``fedzo.testing.logs.audit_line``): such that the policy decides
            otherwise in some round.
        label_counts: Rows by label of each client, for a policy that reads them.
        num_clients: K.
        max_steps: The most local steps that a client takes in one round: ``max_steps`` of the policy's config.

    Raises:
        AssertionError: The first rule that does not hold, with what was seen.
    """

    def decided(policy: StepPolicy, log: Sequence[ScalarAuditLine]) -> object:
        try:
            plan = checked_plan(policy, log, label_counts, num_clients=num_clients, max_steps=max_steps)
        except PluginError as error:
            raise AssertionError(str(error)) from error
        verdicts = {  # with None for nan, which is not equal to itself
            client: (found.flagged, known(found.strength), {name: known(x) for name, x in found.statistics.items()})
            for client, found in plan.verdicts.items()
        }
        return plan.steps, plan.calibration, verdicts, plan.windows, plan.fallback

    log: list[ScalarAuditLine] = []  # one object in all rounds, as in a run
    with global_generators(1):
        policy = make()
    for length in range(len(lines) + 1):
        with global_generators(1):
            first, again = decided(policy, log), decided(policy, log)
        with global_generators(2):
            resumed = decided(make(), [*log])
        must(again == first, f"asked twice after {length} rounds plan must give the same, got {first}, then {again}")
        must(
            resumed == first,
            f"the plan after {length} rounds must follow from the log alone, so that a resumed run decides the same: "
            f"a policy that saw the log grow gave {first}, a new one {resumed}",
        )
        log += lines[length : length + 1]
