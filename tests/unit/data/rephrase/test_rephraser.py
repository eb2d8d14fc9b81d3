"""A recipe at a site: what is asked again and what never, under which test, and what is told of a set."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.config.load import load
from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.preprocess.backend import (
    REWRITERS,
    Completion,
    EndpointError,
    Request,
    RewriterConfig,
    RowFault,
    RowReason,
)
from fedzo.data.preprocess.rephrase import caller as caller_module
from fedzo.data.preprocess.rephrase import course as course_module
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.data.preprocess.rephrase.course import counts, outcome_of
from fedzo.data.preprocess.rephrase.gate import keep
from fedzo.data.preprocess.rephrase.manifest import Used
from fedzo.data.preprocess.rephrase.rephraser import Rephraser
from fedzo.data.preprocess.rephrase.stage import OatRephrase
from fedzo.data.rows import SimulatedRows, client_rows
from fedzo.errors import ConfigError, RunFolderError
from fedzo.records.decode import decode_json
from fedzo.records.rephrase import Manifest
from fedzo.report.rephrased import figures_table

COPA: TaskConfig = load(["task=copa", "data.path=."]).task
RECIPE = replace(OatRephraseConfig(), gate=False, judged=False).filled(COPA)
ROWS = [
    {"premise": f"The man saw Anna {number} times.", "choice1": "He ran.", "choice2": "It rained.", "question": "cause",
     "label": 0}
    for number in range(30)
]  # fmt: skip
Site = Callable[..., Rephraser]


def text_of(request: Request) -> str:
    asked = [line for line in request.messages[-1].content.splitlines() if line.startswith("premise: ")][-1]
    return str(json.loads(asked.removeprefix("premise: ")))


def good(request: Request) -> str:
    if request.schema is not None:
        return json.dumps({"verdict": "same", "predicted_label": "choice1"})
    return text_of(request).replace("saw", "met")


def dead(request: Request) -> RowFault:
    return RowFault(RowReason.unavailable)


@pytest.fixture
def site(scripted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Site:
    """A recipe at a site whose endpoint answers by a function; ``site.asked`` of the last one is in ``backend``."""

    def make(reply: Any, recipe: OatRephraseConfig = RECIPE, **more: Any) -> Rephraser:
        backend = scripted(reply)
        monkeypatch.setattr(REWRITERS, "build", lambda config: backend)
        made = Rephraser(recipe, COPA, RewriterConfig(**more), tmp_path)
        object.__setattr__(made, "backend", backend)
        return made

    return make


def asked(rephraser: Rephraser) -> int:
    return len(rephraser.backend.asked)  # type: ignore[attr-defined]


def silent(done: int, total: int) -> None:
    assert 0 <= done <= total


def test_rows_that_have_a_result_are_not_asked_for_again(site: Site) -> None:
    site(good).rewrite(ROWS[:12], silent)
    second = site(good)

    done = second.rewrite(ROWS, silent, again=True)

    assert (len(done), asked(second)) == (18, 18)
    third = site(good)
    assert third.rewrite(ROWS, silent, again=True) == {}
    assert asked(third) == 0


def test_what_the_endpoint_failed_is_asked_again_by_hand_and_kept_by_a_run(site: Site) -> None:
    fails = lambda request: dead(request) if " 3 times" in text_of(request) else good(request)  # noqa: E731
    first = site(fails)
    first.rewrite(ROWS, silent)
    assert counts(first.results.find(ROWS) or []) == {"rewritten": 29, "original call_unavailable": 1}

    run = site(good)
    assert counts(run.outcomes(ROWS, silent))["original call_unavailable"] == 1
    assert run.rewrite([*ROWS, {**ROWS[0], "choice2": "It snowed."}], silent).keys().__len__() == 1
    assert asked(run) == 1  # the new row alone: a run that began with the old text goes on with it

    still = site(dead)
    assert still.rewrite(ROWS[3:4], silent, again=True)
    assert still.results.older() == []  # it failed once more: nothing was replaced
    by_hand = site(good)
    by_hand.rewrite(ROWS, silent, again=True)
    assert asked(by_hand) == 1
    (older,) = by_hand.results.older()
    assert "call_unavailable" in older.read_text()
    assert counts(by_hand.results.find(ROWS) or []) == {"rewritten": 30}


def test_a_prompt_is_measured_once_for_its_room_and_once_for_the_budget(
    site: Site, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of new rows, of those that are asked for again, and of those that have their result."""
    measured, count = [], scripted.count_tokens
    monkeypatch.setattr(scripted, "count_tokens", lambda self, asks: measured.append(asks) or count(self, asks))
    fails = lambda request: dead(request) if " 3 times" in text_of(request) else good(request)  # noqa: E731

    site(fails).rewrite(ROWS[:20], silent)
    assert len(measured) == 20 + 20

    measured.clear()
    site(good).rewrite(ROWS, silent, again=True)
    assert len(measured) == 30 + (10 + 1)  # rows that are new, and the one that failed


