"""A row's way through rewriter, checks and judge."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.config.load import load
from fedzo.data.config import TaskConfig
from fedzo.data.preprocess.backend import (
    REWRITERS,
    Completion,
    EndpointError,
    NoRewriterConfig,
    Request,
    RewriterConfig,
    RowFault,
    RowReason,
)
from fedzo.data.preprocess.rephrase import course as course_module
from fedzo.data.preprocess.rephrase import results as results_module
from fedzo.data.preprocess.rephrase.caller import Caller
from fedzo.data.preprocess.rephrase.config import Check, OatRephraseConfig
from fedzo.data.preprocess.rephrase.course import Course, counts
from fedzo.data.preprocess.rephrase.rephraser import Rephraser, prompts_of
from fedzo.data.preprocess.rephrase.results import Results, apply_outcomes, recipe_digest, row_digest
from fedzo.data.preprocess.rephrase.store import Store
from fedzo.errors import ConfigError, FolderInUseError
from fedzo.records.folder import folder_of_one_process
from fedzo.records.rephrase import RowOutcome

ROWS = [
    {"premise": "The man broke his toe.", "choice1": "He got a hole in his sock.", "choice2": "He dropped a hammer.",
     "question": "cause", "label": 1},
    {"premise": "It was very cold.", "choice1": "The lake froze over.", "choice2": "Birds sang.", "question": "effect",
     "label": 0},
    {"premise": "The girl was hungry.", "choice1": "She made a sandwich.", "choice2": "She ran.", "question": "effect",
     "label": 0},
]  # fmt: skip
REWRITES = {
    "The man broke his toe.": "A toe of the man got broken.",
    "It was very cold.": "Temperatures were very low.",
    "The girl was hungry.": "Hunger had come over the girl.",
}
COPA: TaskConfig = load(["task=copa", "data.path=."]).task
RECIPE = dataclasses.replace(OatRephraseConfig(), gate=False).filled(COPA)
Reply = Callable[[Request], Any]


def is_judge(request: Request) -> bool:
    return request.schema is not None


def original_of(request: Request) -> str:
    line = [line for line in request.messages[-1].content.splitlines() if line.startswith(("premise: ", "text A: "))][
        -1
    ]
    return str(json.loads(line.split(": ", 1)[1]))


def text_b(request: Request) -> str:
    return str(json.loads(request.messages[-1].content.rsplit("text B: ", 1)[1]))


def verdict(same: bool = True, label: str = "choice1") -> str:
    return json.dumps({"verdict": "same" if same else "different", "predicted_label": label})


def honest(request: Request) -> str:
    return verdict() if is_judge(request) else REWRITES[original_of(request)]


class Bench:
    """A course over a scripted backend."""

    def __init__(
        self,
        folder: Path,
        backend: Any,
        recipe: OatRephraseConfig = RECIPE,
        task: TaskConfig = COPA,
        max_tokens: int = 100,
    ) -> None:
        self.backend, self.recipe = backend, recipe
        self.store = Store(folder)
        config = NoRewriterConfig(model="r", judge_model="j", max_tokens=max_tokens, context_tokens=4000)
        caller = Caller(backend, self.store, config)
        self.course = Course(recipe, task, prompts_of(recipe, task), backend, caller, config)

    def run(self, rows: list[dict[str, Any]] | None = None) -> list[RowOutcome]:
        rows = ROWS if rows is None else rows
        try:
            attempts = self.course.check_rows(rows)
            self.course.run(attempts)
        finally:
            self.store.close()
        outcomes = [attempts[row_digest(row)].outcome for row in rows]
        return [each for each in outcomes if each is not None]


def test_accepted_rewrites_take_the_place_of_one_column(tmp_path: Path, scripted: Any) -> None:
    backend = scripted(honest)

    outcomes = Bench(tmp_path, backend).run()

    assert apply_outcomes(ROWS, outcomes) == [{**row, "premise": REWRITES[row["premise"]]} for row in ROWS]
    assert [each.row for each in outcomes] == [row_digest(row) for row in ROWS]
    assert {each.model for each in outcomes} == {"scripted"}
    assert counts(outcomes) == {"rewritten": 3}
    assert len(backend.asked) == 9  # a rewrite, and the judge on the original and on the rewrite
    assert {(request.model, request.temperature) for request in backend.asked} == {("r", 0.0), ("j", 0.0)}


def test_rows_that_are_alike_are_asked_for_once(tmp_path: Path, scripted: Any) -> None:
    backend = scripted(honest)

    outcomes = Bench(tmp_path, backend).run([*ROWS, *ROWS])

    assert outcomes[:3] == outcomes[3:]
    assert len(backend.asked) == 9


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (lambda request: "" if not is_judge(request) else verdict(), "empty"),
        (lambda request: original_of(request) if not is_judge(request) else verdict(), "identical"),
        (lambda request: RowFault(RowReason.timeout) if not is_judge(request) else verdict(), "call_timeout"),
        (lambda request: honest(request) if not is_judge(request) else "They are the same.", "judge_unread"),
        (
            lambda request: honest(request) if not is_judge(request) else RowFault(RowReason.malformed),
            "judge_malformed",
        ),
        (
            lambda request: Completion("A toe of", True, "m", 1, 1) if not is_judge(request) else verdict(),
            "truncated",
        ),
        (
            lambda request: (
                honest(request)
                if not is_judge(request)
                else verdict(label="choice1" if text_b(request) in REWRITES else "choice2")
            ),
            "judge_label",
        ),
        (
            lambda request: honest(request) if not is_judge(request) else verdict(text_b(request) in REWRITES),
            "judge_different",
        ),
        (
            lambda request: honest(request) if not is_judge(request) else verdict(text_b(request) not in REWRITES),
            "judge_fails_original",
        ),
        (
            lambda request: honest(request) if not is_judge(request) else Completion(verdict(), True, "m", 1, 1),
            "judge_cut_off",
        ),
        (lambda request: honest(request) if not is_judge(request) else " ", "judge_cut_off"),
    ],
)
def test_whatever_fails_the_row_keeps_its_text(tmp_path: Path, scripted: Any, reply: Reply, reason: str) -> None:
    outcomes = [Bench(tmp_path / str(k), scripted(reply)).run([row])[0] for k, row in enumerate(ROWS)]

    assert apply_outcomes(ROWS, outcomes) == ROWS
    assert [(each.status, each.reason) for each in outcomes] == [("original", reason)] * 3


@pytest.mark.parametrize(
    ("answer", "reason"), [(Completion("A toe of", True, "m", 1, 1), "truncated"), ("", "empty"), (" \n", "empty")]
)
def test_no_recipe_takes_an_answer_that_is_cut_off_or_blank(
    answer: Any, reason: str, tmp_path: Path, scripted: Any
) -> None:
    recipe = dataclasses.replace(RECIPE, checks=[], judged=False)

    (outcome,) = Bench(tmp_path, scripted(lambda request: answer), recipe).run(ROWS[:1])

    assert (outcome.text, outcome.reason) == (ROWS[0]["premise"], reason)


def test_a_rewriter_that_writes_the_answer_is_caught(tmp_path: Path, scripted: Any) -> None:
    """It adds the right choice, which the judge, who does not know it, cannot see."""

    def tells(request: Request) -> str:
        if is_judge(request):
            return verdict()
        row = next(row for row in ROWS if row["premise"] == original_of(request))
        return f"{REWRITES[str(row['premise'])][:-1]}: {row['choice1' if row['label'] == 0 else 'choice2']}"

    outcomes = Bench(tmp_path, scripted(tells)).run()

    assert [each.reason for each in outcomes] == ["leak"] * 3


def test_further_attempts_are_samples_for_rows_that_failed_alone(tmp_path: Path, scripted: Any) -> None:
    def second_time(request: Request) -> str:
        hard = original_of(request) == "It was very cold."
        return "" if hard and not is_judge(request) and request.temperature == 0 else honest(request)

    backend = scripted(second_time)
    outcomes = Bench(tmp_path, backend, dataclasses.replace(RECIPE, max_attempts=3)).run()

    assert counts(outcomes) == {"rewritten": 3}
    rewrites = [request for request in backend.asked if not is_judge(request)]
    assert [(request.temperature, request.seed) for request in rewrites] == [(0.0, 0)] * 3 + [(0.3, 1)]


def test_each_further_attempt_is_another_sample_at_one_temperature(tmp_path: Path, scripted: Any) -> None:
    backend = scripted(lambda request: "Toe.")

    Bench(tmp_path, backend, dataclasses.replace(RECIPE, max_attempts=3)).run(ROWS[:1])

    assert [(request.temperature, request.seed) for request in backend.asked] == [(0.0, 0), (0.3, 1), (0.3, 2)]


@pytest.mark.parametrize("reason", [RowReason.refused, RowReason.unavailable])
def test_a_row_whose_call_failed_is_not_asked_for_another_sample(
    reason: RowReason, tmp_path: Path, scripted: Any
) -> None:
    backend = scripted(lambda request: RowFault(reason))

    (outcome,) = Bench(tmp_path, backend, dataclasses.replace(RECIPE, max_attempts=3)).run(ROWS[:1])

    assert outcome.reason == f"call_{reason}"
    assert len(backend.asked) == 1


@pytest.mark.parametrize("is_original", [True, False])
def test_a_rewrite_whose_judge_failed_waits_for_its_verdict(is_original: bool, tmp_path: Path, scripted: Any) -> None:
    """Of the original or of the rewrite: a later course makes the one call that is missing, and takes this rewrite."""

    def slow(request: Request) -> Any:
        fails = is_judge(request) and (text_b(request) in REWRITES) == is_original
        return RowFault(RowReason.timeout) if fails else honest(request)

    recipe, first, second = dataclasses.replace(RECIPE, max_attempts=3), scripted(slow), scripted(honest)
    (outcome,) = Bench(tmp_path, first, recipe).run(ROWS[:1])
    assert outcome.reason == "judge_timeout"
    assert [is_judge(request) for request in first.asked] == [False, True, True]

    (outcome,) = Bench(tmp_path, second, recipe).run(ROWS[:1])
    assert (outcome.status, outcome.text) == ("rewritten", REWRITES[ROWS[0]["premise"]])
    assert len(second.asked) == 1


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (lambda request: verdict(text_b(request) not in REWRITES), "judge_fails_original"),
        (lambda request: "They are the same.", "judge_unread"),
    ],
)
def test_a_row_whose_original_the_judge_fails_is_not_rewritten_again(
    judge: Reply, reason: str, tmp_path: Path, scripted: Any
) -> None:
    backend = scripted(lambda request: judge(request) if is_judge(request) else honest(request))

    (outcome,) = Bench(tmp_path, backend, dataclasses.replace(RECIPE, max_attempts=3)).run(ROWS[:1])

    assert outcome.reason == reason
    assert [is_judge(request) for request in backend.asked] == [False, True, True]


@pytest.mark.parametrize(("max_tokens", "expected"), [(100, 128), (512, 128), (2000, 2000)])
def test_a_judge_may_think_as_long_as_the_rewriter_where_that_is_long(
    max_tokens: int, expected: int, tmp_path: Path, scripted: Any
) -> None:
    backend = scripted(lambda request: f"<think>\nHm.\n</think>\n\n{honest(request)}")

    outcomes = Bench(tmp_path, backend, max_tokens=max_tokens).run()

    assert counts(outcomes) == {"rewritten": 3}
    assert {request.max_tokens for request in backend.asked if is_judge(request)} == {expected}
    assert {request.max_tokens for request in backend.asked if not is_judge(request)} == {max_tokens}


def test_without_a_judge_the_checks_decide(tmp_path: Path, scripted: Any) -> None:
    backend = scripted(honest)

    outcomes = Bench(tmp_path, backend, dataclasses.replace(RECIPE, judged=False)).run()

    assert counts(outcomes) == {"rewritten": 3}
    assert len(backend.asked) == 3


def test_a_second_course_makes_no_call_and_ends_alike(tmp_path: Path, scripted: Any) -> None:
    first = Bench(tmp_path, scripted(honest)).run()
    backend = scripted(honest)

    assert Bench(tmp_path, backend).run() == first
    assert backend.asked == []


def test_an_outage_keeps_what_is_done(tmp_path: Path, scripted: Any) -> None:
    def fails_late(request: Request) -> str:
        if len(backend.asked) > 4:
            raise EndpointError("gone")
        return honest(request)

    backend = scripted(fails_late)
    with pytest.raises(EndpointError, match="gone"):
        Bench(tmp_path, backend).run()
    again = scripted(honest)

    assert counts(Bench(tmp_path, again).run()) == {"rewritten": 3}
    assert len(again.asked) == 9 - 4


def test_each_call_names_the_row_that_it_is_for(tmp_path: Path, scripted: Any) -> None:
    backend = scripted(honest)

    Bench(tmp_path, backend).run([ROWS[0], *ROWS])

    places = ("row 0", "row 2", "row 3")
    told = {(row["premise"], place) for row, place in zip(ROWS, places, strict=True)}
    assert {(original_of(request), request.where) for request in backend.asked} == told


LONG = [{**ROWS[0], "premise": f"{word} " * 4000} for word in ("first", "second")]


def test_a_row_that_is_too_long_keeps_its_text_and_stops_no_other(tmp_path: Path, scripted: Any) -> None:
    backend, rows = scripted(honest), [ROWS[0], LONG[0], *ROWS[1:]]

    outcomes = Bench(tmp_path, backend).run(rows)

    assert counts(outcomes) == {"rewritten": 3, "original too_long": 1}
    assert apply_outcomes(rows, outcomes)[1] == LONG[0]
    assert len(backend.asked) == 9


def test_a_row_that_lacks_an_anchor_is_not_asked_for(tmp_path: Path, scripted: Any) -> None:
    """No rewrite of it could pass; where the check is not wanted, one may."""
    task: TaskConfig = load(["task=wic", "data.path=."]).task
    recipe = dataclasses.replace(OatRephraseConfig(), gate=False, max_attempts=3).filled(task)
    row = {"word": "run", "sentence1": "She runs a shop.", "sentence2": "They run.", "label": 1}
    backend, other = scripted(lambda request: "same"), scripted(lambda request: "same")

    (outcome,) = Bench(tmp_path / "a", backend, recipe, task).run([row])
    Bench(tmp_path / "b", other, dataclasses.replace(recipe, checks=[Check.empty]), task).run([row])

    assert (outcome.text, outcome.reason) == ("She runs a shop.", "anchors")
    assert backend.asked == []
    assert other.asked


def test_a_number_beside_the_text_is_shown_as_it_is(tmp_path: Path, scripted: Any) -> None:
    backend = scripted(honest)

    outcomes = Bench(tmp_path, backend).run([{**ROWS[0], "choice2": 7}])

    assert counts(outcomes) == {"rewritten": 1}
    assert 'choice2: "7"' in backend.asked[0].messages[-1].content


def test_what_is_wrong_with_rows_is_told_before_the_first_call(tmp_path: Path, scripted: Any) -> None:
    backend = scripted(honest)
    for number, (rows, words) in enumerate(
        [
            ([*ROWS, {**ROWS[0], "premise": "  "}], r"text in the column 'premise'"),
            ([*ROWS, {key: value for key, value in ROWS[0].items() if key != "choice2"}], "column 'choice2'"),
            ([*ROWS, {**ROWS[0], "label": 2}], r"'label' must hold an index \(0 to 1\)"),
            ([*ROWS, *LONG], r"context_tokens: .* at most 4000 tokens, row 3 has \d+"),
        ]
    ):
        with pytest.raises(ConfigError, match=words):
            Bench(tmp_path / str(number), backend).run(rows)
    assert backend.asked == []


WRONG = {
    "blank": ({**ROWS[0], "premise": "  "}, "row 5 must have text in the column 'premise', got a blank one"),
    "number": ({**ROWS[0], "premise": 3}, "row 5 must have text in the column 'premise', got a value of the type int"),
    "missing": (
        {"text\x1b[2J": "x", "label": 0},
        r"row 5 must have text in the column 'premise', got a row with the columns label, text \[2J. Name the column",
    ),
    "surrogate": ({**ROWS[0], "premise": "a \ud800"}, "row 5 must have .*'premise', got half of a character"),
    "surrogate beside it": ({**ROWS[0], "choice1": "\ud800"}, "row 5 must have .*'choice1', got half of a character"),
    "label": ({**ROWS[0], "label": 2}, r"row 5: column 'label' must hold an index \(0 to 1\)"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_row_that_is_wrong_is_named_by_its_place_in_the_data(fault: str, tmp_path: Path, scripted: Any) -> None:
    """Equal rows before it count, too; and no control character of a row gets to a terminal."""
    row, words = WRONG[fault]
    backend = scripted(honest)

    with pytest.raises(ConfigError, match=words) as caught:
        Bench(tmp_path, backend).run([*[ROWS[0]] * 5, row])

    assert str(caught.value).isprintable()
    assert backend.asked == []


def test_a_model_that_reads_less_than_the_site_allows_is_told_of(
    tmp_path: Path, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripted, "room", lambda self, model: 300)

    with pytest.raises(ConfigError, match="at most 300 tokens, as many as the model has positions, row 0 has"):
        Bench(tmp_path, scripted(honest)).run()


@pytest.mark.parametrize(
    "fault",
    [RowFault(RowReason.unavailable, '500 "oops"'), "", Completion("A toe of", True, "m", 1, 1)],
    ids=["500", "blank", "cut"],
)
def test_a_set_that_the_endpoint_failed_is_none(fault: Any, tmp_path: Path, scripted: Any) -> None:
    """However few calls that took, and however many calls of the judge went well: rows count."""
    rows = [{**ROWS[0], "choice1": f"He saw {number} hammers."} for number in range(12)]

    def reply(bad: int) -> Reply:
        return lambda request: (
            fault
            if not is_judge(request) and any(f"saw {k} " in request.messages[-1].content for k in range(bad))
            else honest(request)
        )

    told = r"; unavailable: 500 \"oops\"" if isinstance(fault, RowFault) else ""
    with pytest.raises(EndpointError, match=rf"failed 3 of 12 \(3 \w+{told}\)\. Correct .* what failed is asked again"):
        Bench(tmp_path, scripted(reply(3))).run(rows)
    assert len(Bench(tmp_path, scripted(reply(2))).run(rows)) == 12

    again = scripted(honest)
    assert counts(Bench(tmp_path, again).run(rows)) == {"rewritten": 12}
    assert len(again.asked) == 2 * 3  # no answer is asked for twice, and a fault is none


def test_a_judge_that_fails_stops_it_as_well(tmp_path: Path, scripted: Any) -> None:
    cut = Completion('{"verdict": "sa', True, "m", 1, 1)

    with pytest.raises(EndpointError, match=r"failed 3 of 3 \(3 judge_cut_off\)"):
        Bench(tmp_path, scripted(lambda request: cut if is_judge(request) else honest(request))).run()


def test_as_many_calls_are_in_flight_as_the_backend_takes(tmp_path: Path, scripted: Any) -> None:
    """None is answered before a hundred are made."""
    together = threading.Barrier(100, timeout=60)

    def reply(request: Request) -> str:
        together.wait()
        return honest(request)

    rows = [{**ROWS[0], "choice2": f"He saw {number} hammers."} for number in range(200)]
    bench = Bench(tmp_path, scripted(reply, concurrency=100), dataclasses.replace(RECIPE, judged=False))

    assert counts(bench.run(rows)) == {"rewritten": 200}


def test_progress_counts_rows_and_never_falls(tmp_path: Path, scripted: Any) -> None:
    bench, told = Bench(tmp_path, scripted(honest)), []
    rows = [{**ROWS[0], "choice2": f"He saw {number} hammers."} for number in range(150)]
    bench.course.run(bench.course.check_rows(rows), lambda done, total: told.append((done, total)))

    assert {total for _, total in told} == {150}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (150, 150)
    assert len({done for done, _ in told}) > 50


TEXTS = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["same", "not the same", verdict(), verdict(False), *REWRITES.values(), "He dropped a hammer."]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(TEXTS, st.sampled_from([*RowReason]).map(RowFault)), min_size=1, max_size=12), st.data())
def test_no_backend_changes_another_column_or_the_order(replies: list[Any], data: st.DataObject) -> None:
    """Whatever the endpoint says: same rows, same order, one column; and text that is new has passed a judge."""
    accepted: set[str] = set()

    def reply(request: Request) -> Any:
        answer = data.draw(st.sampled_from(replies))
        if is_judge(request) and answer in ("same", verdict()):
            accepted.add(text_b(request))
        return answer

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        from tests.unit.data.rephrase.conftest import Scripted

        patch.setattr(course_module, "MAX_FAILED", 1.0)  # each row has its outcome, however many fail
        try:
            made = apply_outcomes(ROWS, Bench(Path(folder), Scripted(reply)).run())
        except EndpointError:
            return  # too many faults

    assert [{**row, "premise": None} for row in made] == [{**row, "premise": None} for row in ROWS]
    for before, after in zip(ROWS, made, strict=True):
        assert after["premise"] == before["premise"] or after["premise"] in accepted


def test_the_budgets_hold_for_all_clients_of_a_process(
    tmp_path: Path, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client opens the store and the backend anew; what they spend is one sum."""
    backend = scripted(honest)
    monkeypatch.setattr(REWRITERS, "build", lambda config: backend)
    rephraser = Rephraser(RECIPE, COPA, RewriterConfig(budget_calls=7), tmp_path)

    rephraser.outcomes(ROWS[:2], lambda done, total: None)
    with pytest.raises(EndpointError, match="budget_calls=7"):
        rephraser.outcomes(ROWS[2:], lambda done, total: None)

    assert len(backend.asked) == 7


