"""``fedzo rephrase --dry-run``: what would be asked, and what it would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from fedzo.commands.rephrase import STAGE, Work
from fedzo.data.preprocess.backend import RewriterConfig
from fedzo.data.preprocess.rephrase.config import Check
from fedzo.data.preprocess.rephrase.course import TOO_LONG, Attempt, Course
from fedzo.errors import printable
from fedzo.report.format import counted

_VERDICT_TOKENS = 20
MAX_LINE = 100_000
"""Longest line of a prompt that is shown, in characters."""
_UNASKED = {
    TOO_LONG: "the prompt and its answer are longer than rewriter.context_tokens or the model allows",
    str(Check.anchors): "the text lacks words that every rewrite must have",
}
"""Why a row keeps its text without a call."""


def dry_run(work: Work, number: int) -> Iterator[str]:
    """The prompts of the first rows, and what the whole set would take; yields lines for people. Makes no call.

    Args:
        work: Recipe and rows.
        number: Rows whose prompts are shown.

    Raises:
        ConfigError: A row does not fit the task, or too many prompts have no room in the context.
    """
    rephraser, prompts = work.rephraser, work.rephraser.prompts
    with rephraser.course() as course:
        attempts = [*course.check_rows(work.rows).values()]
        for row in work.rows[:number]:
            for request in course.requests(row):
                for message in request.messages:
                    yield f"[{message.role}]"
                    yield from (printable(line, most=MAX_LINE) for line in message.content.splitlines())
                yield "-" * 60
        yield from _estimate(course, rephraser.rewriter, attempts, len(work.rows))
    yield f"prompts: preprocess.{STAGE}.prompt={prompts.digest}"


def _estimate(course: Course, rewriter: RewriterConfig, attempts: Sequence[Attempt], num_rows: int) -> Iterator[str]:
    """What the whole set would take: if each row is accepted at once, and at most, with all attempts."""
    config = course.config
    prompts = [0, 0]  # of rewrites, and of verdicts
    answers = 0
    rows = [each.row for each in attempts if each.outcome is None]
    for row in rows:
        for kind, request in enumerate(course.requests(row)):
            prompts[kind] += course.backend.count_tokens(request)
        answers += len(str(row[course.prompts.column]).encode("utf-8", "replace")) // 3 + 1
    rewrites, verdicts = config.max_attempts, 1 + config.max_attempts if config.judged else 0
    yield f"{num_rows} rows, at most {len(rows) * (rewrites + verdicts)} calls"
    for reason, number in Counter(each.outcome.reason for each in attempts if each.outcome is not None).items():
        yield f"without a call: {counted(number, 'row')} ({_UNASKED[reason]})"
    first = prompts[0] + 2 * prompts[1], answers + (2 * _VERDICT_TOKENS * len(rows) if config.judged else 0)
    longer = rewriter.max_tokens * len(rows) * config.max_attempts if config.judged else 0
    max_answers = len(rows) * (rewrites * rewriter.max_tokens + verdicts * course.judge_tokens)
    for what, prompt, answer in (
        ("if each is accepted at once, about", *first),
        ("at most", rewrites * prompts[0] + verdicts * prompts[1] + longer, max_answers),
    ):
        cost = f"{rewriter.cost(prompt, answer):.2f} by the prices"
        if not (rewriter.price_prompt or rewriter.price_answer):
            cost = "no prices given: rewriter.price_prompt and rewriter.price_answer, for a million tokens"
        yield f"{what} {prompt:,} tokens of prompts and {answer:,} of answers ({cost})"
