"""What is told of a set of rewritten rows, beside the results: how it was made, and what it took."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import fedzo
from fedzo.data.config import TaskConfig
from fedzo.data.files import Row
from fedzo.data.preprocess.backend import RewriterConfig
from fedzo.data.preprocess.rephrase.caller import Totals
from fedzo.data.preprocess.rephrase.checks import lost_names
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.data.preprocess.rephrase.course import counts
from fedzo.data.preprocess.rephrase.gate import find_test
from fedzo.data.preprocess.rephrase.results import Results, set_digest
from fedzo.errors import ConfigError
from fedzo.records.decode import decode_json, to_json
from fedzo.records.folder import replace_file, told_as
from fedzo.records.rephrase import JudgeTest, Manifest, RowOutcome


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


def judge_test_of(outcomes: Sequence[RowOutcome], folder: Path) -> JudgeTest | None:
    """The test that the judge had had when most of these rows were judged; None where it had none."""
    found = Counter(each.judged for each in outcomes if each.judged).most_common(1)
    return find_test(folder, found[0][0]) if found else None


def write_manifest(
    rows: Sequence[Row],
    outcomes: Sequence[RowOutcome],
    *,
    recipe: OatRephraseConfig,
    task: TaskConfig,
    results: Results,
    used: Used | None,
) -> Path:
    """Write the manifest of a set; returns the file.

    Args:
        rows: As they were.
        outcomes: What became of each.
        recipe: How.
        task: What the rows are for.
        results: Where the site keeps the results.
        used: What it took now, which is added to what it took before; None where nothing was made: a manifest that is
            there stays as it is.

    Raises:
        ConfigError: The file cannot be written.
    """
    file = results.file_of_set(outcomes, ".manifest.json")
    with told_as(
        ConfigError, f"{file}: it must be readable and writable", "Make room, or choose another rewriter.store."
    ):
        before = file.read_text(encoding="utf-8") if file.exists() else None
        if before is not None and used is None:
            return file
        took = used or Used()
        if before is not None:
            remedy = "Remove the file: it is written anew."
            old = decode_json(Manifest, before, where=str(file), error=ConfigError, remedy=remedy)
            took = Used(old.calls + took.calls, old.tokens + took.tokens, old.cost + took.cost)
        manifest = _manifest(rows, outcomes, recipe=recipe, task=task, results=results, used=took)
        replace_file(file, to_json(manifest) + "\n", durable=True, mode=0o600)
    return file


def _manifest(
    rows: Sequence[Row],
    outcomes: Sequence[RowOutcome],
    *,
    recipe: OatRephraseConfig,
    task: TaskConfig,
    results: Results,
    used: Used,
) -> Manifest:
    texts = "".join(f"{each.row}{hashlib.sha256(each.text.encode()).hexdigest()}" for each in outcomes)
    judged = recipe.judged and not recipe.imported
    return Manifest(
        fedzo=fedzo.__version__,
        recipe=results.recipe,
        settings=json.dumps(asdict(recipe), sort_keys=True),
        task=task.name,
        column=recipe.column,
        source=set_digest(outcomes),
        results=hashlib.sha256(texts.encode()).hexdigest(),
        counts=counts(outcomes),
        names=count_names(rows, outcomes),
        models=tuple(sorted({each.model for each in outcomes if each.model}))[:100],
        gate="unjudged" if not judged else "passed" if recipe.gate else "overridden",
        judged=dict(sorted(Counter(each.judged for each in outcomes if each.judged).items())),
        calibration=judge_test_of(outcomes, results.folder),
        calls=used.calls,
        tokens=used.tokens,
        cost=used.cost,
    )
