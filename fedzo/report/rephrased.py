"""Texts before and after rewriting, as a page and as lines: for the site's own eyes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

from fedzo.data.files import Row
from fedzo.data.preprocess.rephrase.checks import lost_names
from fedzo.data.preprocess.rephrase.course import Attempt, counts
from fedzo.data.preprocess.rephrase.figures import SetFigures
from fedzo.data.preprocess.rephrase.rephraser import Rephraser
from fedzo.data.tasks import right_label
from fedzo.errors import printable
from fedzo.records.rephrase import Interval, JudgeTest, RowOutcome
from fedzo.report.html import Table, render_page

_MAX_SHOWN = 200
"""Most rows on the page."""


def rephrased_page(
    rephraser: Rephraser,
    rows: Sequence[Row],
    outcomes: Sequence[RowOutcome],
    attempts: Mapping[str, Attempt],
    figures: list[list[str]],
) -> str:
    """Texts before and after; the page's template escapes what rows and endpoint wrote.

    Args:
        rephraser: The recipe at this site.
        rows: As they were.
        outcomes: What became of each.
        attempts: What else is known of those that were rewritten just now, by row digest.
        figures: Of ``figures_table``.
    """
    column = rephraser.prompts.column
    table = [["row", "before", "after", ""]]
    for number, (row, each) in enumerate(zip(rows[:_MAX_SHOWN], outcomes, strict=False)):
        refused = attempts[each.row].refused if each.row in attempts else ""
        after = each.text if not each.reason else f"(kept) {refused}" if refused else "(kept)"
        lost = () if each.reason else lost_names(each.text, str(row[column]))
        note = each.reason or (f"names: {', '.join(lost)}" if lost else "")
        table.append([str(number), _plain(row[column]), _plain(after), note])
    summary = Table("Rows", [[name, str(number)] for name, number in counts(outcomes).items()])
    shown = f"first {_MAX_SHOWN} of {len(rows)} rows" if len(rows) > _MAX_SHOWN else f"{len(rows)} rows"
    found = rephraser.judge_test(outcomes)
    return render_page(
        title=f"{rephraser.task.name}: {column} rewritten",
        subtitle=f"style {rephraser.config.style}, {shown}. Training text only; it stays at this site",
        tables=[summary, Table("Accepted rewrites", figures)],
        long_tables=[Table("Before and after", table, has_head=True)],
        details=[
            ("Recipe", json.dumps(asdict(rephraser.config), indent=2)),
            ("Judge", "\n".join(judge_test_lines(found)) if found else "no test of the judge"),
        ],
    )


def figures_table(rephraser: Rephraser, rows: Sequence[Row], outcomes: Sequence[RowOutcome]) -> list[list[str]]:
    """What the accepted rewrites do as a set: leaks, length, and words shared with the other field."""
    task, prompts = rephraser.task, rephraser.prompts
    accepted = [(row, each.text) for row, each in zip(rows, outcomes, strict=True) if not each.reason]
    if not accepted:
        return []
    label_of = partial(right_label, task=task)
    found = SetFigures.of(accepted, task=prompts.task, column=prompts.column, label_of=label_of)
    told = [["mean words", f"{found.words_before:.1f} before, {found.words_after:.1f} after"]]
    if prompts.task.choices or any(map(any, prompts.task.answer_words)):  # else nothing is counted, and 0 would mislead
        leaks = f"the right one {found.leaks_right}, a wrong one {found.leaks_wrong}"
        told.append(["rewrites that leak an answer", leaks])
    for label, overlap in found.overlap.items():
        share = f"{overlap.before:.2f} before, {overlap.after:.2f} after ({overlap.rows} rows)"
        told.append([f"share of the other field's words found, {prompts.task.labels[label]}", share])
    return told


def judge_test_lines(found: JudgeTest) -> Iterator[str]:
    """How a judge did in its test."""
    yield f"sensitivity {_share(found.sensitivity)}, specificity {_share(found.specificity)} (lower of both orders)"
    points = f"{100 * found.order_points:.1f} points (95 % interval up to {100 * found.order_points_high:.1f})"
    yield f'the share of "same" changes with the order of the verdicts by {points}'
    for each in found.kinds:
        unread = f", {sum(each.unread)} unreadable" if sum(each.unread) else ""
        unread += f" ({sum(each.cut_off)} cut off or blank)" if sum(each.cut_off) else ""
        yield f"{each.made:12} {each.pairs:4d} pairs, called the same {each.same[0]} and {each.same[1]} times{unread}"


def _share(interval: Interval) -> str:
    return f"{interval.share:.1%} (95 % interval {interval.low:.1%} to {interval.high:.1%})"


def _plain(text: object) -> str:
    return printable(str(text), most=2000)
