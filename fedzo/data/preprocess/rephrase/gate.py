"""Whether a judge can be trusted: its verdicts on pairs whose answer is known, in both orders of the verdicts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedzo.data.files import Row
from fedzo.data.partition.base import shuffled
from fedzo.data.preprocess.backend import USUAL_TOKENS, Completion, EndpointError, RowFault, RowReason
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.data.preprocess.rephrase.course import Course
from fedzo.data.preprocess.rephrase.judge import Verdict, verdict_of
from fedzo.data.preprocess.rephrase.pairs import KINDS, SAME_KINDS, Pair, make_pairs
from fedzo.data.preprocess.rephrase.prompts import ORDERS, Prompts
from fedzo.data.preprocess.rephrase.results import row_digest
from fedzo.errors import ConfigError
from fedzo.records.decode import read_record, to_json
from fedzo.records.folder import make_folder, replace_file
from fedzo.records.rephrase import Interval, JudgeTest, PairCounts
from fedzo.system import OnProgress

_FOLDER, _TESTS = "judges", "judge_tests"
_Z = 1.959963984540054  # of a 95 % interval
Verdicts = tuple[Verdict | RowFault | None, ...]


def judge_digest(prompts: Prompts, model: str) -> str:
    """Digest of what a test holds for: the judge's model and all that it reads beside a row.

    Args:
        prompts: What it reads.
        model: ``Backend.fingerprint`` of its model: other weights under the same name are another judge.
    """
    return hashlib.sha256(json.dumps([model, prompts.judge_digest]).encode()).hexdigest()


def judge_test_digest(test: JudgeTest) -> str:
    """Digest of one test of a judge."""
    return hashlib.sha256(to_json(test).encode()).hexdigest()


def test_judge(course: Course, rows: Sequence[Row], *, most: int, on_progress: OnProgress) -> JudgeTest:
    """Test a judge on pairs from real rows, which a fixed seed draws: the first rows of a file are often of one label.

    Args:
        course: Whose judge.
        rows: Rows of its task.
        most: Pairs of each kind.
        on_progress: Told of calls done and in all.

    Raises:
        ConfigError: A row does not fit the task, or a prompt the context: before the first call.
        EndpointError: It cannot be asked.
    """
    attempts = course.check_rows(rows)
    prompts = course.prompts
    drawn = [rows[at] for at in shuffled(len(rows), seed=0) if not attempts[row_digest(rows[at])].is_too_long]
    pairs = make_pairs(drawn, prompts.column, prompts.examples, most=most)
    asked = [
        course.judge_request(pair.row, pair.text, order, where=attempts[row_digest(pair.row)].where)
        for order in ORDERS
        for pair in pairs
    ]
    for each in asked:
        course.check_context(each, f"a pair made from {each.where}")
    answers = course.caller.answer(asked, on_progress)
    verdicts = [verdict_of(answer, prompts.labels) for answer in answers]
    orders = (tuple(verdicts[: len(pairs)]), tuple(verdicts[len(pairs) :]))
    called = next((answer.model for answer in answers if isinstance(answer, Completion)), "")
    judge = judge_digest(prompts, course.backend.fingerprint(course.rewriter.judge))
    return summarise(pairs, orders, judge=judge, model=called)


def summarise(pairs: Sequence[Pair], orders: tuple[Verdicts, Verdicts], *, judge: str, model: str) -> JudgeTest:
    """Shares and intervals of verdicts.

    Args:
        pairs: What was judged.
        orders: The verdicts on them, with the verdicts named in either order. None, or a fault, is no verdict: it
            accepts nothing.
        judge: Digest of the judge.
        model: What its answers say that they are from.
    """
    said = [[isinstance(verdict, Verdict) and verdict.same for verdict in verdicts] for verdicts in orders]
    alike = [number for number, pair in enumerate(pairs) if pair.same]
    other = [number for number, pair in enumerate(pairs) if not pair.same]
    # of the order in which the judge does worse
    sensitivity = _wilson(min(sum(order[k] for k in alike) for order in said), len(alike))
    specificity = _wilson(min(sum(not order[k] for k in other) for order in said), len(other))
    first = sum(a and not b for a, b in zip(*said, strict=True))
    second = sum(b and not a for a, b in zip(*said, strict=True))
    points, high = _paired(first, second, len(pairs))
    return JudgeTest(
        judge=judge,
        model=model[:1000],
        sensitivity=sensitivity,
        specificity=specificity,
        order_points=points,
        order_points_high=high,
        kinds=tuple(_counts(pairs, orders, said)),
    )


def faults(test: JudgeTest, config: OatRephraseConfig) -> Iterator[str]:
    """Why a judge is not to be used, by a recipe's gate."""
    alike, other = _numbers(test)
    for what, interval, pairs in (
        ("sensitivity", test.sensitivity, alike),
        ("specificity", test.specificity, other),
    ):
        if pairs < config.gate_pairs:
            yield f"{what} must be seen on at least {config.gate_pairs} pairs, got {pairs}"
        elif interval.share < config.gate_share:
            seen = f"{interval.share:.0%} of {pairs} pairs (95 % interval {interval.low:.0%} to {interval.high:.0%})"
            yield f"{what} must be at least {config.gate_share:.0%}, got {seen}"
    if test.order_points > config.gate_order_points:
        seen = f"{100 * test.order_points:.0f} points"
        yield (
            'the share of "same" may change with the order of the verdicts by at most '
            f"{100 * config.gate_order_points:.0f} points, got {seen}"
        )


