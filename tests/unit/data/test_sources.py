"""Splits: apart, stable, and refused with a message when they cannot be made."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.data import sources
from fedzo.data.config import DataConfig, SplitConfig, TaskConfig, TaskKind
from fedzo.data.sources import Splits, load_splits, own_files, read_own
from fedzo.errors import ConfigError

TASK = TaskConfig(name="mine", template="{text} It was", candidates=[" bad", " good"])


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": i % 2} for i in range(first, last)]


def write(path: Path, content: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def texts(part: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in part]


def assert_apart(splits: Splits) -> None:
    train, dev, test = set(texts(splits.train)), set(texts(splits.dev)), set(texts(splits.test))
    assert len(train | dev | test) == len(train) + len(dev) + len(test)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", rows(0, 40))
    return tmp_path


def test_missing_dev_and_test_are_drawn_from_train_and_nothing_is_lost(folder: Path) -> None:
    splits = load_splits(DataConfig(path=str(folder)), SplitConfig(num_dev=6, num_test=9), TASK)

    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [25, 6, 9]
    assert sorted(texts(splits.train + splits.dev + splits.test)) == sorted(texts(rows(0, 40)))
    assert_apart(splits)


@pytest.mark.parametrize(
    ("numbers", "sizes"),
    [
        ([i % 100 for i in range(1000)], [800, 100, 100]),  # ten rows a prompt
        ([max(0, i - 250) for i in range(1000)], [800, 100, 100]),  # a prompt of 251 rows, and 749 others
    ],
)
def test_a_prompt_is_drawn_with_all_its_rows_and_nothing_is_lost(
    numbers: list[int], sizes: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.jsonl", [{"text": f"text {number}", "label": 0} for number in numbers])

    with caplog.at_level(logging.WARNING):
        splits = load_splits(DataConfig(path=str(tmp_path)), SplitConfig(num_dev=100, num_test=100), TASK)

    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == sizes
    assert Counter(texts(splits.train + splits.dev + splits.test)) == Counter(f"text {number}" for number in numbers)
    assert_apart(splits)
    assert caplog.messages == []


def test_where_no_prompt_is_rare_enough_some_rows_of_one_are_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.jsonl", [{"text": f"text {i % 5}", "label": 0} for i in range(40)])

    with caplog.at_level(logging.WARNING):
        splits = load_splits(DataConfig(path=str(tmp_path)), SplitConfig(num_dev=3, num_test=2), TASK)

    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [24, 3, 2]
    assert_apart(splits)
    # of two prompts with eight rows each, five are dev and test rows
    assert caplog.messages == ["data: 11 of 35 train rows have the prompt of a row of another split and are left out"]


def test_fewer_training_rows_than_are_asked_for_are_told_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = DataConfig(path=str(folder))

    with caplog.at_level(logging.WARNING):
        for num_train in (0, 25, 26):
            assert len(load_splits(data, SplitConfig(num_train=num_train, num_dev=6, num_test=9), TASK).train) == 25

    assert caplog.messages == ["split.num_train=26: 25 rows are left to train on"]


def test_the_drawn_rows_are_the_same_on_every_machine(folder: Path) -> None:
    splits = load_splits(DataConfig(path=str(folder)), SplitConfig(num_dev=3, num_test=4), TASK)

    assert texts(splits.dev) == ["text 7", "text 9", "text 27"]
    assert texts(splits.test) == ["text 11", "text 15", "text 17", "text 22"]


def test_the_split_seed_changes_the_split_and_the_template_does_not(folder: Path) -> None:
    data, split = DataConfig(path=str(folder)), SplitConfig(num_dev=6, num_test=9)

    first, again, other = (
        load_splits(data, split, TASK),
        load_splits(data, split, replace(TASK, template="Q: {text}")),
        load_splits(data, replace(split, seed=1), TASK),
    )

    assert first == again
    assert first.test != other.test


def test_a_larger_test_split_keeps_the_rows_of_a_smaller_one(folder: Path) -> None:
    small, large = (load_splits(DataConfig(path=str(folder)), SplitConfig(num_test=n, num_dev=0), TASK) for n in (4, 9))

    assert set(texts(small.test)) < set(texts(large.test))


@pytest.mark.parametrize("dev", ["dev", "validation", "valid", "val"])
def test_files_of_their_own_are_used_and_cut_to_the_wanted_number(dev: str, folder: Path) -> None:
    write(folder / f"{dev}.jsonl", rows(100, 120))
    write(folder / "test.jsonl", rows(200, 230))

    splits = load_splits(DataConfig(path=str(folder)), SplitConfig(num_train=10, num_dev=5, num_test=7), TASK)

    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [10, 5, 7]
    assert set(texts(splits.train)) < set(texts(rows(0, 40)))
    assert set(texts(splits.dev)) < set(texts(rows(100, 120)))
    assert set(texts(splits.test)) < set(texts(rows(200, 230)))


@pytest.mark.parametrize("name", ["Test.JSONL", "TEST.jsonl"])
def test_the_name_of_a_file_may_have_capitals(name: str, folder: Path) -> None:
    write(folder / name, rows(200, 230))

    splits = load_splits(DataConfig(path=str(folder)), SplitConfig(num_dev=0, num_test=30), TASK)

    assert texts(splits.test) == texts(rows(200, 230))


def test_a_file_that_is_not_read_is_named_where_rows_are_drawn_in_its_place(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder / "dev.jsonl", rows(100, 120))
    for name in ("test.csv.gz", "eval.jsonl", ".hidden"):
        write(folder / name, rows(200, 230))

    with caplog.at_level(logging.WARNING):
        splits = load_splits(DataConfig(path=str(folder)), SplitConfig(num_dev=5, num_test=4), TASK)

    assert caplog.messages == [
        "split.num_test=4: there is no test file (the folder also holds eval.jsonl, test.csv.gz), 4 rows are drawn "
        "from train"
    ]
    assert set(texts(splits.test)) < set(texts(rows(0, 40)))


def test_rows_keep_the_order_of_their_file(folder: Path) -> None:
    splits = load_splits(DataConfig(path=str(folder)), SplitConfig(num_train=12, num_dev=6, num_test=9), TASK)

    for part in (splits.train, splits.dev, splits.test):
        assert texts(part) == sorted(texts(part), key=lambda text: int(text.split()[1]))


def test_train_rows_with_the_text_of_a_test_or_dev_row_are_dropped(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder / "dev.jsonl", [{"text": " text 1 ", "label": 0}, {"text": "text 2", "label": 0}])
    write(folder / "test.jsonl", [{"text": "text 2", "label": 1}, {"text": "text 3", "label": 1}])

    with caplog.at_level(logging.WARNING):
        splits = load_splits(DataConfig(path=str(folder)), SplitConfig(), TASK)

    assert texts(splits.dev) == [" text 1 "]  # text 2 is a test row
    assert len(splits.train) == 37
    assert caplog.messages == [
        "data: 1 of 2 dev rows have the prompt of a row of another split and are left out",
        "data: 3 of 40 train rows have the prompt of a row of another split and are left out",
    ]
    assert not {"text 1", "text 2", "text 3"} & set(texts(splits.train))


@given(
    st.lists(st.integers(0, 9), min_size=8, max_size=40).filter(lambda numbers: len(set(numbers)) >= 5),
    st.integers(0, 2**64 - 1),
)
def test_splits_are_apart_for_any_repeated_rows(numbers: list[int], seed: int) -> None:
    located = [(f"x:{i}", {"text": f"t{n}", "label": 0}) for i, n in enumerate(numbers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "read_located", lambda path: located)
        splits = load_splits(DataConfig(path=__file__), SplitConfig(num_dev=2, num_test=2, seed=seed), TASK)

    assert_apart(splits)
    assert all((splits.train, splits.dev, splits.test))


def test_one_file_is_enough(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", rows(0, 20))

    splits = load_splits(DataConfig(path=str(tmp_path / "mine.jsonl")), SplitConfig(num_dev=2, num_test=2), TASK)

    assert len(splits.train) == 16


def test_zero_wanted_rows_leave_a_split_empty(folder: Path) -> None:
    write(folder / "test.jsonl", rows(200, 230))

    splits = load_splits(DataConfig(path=str(folder)), SplitConfig(num_dev=0, num_test=0), TASK)

    assert (len(splits.train), splits.dev, splits.test) == (40, [], [])


def test_a_draw_takes_a_quarter_of_train_at_most_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        splits = load_splits(DataConfig(path=str(folder)), SplitConfig(num_dev=4), TASK)

    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [26, 4, 10]
    assert caplog.messages == ["split.num_test=1024: there is no test file, 10 rows are drawn from train"]


def test_dev_rows_that_other_runs_are_tested_on_are_told_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = DataConfig(path=str(folder))
    tested = load_splits(data, SplitConfig(num_dev=4, num_test=4), TASK).test

    with caplog.at_level(logging.WARNING):
        assert load_splits(data, SplitConfig(num_dev=4, num_test=0), TASK).dev == tested

    (said,) = caplog.messages
    write(folder / "test.jsonl", rows(200, 230))
    load_splits(data, SplitConfig(num_dev=4, num_test=0), TASK)
    assert caplog.messages == [said]  # not where test rows have a file of their own
    assert "the dev rows are test rows of runs that have some" in said
    assert "write evaluation.test=false instead" in said


def test_without_a_path_only_the_embedded_task_has_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.EMBEDDED, "rotten_tomatoes", lambda: rows(0, 20))

    embedded = load_splits(DataConfig(), SplitConfig(num_dev=2, num_test=2), replace(TASK, name="rotten_tomatoes"))

    assert len(embedded.train) == 16
    with pytest.raises(
        ConfigError, match=r"data.path must be given for task 'mine' \(embedded: rotten_tomatoes\), got null"
    ):
        load_splits(DataConfig(), SplitConfig(), TASK)


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.jsonl: there is no such file or folder. Check data.path"):
        load_splits(DataConfig(path=str(tmp_path / "nothing.jsonl")), SplitConfig(), TASK)
    with pytest.raises(ConfigError, match=r"nowhere: there is no such file or folder"):
        load_splits(DataConfig(path=str(tmp_path / "nowhere")), SplitConfig(), TASK)


def test_a_folder_without_train_lists_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", rows(0, 2))

    with pytest.raises(ConfigError, match=r"must hold a file train.\* .*, it holds test.jsonl. Check data.path"):
        load_splits(DataConfig(path=str(tmp_path)), SplitConfig(), TASK)


def test_two_files_for_one_split_are_refused(folder: Path) -> None:
    write(folder / "dev.jsonl", rows(0, 2))
    write(folder / "validation.jsonl", rows(2, 4))

    with pytest.raises(ConfigError, match=r"one dev file must exist, got dev.jsonl, validation.jsonl"):
        load_splits(DataConfig(path=str(folder)), SplitConfig(), TASK)


def test_the_parts_of_a_file_are_read_one_after_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the Hub stores data sets."""
    for part, first in enumerate((0, 12, 24)):
        write(tmp_path / f"train-0000{part}-of-00003.jsonl", rows(first, first + 12))
    write(tmp_path / "validation-00000-of-00001.jsonl", rows(100, 110))
    write(tmp_path / "test.jsonl", rows(200, 220))

    with caplog.at_level(logging.WARNING):
        splits = load_splits(DataConfig(path=str(tmp_path)), SplitConfig(num_dev=10, num_test=20), TASK)

    assert texts(splits.train) == texts(rows(0, 36))
    assert texts(splits.dev) == texts(rows(100, 110))
    assert texts(splits.test) == texts(rows(200, 220))
    assert caplog.messages == []
    assert texts([row for _, row in read_own(tmp_path)]) == texts(rows(0, 36))
    assert [path.name for path in own_files(str(tmp_path))] == [f"train-0000{part}-of-00003.jsonl" for part in range(3)]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.jsonl"],
        ["train-00001-of-00002.jsonl"],
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.json"],
        ["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        ["train-00000-of-00001.jsonl", "train.jsonl"],
        ["train-00000-of-00000.jsonl"],
    ],
)
def test_parts_that_are_not_those_of_one_file_are_refused(names: list[str], tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / name, rows(0, 12))

    told = f"{tmp_path}: one train file must exist, got {', '.join(names)}. Keep one, with all parts that it has."
    with pytest.raises(ConfigError, match=rf"^{re.escape(told)}$"):
        load_splits(DataConfig(path=str(tmp_path)), SplitConfig(), TASK)