def test_progress_counts_rows_also_where_some_are_alike(site: Site) -> None:
    told: list[tuple[int, int]] = []
    site(good).rewrite([*ROWS[:4], *ROWS[:4]], lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((0, 8), (8, 8))

    told.clear()
    site(good).rewrite([*ROWS[:6], *ROWS[:6]], lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((8, 12), (12, 12))  # four of the six have their result, each twice


def test_a_row_whose_judge_was_cut_off_is_asked_again_by_hand(site: Site) -> None:
    recipe = replace(RECIPE, judged=True)
    cut = Completion('{"verdict": "sa', True, "m", 1, 1)

    def fails(request: Request) -> str | Completion:
        is_cut = request.schema is not None and " 3 times" in request.messages[-1].content
        return cut if is_cut else good(request)

    first = site(fails, recipe)
    first.rewrite(ROWS, silent)
    assert counts(first.results.find(ROWS) or []) == {"rewritten": 29, "original judge_cut_off": 1}

    by_hand = site(good, recipe)
    by_hand.rewrite(ROWS, silent, again=True)

    assert asked(by_hand) == 2  # the two verdicts
    assert counts(by_hand.results.find(ROWS) or []) == {"rewritten": 30}


def test_a_row_that_does_not_fit_is_named_by_its_place_among_rows_with_results(site: Site) -> None:
    site(good).rewrite(ROWS[:2], silent)
    second = site(good)

    with pytest.raises(ConfigError, match="row 3 must have text in the column 'premise', got a blank one"):
        second.rewrite([*ROWS[:3], {**ROWS[3], "premise": " "}], silent)

    assert asked(second) == 0


def test_new_rows_that_are_too_long_are_few_of_their_set_and_asked_for_where_there_is_room(site: Site) -> None:
    long = [{**ROWS[0], "premise": f"He saw {name} " * 2000} for name in ("Ben", "Cleo")]
    site(good).rewrite(ROWS, silent)
    second = site(good)

    second.rewrite([*ROWS, *long], silent)

    assert counts(second.results.find([*ROWS, *long]) or []) == {"rewritten": 30, "original too_long": 2}
    with pytest.raises(ConfigError, match="row 0 has"):
        second.rewrite([{**row, "choice2": "It froze."} for row in long], silent)
    assert asked(second) == 0
    third = site(good, context_tokens=100_000)
    third.rewrite([*ROWS, *long], silent, again=True)
    assert asked(third) == 2


def test_rows_that_fail_again_and_again_are_few_of_their_set(site: Site) -> None:
    """The rule is on the set, not on the rows that are asked for again; new rows are measured by themselves."""
    fails = lambda request: dead(request) if re.search(r" [123] times", text_of(request)) else good(request)  # noqa: E731
    site(fails).rewrite(ROWS, silent)
    second = site(fails)
    second.rewrite(ROWS, silent, again=True)
    more = [{**row, "choice2": "It snowed."} for row in ROWS[10:16]]
    second.rewrite([*ROWS, *more], silent, again=True)

    assert asked(second) == 3 + 6 + 3
    expected = {"rewritten": 33, "original call_unavailable": 3}
    assert counts(second.results.find([*ROWS, *more]) or []) == expected
    new = [{**row, "choice2": "It froze."} for row in ROWS[10:16]]
    with pytest.raises(EndpointError, match="failed 6 of 6"):
        site(dead).rewrite([*ROWS, *more, *new], silent, again=True)


def test_many_rows_that_are_refused_for_good_stop_no_later_start(site: Site) -> None:
    """They are few of their set; a start that finds the other answers kept asks for them alone."""
    rows = [{**ROWS[0], "premise": f"The man saw Anna {number} times."} for number in range(400)]

    def refuses(request: Request) -> str | RowFault:
        number = int(re.findall(r"\d+", text_of(request))[0])
        return RowFault(RowReason.refused) if number % 16 == 0 else good(request)

    with pytest.raises(EndpointError, match="budget_calls=380"):
        site(refuses, budget_calls=380).rewrite(rows, silent)
    second = site(refuses)
    second.rewrite(rows, silent)
    assert asked(second) == 24 + 20  # of the first 380 rows those that were refused, and the others

    expected = {"rewritten": 375, "original call_refused": 25}
    assert counts(second.results.find(rows) or []) == expected
    by_hand = site(refuses)
    by_hand.rewrite(rows, silent, again=True)
    assert asked(by_hand) == 25
    assert counts(by_hand.results.find(rows) or []) == expected


def test_a_dead_endpoint_leaves_no_results(site: Site) -> None:
    with pytest.raises(EndpointError, match=r"failed 12 of 12 \(12 call_unavailable; unavailable\)"):
        site(dead).rewrite(ROWS[:12], silent)

    assert site(good).results.find(ROWS[:12]) is None
    assert counts(site(good).outcomes(ROWS[:12], silent)) == {"rewritten": 12}


def test_after_a_higher_limit_only_the_answers_that_were_cut_off_are_asked_for_again(site: Site) -> None:
    def reply(request: Request) -> str | Completion:
        number = int(re.findall(r"\d+", text_of(request))[0])
        is_cut = number % 10 < 3 and request.max_tokens < 1000
        return Completion("The man met", True, "m", 10, request.max_tokens) if is_cut else good(request)

    first = site(reply, max_tokens=100)
    with pytest.raises(EndpointError, match=r"failed 9 of 30 \(9 truncated\).* rewriter.max_tokens, and start again"):
        first.rewrite(ROWS, silent)
    assert asked(first) == 30

    second = site(reply, max_tokens=2000)
    second.rewrite(ROWS, silent)

    assert asked(second) == 9
    assert counts(second.results.find(ROWS) or []) == {"rewritten": 30}


@pytest.mark.parametrize(
    ("task", "recipe", "row", "leaks"),
    [
        (COPA, OatRephraseConfig(), ROWS[0], ["rewrites that leak an answer"]),
        (
            load(["task=squad", "data.path=.", "partition=iid"]).task,
            OatRephraseConfig(),
            {"context": "A bus came.", "question": "What came?", "answer": "bus"},
            [],
        ),
        (
            TaskConfig(name="mine", template="{text}:", candidates=[" it is {a}", " it is {b}"]),
            OatRephraseConfig(about="The task is to choose.", meanings=["red", "blue"]),
            {"text": "A bus came.", "a": "red", "b": "blue", "label": 0},
            [],
        ),
    ],
    ids=["choices", "a written answer", "words and a column"],
)
def test_leaks_are_told_of_where_words_can_give_an_answer_away(
    task: TaskConfig, recipe: OatRephraseConfig, row: Row, leaks: list[str], tmp_path: Path
) -> None:
    rephraser = Rephraser(recipe.filled(task), task, RewriterConfig(), tmp_path)
    outcome = outcome_of("0" * 32, rephraser.prompts.column, "There came a bus.", model="m")

    names = [name for name, _ in figures_table(rephraser, [row], [outcome])]

    assert names[0] == "mean words"
    assert [name for name in names if "leak" in name] == leaks


def manifest(file: Path) -> Manifest:
    read: Manifest = decode_json(Manifest, file.read_text(), where="manifest", error=ConfigError)
    return read


def test_each_set_has_a_manifest_of_its_own(site: Site, tmp_path: Path) -> None:
    """A run makes them, too; names that are lost are counted, and calls of several times are added up."""
    loses = lambda request: good(request).replace("Anna", "her")  # noqa: E731
    first = site(loses)
    first.outcomes(ROWS[:10], silent)
    (file,) = (tmp_path / "results").glob("*.manifest.json")
    found = manifest(file)
    assert (found.counts, found.names, found.calls, found.tokens) == ({"rewritten": 10}, 10, 10, 150)
    assert found.gate == "unjudged"

    site(loses).outcomes(ROWS[10:15], silent)
    files = {*(tmp_path / "results").glob("*.manifest.json")}
    assert len(files) == 2
    assert manifest(file) == found
    assert len({manifest(each).source for each in files}) == 2

    fails = lambda request: dead(request) if " 20 times" in text_of(request) else good(request)  # noqa: E731
    site(fails).rewrite(ROWS, silent)
    third = site(good)
    third.rewrite(ROWS, silent, again=True)
    whole = manifest(third.keep_manifest(ROWS, third.results.find(ROWS) or []))
    assert (whole.calls, whole.names, whole.counts) == (15 + 1, 15, {"rewritten": 30})


def test_a_manifest_that_is_none_is_named_with_what_to_do(site: Site, tmp_path: Path) -> None:
    """It is read where calls are added to those that it tells of, and no link is followed to it."""
    rephraser, elsewhere = site(good), tmp_path / "elsewhere.json"
    rephraser.rewrite(ROWS[:3], silent)
    outcomes = rephraser.results.find(ROWS[:3]) or []
    (file,) = (tmp_path / "results").glob("*.manifest.json")
    whole = file.read_bytes()

    for damaged in (b"", b"{}", b"\xff", whole[:-9]):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"manifest\.json: .* Remove the file: it is written anew\."):
            rephraser.keep_manifest(ROWS[:3], outcomes, Used(calls=1))
        assert rephraser.keep_manifest(ROWS[:3], outcomes) == file  # nothing was made, so nothing is read
        assert file.read_bytes() == damaged
    elsewhere.write_bytes(whole)
    file.unlink()
    file.symlink_to(elsewhere)
    with pytest.raises(RunFolderError, match="got a link to"):
        rephraser.keep_manifest(ROWS[:3], outcomes, Used(calls=1))
    file.unlink()
    rephraser.keep_manifest(ROWS[:3], outcomes, Used(calls=1))
    assert manifest(file) == replace(manifest(elsewhere), calls=1, tokens=0)


JUDGED = replace(OatRephraseConfig(), gate_pairs=1).filled(COPA)


def honest(request: Request) -> str:
    if request.schema is None:
        return good(request)
    a, b = (json.loads(request.messages[-1].content.rsplit(f"text {name}: ", 1)[1].split("\n")[0]) for name in "AB")
    denied = re.search(r"\bnot\b|\bfalse\b|\bnever\b", b)
    alike = b == a.replace("saw", "met") or (a[:-1].casefold() in b.casefold() and not denied)
    return json.dumps({"verdict": "same" if alike else "different", "predicted_label": "choice1"})


def test_other_weights_need_a_test_of_their_own_and_results_name_the_one_that_they_had(
    site: Site, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = site(honest, JUDGED)
    with pytest.raises(EndpointError, match="judge-test"):
        first.rewrite(ROWS, silent)
    assert asked(first) == 0
    passed = first.test_judge(ROWS, most=30, on_progress=silent)
    keep(passed, first.folder)
    first.rewrite(ROWS[:20], silent)

    monkeypatch.setattr(scripted, "fingerprint", lambda self, model: f"{model} other weights")
    other = site(honest, JUDGED)
    with pytest.raises(EndpointError, match="no test of this model"):
        other.rewrite(ROWS, silent)
    assert asked(other) == 0
    second = other.test_judge(ROWS[5:], most=25, on_progress=silent)
    assert second.judge != passed.judge
    keep(second, other.folder)
    other.rewrite(ROWS, silent)

    outcomes = other.results.find(ROWS) or []
    told = manifest(other.keep_manifest(ROWS, outcomes))
    assert sorted(told.judged.values()) == [10, 20]
    assert told.calibration == passed == other.judge_test(outcomes)
    assert other.judge_test(outcomes[20:]) == second


def test_a_judge_that_says_what_is_named_first_is_found_out_by_asking_in_both_orders(site: Site) -> None:
    def first_named(request: Request) -> str:
        told = request.messages[-1].content
        first = min(("same", "different"), key=lambda word: told.index(f"- {word}:"))
        assert request.schema is not None
        assert request.schema["properties"]["verdict"]["enum"][0] == first
        return json.dumps({"verdict": first, "predicted_label": "choice1"})

    found = site(first_named, JUDGED).test_judge(ROWS, most=5, on_progress=silent)

    assert (found.sensitivity.share, found.specificity.share, found.order_points) == (0.0, 0.0, 1.0)


def test_a_judges_test_names_a_row_that_does_not_fit(site: Site) -> None:
    rephraser = site(honest, JUDGED, max_tokens=10)
    with pytest.raises(ConfigError, match="row 30 must have text in the column 'premise', got a row with the columns"):
        rephraser.test_judge([*ROWS, {"text": "x"}], most=30, on_progress=silent)

    with rephraser.course() as course:
        requests = [request for row in ROWS for request in course.requests(row)]
        most = max(course.backend.count_tokens(request) + request.max_tokens for request in requests)
    with pytest.raises(ConfigError, match=rf"at most {most} tokens, a pair made from row \d+ has \d+"):
        site(honest, JUDGED, context_tokens=most, max_tokens=10).test_judge(ROWS, most=30, on_progress=silent)
    assert asked(rephraser) == 0


def test_a_judges_test_has_rows_of_all_labels_however_the_data_are_sorted(site: Site) -> None:
    rows = [{**row, "label": number // 15} for number, row in enumerate(ROWS)]
    rephraser = site(honest, JUDGED)

    rephraser.test_judge(rows, most=10, on_progress=silent)

    chats = [request.messages[-1].content for request in rephraser.backend.asked]  # type: ignore[attr-defined]
    judged = {int(re.findall(r"Anna (\d+) times", chat.rsplit("text A: ", 1)[1])[0]) for chat in chats}
    assert len(judged) == 10
    assert {number // 15 for number in judged} == {0, 1}


def test_a_run_says_once_that_rows_have_another_models_text(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """As the second job of a sweep over models finds them in the store of the first."""
    site(good, model="scripted").rewrite(ROWS[:20], silent)
    same, other = OatRephrase(site(good, model="scripted")), OatRephrase(site(good, model="other"))

    same.apply(ROWS[:20], client=0, on_progress=silent)
    assert caplog.messages == []

    for client, part in enumerate((ROWS[10:], ROWS[:10])):
        other.apply(part, client=client, on_progress=silent)
    (told,) = caplog.messages
    assert "10 of 20 rows had results already, by scripted: rewriter.model=other is not asked for them" in told
    assert "set rewriter.store to another folder" in told


# --- what is not training text ----------------------------------------------------------------------------------------

ANSWERS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["same", "not the same", '{"verdict": "same", "predicted_label": "choice1"}', "He met Anna twice."]
    ),
    st.sampled_from([*RowReason]).map(RowFault),
    st.just(None),  # an honest answer
)


@settings(max_examples=20, deadline=None)
@given(st.lists(ANSWERS, min_size=1, max_size=10), st.sampled_from([0.1, 0.5]), st.booleans())
def test_held_out_dev_and_test_rows_are_the_same_bytes_for_any_backend(
    answers: list[Any], share: float, judged: bool
) -> None:
    """Rows go all the way from a file to two clients; none but training text is ever sent."""
    from tests.unit.data.rephrase.conftest import Scripted

    turn, sent = iter(itertools.cycle(answers)), []

    def reply(request: Request) -> Any:
        if request.schema is None:
            sent.append(text_of(request))
        answer = next(turn)
        return good(request) if answer is None else answer

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr(REWRITERS, "build", lambda config: Scripted(reply))
        patch.setattr(course_module, "MAX_FAILED", 1.0)
        patch.setattr(caller_module, "MAX_FAULTS", 1.0)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        before = (folder / "train.jsonl").read_bytes()
        config = load(["task=copa", f"data.path={folder}", "partition=iid", "split.num_dev=6", "split.num_test=6"])
        rephraser = Rephraser(replace(RECIPE, judged=judged), COPA, RewriterConfig(), folder / "site")
        given_rows, plain = (
            SimulatedRows(config.data, config.split, config.task, config.partition, num_clients=2, seed=0)
            for _ in range(2)
        )
        kept = []
        for client in range(2):
            stages = {"oat_rephrase": OatRephrase(rephraser)}
            staged = client_rows(given_rows, client, share=share, seed=0, stages=stages)
            untouched = client_rows(plain, client, share=share, seed=0)
            assert _bytes(staged.heldout) == _bytes(untouched.heldout)
            assert _bytes(_without(staged.train)) == _bytes(_without(untouched.train))
            kept += untouched.heldout
        assert _bytes(given_rows.splits.dev) == _bytes(plain.splits.dev)
        assert _bytes(given_rows.splits.test) == _bytes(plain.splits.test)
        assert (folder / "train.jsonl").read_bytes() == before
    secret = {row["premise"] for row in (*kept, *plain.splits.dev, *plain.splits.test)}
    assert len(secret) >= 14
    assert not secret & {*sent}


def _bytes(rows: list[Row]) -> bytes:
    return json.dumps(rows).encode()


def _without(rows: list[Row]) -> list[Row]:
    return [{**row, "premise": ""} for row in rows]
