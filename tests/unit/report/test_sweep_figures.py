"""The figures of a sweep: names of jobs have room, and points that have no name are no accident."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from fedzo.records.metrics import CentralScore
from fedzo.report.style import Picture
from fedzo.report.sweep_figures import draw_sweep


def job(name: str, value: float, num_bytes: int, *, lower_is_better: bool = False, tested: bool = True) -> Any:
    """A finished job as the figures ask for it."""
    scores = [
        CentralScore(
            seconds=1.0,
            split="test",
            round=done,
            metric="accuracy",
            value=number,
            loss=0.5,
            num_examples=10,
            lower_is_better=lower_is_better,
        )
        for done, number in ((0, 0.5), (5, value))
    ]
    return SimpleNamespace(
        summary=SimpleNamespace(),
        cost=SimpleNamespace(bytes_per_client=num_bytes),
        in_words=lambda keys: name,
        scores=lambda split: scores if tested and split == "test" else None,
    )


def drawn(jobs: list[Any]) -> dict[str, Picture]:
    return {picture.name: picture for picture in draw_sweep(jobs, ["lr"])}


def names_within(picture: Picture) -> list[str]:
    """The names beside points, each of which is inside the figure."""
    picture.figure.canvas.draw()
    (axes,) = picture.figure.axes
    edge = picture.figure.bbox
    for label in axes.texts:
        box = label.get_window_extent()
        assert edge.x0 <= box.x0 < box.x1 <= edge.x1, label.get_text()
        assert edge.y0 <= box.y0 < box.y1 <= edge.y1, label.get_text()
    return [label.get_text() for label in axes.texts]


@pytest.mark.parametrize(
    ("payloads", "lower_is_better", "named", "better"),
    [
        ((4_000, 40_000), False, ["46", "47"], "Up"),
        ((40_000, 4_000), False, ["47"], "Up"),  # the best of all sent little
        ((4_000, 40_000), True, ["0"], "Down"),
    ],
)
def test_of_many_jobs_those_are_named_that_no_other_beats_with_as_few_bytes(
    payloads: tuple[int, int], lower_is_better: bool, named: list[str], better: str
) -> None:
    jobs = [job(str(k), 0.6 + k / 1000, payloads[k % 2], lower_is_better=lower_is_better) for k in range(48)]

    picture = drawn(jobs)["bytes"]

    assert names_within(picture) == named
    (axes,) = picture.figure.axes
    assert len(axes.lines) == 48
    assert axes.get_position().height > 0.5
    assert picture.caption.startswith(f"{better} and to the left is better.")
    assert "Only jobs are named that no other beats" in picture.caption


def test_of_few_jobs_all_are_named() -> None:
    picture = drawn([job(str(k), 0.6 + k / 1000, 4_000 * (1 + k % 2)) for k in range(20)])["bytes"]

    assert sorted(names_within(picture), key=int) == [str(k) for k in range(20)]
    assert "Only jobs are named" not in picture.caption


def test_a_name_of_a_long_path_leaves_room_and_keeps_its_end() -> None:
    """A layout that collapses warns, which is an error here."""
    path = "/srv/somebody/" + "federated/reviews/" * 9
    jobs = [job(f"{path}version-{k}", 0.6 + k / 10, 4_000 * (1 + k)) for k in range(3)]

    pictures = drawn(jobs)

    for picture in pictures.values():
        names_within(picture)
        assert picture.figure.axes[0].get_position().width > 0.5, picture.name
    ticks = [text.get_text() for text in pictures["sweep"].figure.axes[0].get_yticklabels()]
    assert [re.sub(".*…", "", text) for text in ticks] == [f"eviews/version-{k}"[-16:] for k in (2, 1, 0)]
    assert all(len(text) == 32 for text in ticks)


def test_a_job_that_has_no_score_of_the_others_kind_is_counted() -> None:
    jobs = [job("a", 0.6, 4_000), job("b", 0.7, 4_000), job("c", 0.7, 4_000, tested=False)]

    assert drawn(jobs)["sweep"].caption.endswith(" 1 finished job without test scores: not shown.")
    assert "not shown" not in drawn(jobs[:2])["sweep"].caption