def test_a_missing_column_names_file_line_and_columns(folder: Path) -> None:
    write(folder / "test.jsonl", [{"text": "x", "label": 0}, {"sentence": "x", "label": 0}])

    with pytest.raises(
        ConfigError, match=r"test.jsonl:2: .*needs a column 'text', the columns there are: sentence, label"
    ):
        load_splits(DataConfig(path=str(folder)), SplitConfig(), TASK)


def test_a_label_that_is_no_candidate_names_file_and_line(folder: Path) -> None:
    write(folder / "train.jsonl", [*rows(0, 4), {"text": "x", "label": 2}])

    with pytest.raises(ConfigError, match=r"train.jsonl:5: column 'label' .*\[' bad', ' good'\], got 2"):
        load_splits(DataConfig(path=str(folder)), SplitConfig(), TASK)


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_an_empty_file_is_refused(name: str, folder: Path) -> None:
    write(folder / f"{name}.jsonl", [])

    with pytest.raises(ConfigError, match=rf"{name}.jsonl: must hold a row, got none"):
        load_splits(DataConfig(path=str(folder)), SplitConfig(), TASK)


def test_a_train_split_that_other_rows_leave_empty_is_refused(folder: Path) -> None:
    write(folder / "test.jsonl", rows(0, 40))

    with pytest.raises(
        ConfigError, match=r"the train split is empty .*lower split.num_dev and split.num_test \(0 = none\)"
    ):
        load_splits(DataConfig(path=str(folder)), SplitConfig(num_dev=0), TASK)