def remedy(test: JudgeTest, config: OatRephraseConfig) -> str:
    """What to do about ``faults``."""
    if min(_numbers(test)) < config.gate_pairs:
        return "Give fedzo rephrase judge-test more rows: its --data may be any file of the task."
    if cut_off := sum(sum(each.cut_off) for each in test.kinds):
        return (
            f"{cut_off} of {2 * sum(_numbers(test))} verdicts were cut off or blank: raise rewriter.max_tokens "
            f"(above {USUAL_TOKENS} it holds for verdicts, too) and rewriter.context_tokens with it, or use another "
            "model as rewriter.judge_model."
        )
    return "Use a stronger model as rewriter.judge_model."


def few_pairs(test: JudgeTest, config: OatRephraseConfig) -> str:
    """Which kinds of pairs a test had fewer of than a recipe wishes for, as a sentence; empty where there is none."""
    seen = {each.made: each.pairs for each in test.kinds}
    few = [f"{kind} {seen.get(kind, 0)}" for kind in KINDS if seen.get(kind, 0) < config.gate_pairs]
    return f"Fewer than {config.gate_pairs} pairs were seen of these kinds: {', '.join(few)}." if few else ""


def keep(test: JudgeTest, folder: Path, *, min_pairs: int = 0) -> Path:
    """Write a test where ``find`` and ``find_test`` look for it; returns the file of the first.

    The first file is the judge's last test, the second stays: results that were judged after this test name it. A test
    on fewer than ``min_pairs`` does not take the place of one on enough.
    """
    file, own = folder / _FOLDER / f"{test.judge}.json", folder / _TESTS / f"{judge_test_digest(test)}.json"
    last = find(folder, test.judge)
    if last is not None and min(_numbers(test)) < min_pairs <= min(_numbers(last)):
        file = own
    for each in dict.fromkeys((own, file)):
        make_folder(each.parent)
        replace_file(each, to_json(test) + "\n", durable=True, mode=0o600)
    return file


def find(folder: Path, judge: str) -> JudgeTest | None:
    """The last test of a judge at this site; None where there is none."""
    return _read(folder, f"{_FOLDER}/{judge}.json")


def find_test(folder: Path, digest: str) -> JudgeTest | None:
    """A test by its own digest; None where it is not there."""
    return _read(folder, f"{_TESTS}/{digest}.json")


def _read(folder: Path, name: str) -> JudgeTest | None:
    remedy = "Remove the file and call fedzo rephrase judge-test again."
    return read_record(JudgeTest, folder, name, error=ConfigError, remedy=remedy)


def check_gate(folder: Path, judge: str, config: OatRephraseConfig) -> JudgeTest | None:
    """The judge's last test, if the recipe's gate lets it judge; None where there is none and the recipe asks for none.

    Raises:
        EndpointError: The recipe asks for a test, and there is none, or it does not pass.
    """
    test = find(folder, judge)
    if not (config.judged and config.gate):
        return test
    if test is None:
        raise EndpointError(
            "the judge must have passed its test before it judges, got no test of this model with these prompts. Call "
            "fedzo rephrase judge-test."
        )
    if found := [*faults(test, config)]:
        few = few_pairs(test, config)
        told = f"the judge must pass its test, but: {'; '.join(found)}.{f' {few}' if few else ''}"
        raise EndpointError(
            f"{told} {remedy(test, config)} preprocess.oat_rephrase.gate=false goes on without, "
            "and the manifest says so."
        )
    return test


def _numbers(test: JudgeTest) -> tuple[int, int]:
    alike = sum(each.pairs for each in test.kinds if each.made in SAME_KINDS)
    return alike, sum(each.pairs for each in test.kinds) - alike


def _counts(
    pairs: Sequence[Pair], orders: tuple[Verdicts, Verdicts], said: Sequence[Sequence[bool]]
) -> Iterator[PairCounts]:
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        at = [number for number, pair in enumerate(pairs) if pair.kind == kind]
        same = [sum(order[k] for k in at) for order in said]
        unread = [sum(not isinstance(order[k], Verdict) for k in at) for order in orders]
        cut = [sum(_is_cut_off(order[k]) for k in at) for order in orders]
        yield PairCounts(
            made=kind,
            pairs=len(at),
            same=(same[0], same[1]),
            unread=(unread[0], unread[1]),
            cut_off=(cut[0], cut[1]),
        )


def _is_cut_off(verdict: Verdict | RowFault | None) -> bool:
    return isinstance(verdict, RowFault) and verdict.reason is RowReason.cut_off


def _wilson(hits: int, total: int) -> Interval:
    """A share and its 95 % interval (Wilson, 1927)."""
    if total == 0:
        return Interval(share=0.0, low=0.0, high=1.0)
    share, square = hits / total, _Z * _Z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = _Z * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return Interval(share=share, low=max(0.0, middle - half), high=min(1.0, middle + half))


def _paired(first: int, second: int, total: int) -> tuple[float, float]:
    """By how much two shares of the same pairs differ, and the upper end of the 95 % interval (Wald's, paired)."""
    if total == 0:
        return 0.0, 1.0
    difference = abs(first - second) / total
    error = math.sqrt(max(0.0, first + second - (first - second) ** 2 / total)) / total
    return difference, min(1.0, difference + _Z * error)
