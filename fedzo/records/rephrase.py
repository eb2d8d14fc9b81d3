"""What rewriting leaves on a site's disk: one line a row, and what is known of a judge. None of it is ever sent."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fedzo.records.fields import Count, Hash, HashOrEmpty, Length, Magnitude, Matching, Name, OmitDefault, Share, Within

VERSION = 1
MAX_CHARS = 1 << 24
RowDigest = Annotated[str, Matching(re.compile("[0-9a-f]{32}"), "32 hexadecimal digits")]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOutcome:
    """What became of one row.

    Attributes:
        row: Digest of the row as it was.
        column: The column in question.
        text: What stands in it now.
        status: ``rewritten``, or ``original`` where the text stays.
        reason: Why it stays; empty for a rewritten row.
        model: What the rewriter's answer said that it is from; empty where there is none.
        judged: Digest of the test of its judge (``JudgeTest``); empty where there was none.
    """

    row: RowDigest
    column: Name
    text: Annotated[str, Length(0, MAX_CHARS)]
    status: Literal["rewritten", "original"]
    reason: Annotated[str, Length(0, 60)]
    model: Annotated[str, Length(0, 1000)]
    judged: Annotated[HashOrEmpty, OmitDefault()] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A share and its 95 % interval (Wilson)."""

    share: Share
    low: Share
    high: Share


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCounts:
    """Verdicts on one kind of pairs.

    Attributes:
        made: How the second text was made from the first.
        pairs: How many.
        same: Judged the same, with the verdicts named in either order.
        unread: Answers that were no verdict, in either order.
        cut_off: Those of them that ended early or were blank.
    """

    made: Name
    pairs: Count
    same: tuple[Count, Count]
    unread: tuple[Count, Count]
    cut_off: Annotated[tuple[Count, Count], OmitDefault()] = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeTest:
    """How well a judge tells pairs apart whose answer is known.

    Attributes:
        version: Of this record.
        judge: Digest of the judge: its model, its prompts and the task.
        model: What its answers say that they are from.
        sensitivity: Pairs of the same meaning that it called the same; of the two orders the lower share.
        specificity: Pairs of another meaning that it did not call the same; of the two orders the lower share.
        order_points: By how much the share of "same" over all pairs differs between the two orders.
        order_points_high: Upper end of its 95 % interval (Wald's, for paired shares).
        kinds: Counts a kind of pairs.
    """

    version: Annotated[int, Within(VERSION, VERSION)] = VERSION
    judge: Hash
    model: Annotated[str, Length(0, 1000)]
    sensitivity: Interval
    specificity: Interval
    order_points: Share
    order_points_high: Share
    kinds: Annotated[tuple[PairCounts, ...], Length(0, 16)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was rewritten, how, and what it took.

    Attributes:
        version: Of this record.
        fedzo: Version that wrote it.
        recipe: Digest of the recipe.
        settings: The recipe as JSON.
        task: Name of the task.
        column: What was rewritten.
        source: SHA-256 of the rows as they were, in their order.
        results: SHA-256 of what stands in the column now, in the same order.
        counts: Rows by what became of them.
        names: Accepted rewrites that lost a name or brought one in: a warning.
        models: What the rewriter's answers said that they are from.
        gate: ``passed``; ``overridden`` where the recipe asks for no test of the judge; ``unjudged`` without a judge.
        judged: Rows by the digest of the test that their judge had had when they were judged.
        calibration: That test; of several the one that stands for most rows. None where there was none.
        calls: Made for it, without those whose answers were there.
        tokens: Of prompts and answers of these calls.
        cost: Of these calls, by the site's prices.
    """

    version: Annotated[int, Within(VERSION, VERSION)] = VERSION
    fedzo: Name
    recipe: Hash
    settings: Annotated[str, Length(2, 100_000)]
    task: Name
    column: Name
    source: Hash
    results: Hash
    counts: Annotated[dict[Name, Count], Length(0, 200)]
    names: Annotated[Count, OmitDefault()] = 0
    models: Annotated[tuple[Annotated[str, Length(0, 1000)], ...], Length(0, 100)]
    gate: Literal["passed", "overridden", "unjudged"]
    judged: Annotated[dict[Hash, Count], Length(0, 1000), OmitDefault()] = field(default_factory=dict)
    calibration: JudgeTest | None
    calls: Count
    tokens: Count
    cost: Magnitude