def test_too_few_rows_to_draw_from_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(0, 3))

    with pytest.raises(ConfigError, match="the test split is empty"):
        load_splits(DataConfig(path=str(tmp_path)), SplitConfig(), TASK)


@pytest.mark.parametrize(
    "hidden", [{"label": -1}, {"label": "-1"}, {"label": ""}, {"label": None}, {"label": float("nan")}, {}]
)
@pytest.mark.parametrize("name", ["test", "dev"])
def test_hidden_labels_say_what_to_do_about_the_file(name: str, hidden: dict[str, Any], folder: Path) -> None:
    write(folder / f"{name}.jsonl", [{"text": "x", **hidden}])

    with pytest.raises(
        ConfigError,
        match=rf"{name}.jsonl:1: the row must have a right answer, but its file hides them, .*split.num_{name}=0",
    ):
        load_splits(DataConfig(path=str(folder)), SplitConfig(), TASK)


@pytest.mark.parametrize(
    ("answer", "hidden"),
    [
        ("{label}", {"label": ""}),
        ("{label}", {"label": []}),
        ("{label}", {"label": [None]}),
        ("{label.text}", {"label": {"text": []}}),
        ("{label.text}", {"label": []}),
        ("{label.text}", {}),
    ],
)
def test_hidden_answers_are_told_of_too(answer: str, hidden: dict[str, Any], folder: Path) -> None:
    task = TaskConfig(name="mine", kind=TaskKind.generation, template="{text}", answer=answer)
    write(folder / "train.jsonl", [{"text": f"text {i}", "label": ["a"], "label.text": "a"} for i in range(40)])
    write(folder / "test.jsonl", [{"text": "x", **hidden}])

    with pytest.raises(ConfigError, match=r"test.jsonl:1: .*its file hides them"):
        load_splits(DataConfig(path=str(folder)), SplitConfig(), task)


