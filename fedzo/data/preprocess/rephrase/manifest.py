"""What is told of a set of rewritten rows, beside the results: how it was made, and what it took."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import fedzo
from fedzo.data.files import Row
from fedzo.data.preprocess.backend import RewriterConfig
from fedzo.data.preprocess.rephrase.caller import Totals
from fedzo.data.preprocess.rephrase.checks import lost_names
from fedzo.data.preprocess.rephrase.course import counts
from fedzo.data.preprocess.rephrase.results import set_digest
from fedzo.records.rephrase import Manifest, RowOutcome

if TYPE_CHECKING:
    from fedzo.data.preprocess.rephrase.rephraser import Rephraser


@dataclass(frozen=True, slots=True)
class Used:
    """What some rows took: calls, tokens of prompts and answers, and cost by the site's prices."""

    calls: int = 0
    tokens: int = 0
    cost: float = 0.0

    @classmethod
    def of(cls, totals: Totals, rewriter: RewriterConfig, since: Totals | None = None) -> Used:
        """What a caller did, since some earlier totals of it."""
        begin = since or Totals()
        prompt, answer = totals.prompt_tokens - begin.prompt_tokens, totals.answer_tokens - begin.answer_tokens
        return cls(totals.calls - begin.calls, prompt + answer, rewriter.cost(prompt, answer))


def count_names(rows: Sequence[Row], outcomes: Sequence[RowOutcome]) -> int:
    """Accepted rewrites that lost a name of the original or brought one in: a warning, no fault."""
    pairs = zip(rows, outcomes, strict=True)
    return sum(not each.reason and bool(lost_names(each.text, str(row[each.column]))) for row, each in pairs)


def manifest_of(rephraser: Rephraser, rows: Sequence[Row], outcomes: Sequence[RowOutcome], used: Used) -> Manifest:
    """What is told of a set of rows.

    Args:
        rephraser: The recipe at the site.
        rows: As they were.
        outcomes: What became of each.
        used: What they took, all in all.
    """
    recipe = rephraser.config
    texts = "".join(f"{each.row}{hashlib.sha256(each.text.encode()).hexdigest()}" for each in outcomes)
    judged = recipe.judged and not recipe.imported
    return Manifest(
        fedzo=fedzo.__version__,
        recipe=rephraser.results.recipe,
        settings=json.dumps(asdict(recipe), sort_keys=True),
        task=rephraser.task.name,
        column=recipe.column,
        source=set_digest(outcomes),
        results=hashlib.sha256(texts.encode()).hexdigest(),
        counts=counts(outcomes),
        names=count_names(rows, outcomes),
        models=tuple(sorted({each.model for each in outcomes if each.model}))[:100],
        gate="unjudged" if not judged else "passed" if recipe.gate else "overridden",
        judged=dict(sorted(Counter(each.judged for each in outcomes if each.judged).items())),
        calibration=rephraser.judge_test(outcomes),
        calls=used.calls,
        tokens=used.tokens,
        cost=used.cost,
    )