def test_a_second_process_waits_for_the_store(tmp_path: Path, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped by its own progress here; the first one lets the store go in the second case."""
    other = Store(tmp_path / "calls")
    rephraser = Rephraser(RECIPE, COPA, NoRewriterConfig(), tmp_path)

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StopError

    backend = scripted(honest)
    monkeypatch.setattr(REWRITERS, "build", lambda config: backend)
    with pytest.raises(StopError):
        rephraser.outcomes(ROWS, stop)
    assert backend.asked == []

    other.close()
    assert counts(rephraser.outcomes(ROWS, lambda done, total: None)) == {"rewritten": 3}


# --- results ----------------------------------------------------------------------------------------------------------


def test_results_are_found_by_recipe_and_row(tmp_path: Path, scripted: Any) -> None:
    outcomes = Bench(tmp_path / "calls", scripted(honest)).run()
    results = Results(tmp_path, recipe_digest(RECIPE, COPA))
    assert results.find(ROWS) is None

    results.add({each.row: each for each in outcomes[:2]})
    assert results.find(ROWS) is None
    assert results.find(ROWS[1::-1]) == outcomes[1::-1]

    results.add({each.row: dataclasses.replace(each, text="other") for each in outcomes})
    assert results.find(ROWS) == [*outcomes[:2], dataclasses.replace(outcomes[2], text="other")]
    other = dataclasses.replace(RECIPE, max_attempts=2)
    assert Results(tmp_path, recipe_digest(other, COPA)).find(ROWS) is None
    assert results.file.stat().st_mode & 0o077 == 0


def test_results_that_root_keeps_at_a_site_are_the_sites(
    tmp_path: Path, scripted: Any, given_by_root: Callable[[], set[Path]]
) -> None:
    outcomes = Bench(tmp_path / "calls", scripted(honest)).run()
    results = Results(tmp_path / "new", recipe_digest(RECIPE, COPA))

    results.add({each.row: each for each in outcomes})

    assert {results.folder, results.file.parent, results.file} <= given_by_root()


def test_results_of_other_meanings_of_the_labels_are_not_found(tmp_path: Path, scripted: Any) -> None:
    outcomes = Bench(tmp_path / "calls", scripted(honest)).run()
    turned = [dataclasses.replace(COPA, labels=names) for names in (["a", "b"], ["b", "a"])]
    right, wrong = (Rephraser(RECIPE, task, NoRewriterConfig(), tmp_path).results for task in turned)

    right.add({each.row: each for each in outcomes})

    assert right.find(ROWS) == outcomes
    assert wrong.find(ROWS) is None
    assert recipe_digest(RECIPE, dataclasses.replace(turned[0], label="other")) != right.recipe


def test_results_of_another_recipe_are_not_found() -> None:
    assert recipe_digest(RECIPE, COPA) == recipe_digest(dataclasses.replace(RECIPE), COPA)
    assert recipe_digest(dataclasses.replace(RECIPE, about="The task is this."), COPA) != recipe_digest(RECIPE, COPA)


def test_results_of_a_task_of_ones_own_with_other_candidates_are_not_found() -> None:
    """The prompts name meanings alone, but what a leak is depends on the candidates."""
    words = OatRephraseConfig(about="The task is to judge a product.", meanings=["negative", "positive"])
    one = TaskConfig(name="verdict", template="{text} It is", candidates=[" poor", " fine"])
    other = dataclasses.replace(one, candidates=[" awful", " superb"])
    recipe = words.filled(one)

    assert words.filled(other) == recipe
    assert recipe_digest(recipe, one) == recipe_digest(recipe, dataclasses.replace(one))
    assert recipe_digest(recipe, one) != recipe_digest(recipe, other)


def test_a_file_of_results_is_decoded_once_for_all_clients_until_another_takes_its_place(
    tmp_path: Path, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = Bench(tmp_path / "calls", scripted(honest)).run()
    decoded, decode = [], results_module.decode_json
    monkeypatch.setattr(results_module, "decode_json", lambda *args, **more: decoded.append(1) or decode(*args, **more))
    results = Results(tmp_path, recipe_digest(RECIPE, COPA))
    results.add({each.row: each for each in outcomes[:2]})

    for row in ROWS[:2] * 5:  # each client asks a new object
        assert Results(tmp_path, results.recipe).find([row]) is not None
    assert len(decoded) == 2

    results.add({outcomes[2].row: outcomes[2]})
    assert results.find(ROWS) == outcomes
    changed = dataclasses.replace(outcomes[0], text="other")
    results.add({changed.row: changed}, instead=[changed.row])
    assert results.find(ROWS) == [changed, *outcomes[1:]]
    results.file.unlink()
    assert results.find(ROWS) is None


def test_results_that_another_process_writes_are_waited_for(tmp_path: Path) -> None:
    """Not an error of the disk: ``Rephraser.outcomes`` looks again."""
    results = Results(tmp_path, recipe_digest(RECIPE, COPA))
    results.file.parent.mkdir()

    with folder_of_one_process(results.file.parent), pytest.raises(FolderInUseError):
        results.add({})


def test_a_copy_of_older_results_stays_though_one_before_it_was_removed(tmp_path: Path, scripted: Any) -> None:
    outcomes = Bench(tmp_path / "calls", scripted(honest)).run()
    results = Results(tmp_path, recipe_digest(RECIPE, COPA))
    found = outcomes[0]
    results.add({found.row: dataclasses.replace(found, text="0")})
    for text in ("1", "2"):
        results.add({found.row: dataclasses.replace(found, text=text)}, instead=[found.row])
    first, second = results.older()
    first.unlink()  # of a run that is over

    results.add({found.row: found}, instead=[found.row])

    assert [json.loads(copy.read_text())["text"] for copy in results.older()] == ["1", "2"]
    assert results.older()[0] == second
    assert results.find(ROWS[:1]) == [found]


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    results = Results(tmp_path, recipe_digest(RECIPE, COPA))
    results.file.parent.mkdir()
    results.file.write_text('{"row": "x"}\n')

    with pytest.raises(ConfigError, match=r"jsonl:1: .*Remove the file"):
        results.read()


def test_a_site_with_other_prompts_refuses(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, prompt="a" * 64)

    with pytest.raises(ConfigError, match=r"oat_rephrase.prompt.*got aaaaaaaaaaaa"):
        _ = Rephraser(recipe, COPA, NoRewriterConfig(), tmp_path).prompts


def test_the_recipe_is_filled_once_and_for_all() -> None:
    assert RECIPE.column == "premise"
    assert len(RECIPE.prompt) == 64
    assert RECIPE.filled(COPA) == RECIPE
