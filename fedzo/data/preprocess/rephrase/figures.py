"""What a whole set of rewrites does to its rows: leaks into the answers, words shared with the other fields, length.

A single rewrite cannot show these: new words of the right choice are leakage only where they outnumber those of the
wrong ones, and training rows that share fewer words with their hypothesis than dev and test rows are a drift of the
whole set. Both were counted on published sets (docs/how-to-rephrase-data.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

from fedzo.data.files import Row
from fedzo.data.preprocess.rephrase.checks import leaking_labels
from fedzo.data.preprocess.rephrase.tasks import RephraseTask
from fedzo.data.words import words


@dataclass(frozen=True, slots=True)
class Overlap:
    """Mean share of the other field's words that are found in the rewritten column, over rows with one label.

    Attributes:
        rows: How many.
        before: With the original text.
        after: With the rewritten text.
    """

    rows: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class SetFigures:
    """Figures of a set of rewrites. They tell of labels: for the site's own page, never for the server.

    Attributes:
        leaks_right: Rewrites with a new word that belongs to the right answer only.
        leaks_wrong: Rewrites with a new word that belongs to one wrong answer only.
        overlap: By label, in the order of labels; empty for tasks of choices, without another field or without labels.
            Of several other fields the words are taken together.
        words_before: Mean words of the original texts.
        words_after: Mean words of the rewritten texts.
    """

    leaks_right: int
    leaks_wrong: int
    overlap: dict[int, Overlap]
    words_before: float
    words_after: float

    @classmethod
    def of(
        cls, pairs: Iterable[tuple[Row, str]], *, task: RephraseTask, column: str, label_of: Callable[[Row], int | None]
    ) -> SetFigures:
        """Count.

        Args:
            pairs: Each original row and its rewritten text; none gives zeros.
            task: Of the rows.
            column: The rewritten one.
            label_of: Number of a row's right answer; None where it has none.
        """
        right = wrong = 0
        shares: dict[int, list[tuple[float, float]]] = defaultdict(list)
        lengths: list[tuple[int, int]] = []
        for row, text in pairs:
            before, after = words(str(row[column])), words(text)
            lengths.append((len(before), len(after)))
            if (truth := label_of(row)) is None:
                continue
            leaking = leaking_labels(after, before, row=row, task=task)
            right += truth in leaking
            wrong += bool(leaking - {truth})
            # The question of a choice is no text beside the rewritten one, so nothing is shared there.
            fields = () if task.choices else task.others(column)
            other = {word for name in fields for word in words(str(row[name]))}
            if other:
                found = (len(other.intersection(each)) / len(other) for each in (before, after))
                shares[truth].append((next(found), next(found)))
        return cls(
            right,
            wrong,
            {truth: Overlap(len(each), *map(fmean, zip(*each, strict=True))) for truth, each in sorted(shares.items())},
            *(map(fmean, zip(*lengths, strict=True)) if lengths else (0.0, 0.0)),
        )