def test_hidden_outputs_of_alpaca_are_told_of_too(folder: Path, shipped_task: Callable[[str], TaskConfig]) -> None:
    write(folder / "train.jsonl", [{"instruction": f"Say {i}.", "input": "", "output": f"{i}."} for i in range(40)])
    write(folder / "test.jsonl", [{"instruction": "Sing.", "input": "", "output": ""}])

    with pytest.raises(ConfigError, match=r"test.jsonl:1: .*its file hides them"):
        load_splits(DataConfig(path=str(folder)), SplitConfig(), shipped_task("alpaca"))


def test_a_row_for_training_without_a_label_is_no_hidden_one(folder: Path) -> None:
    write(folder / "train.jsonl", [*rows(0, 4), {"text": "x", "label": -1}])

    with pytest.raises(ConfigError, match=r"train.jsonl:5: column 'label' .*remove the row"):
        load_splits(DataConfig(path=str(folder)), SplitConfig(), TASK)


@pytest.mark.parametrize("content", ['{"text": "x", "label": -1}', "no JSON", ""])
def test_a_split_that_nobody_wants_is_not_read(content: str, folder: Path) -> None:
    for name in ("dev", "test"):
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")

    splits = load_splits(DataConfig(path=str(folder)), SplitConfig(num_dev=0, num_test=0), TASK)

    assert (len(splits.train), splits.dev, splits.test) == (40, [], [])


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("{}/rows-[1].jsonl", ["rows-[1].jsonl"]),
        ("{}/{{client}}.jsonl", ["0.jsonl", "1.jsonl"]),
        ("{}/rows-[{{client}}{{client}}].jsonl", ["rows-[1].jsonl"]),
        ("{}/sets/{{client}}", ["train.jsonl", "train.jsonl"]),
    ],
)
def test_a_sites_files_are_found_whatever_a_name_holds(path: str, found: list[str], tmp_path: Path) -> None:
    for name in ("0.jsonl", "1.jsonl", "rows-[1].jsonl", "sets/0/train.jsonl", "sets/1/train.jsonl", "sets/old/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, rows(0, 1))

    assert [file.name for file in own_files(path.format(tmp_path))] == found


@pytest.mark.parametrize("path", ["", "/", "{client}{client}", "none/{client}.jsonl"])
def test_a_path_that_names_no_file_of_a_site_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError):
        own_files(path)
