"""The recipe: what all peers of a run agree on about rewriting. Who rewrites is the site's own (``backend``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from fedzo.data.config import TaskConfig
from fedzo.data.preprocess.backend import NoRewriterConfig, RewriterConfig
from fedzo.data.preprocess.stage import StageConfig
from fedzo.errors import ConfigError, Problem, at_least, problem
from fedzo.records.fields import HASH

if TYPE_CHECKING:
    from fedzo.config.schema import RunSettings

_KEY = "preprocess.oat_rephrase"
MAX_ATTEMPTS = 10
"""Most rewrites of a row that a run may ask a site's endpoint for, which the site pays for."""


class Style(StrEnum):
    """What the rewriter is asked for beside the same meaning."""

    oat = "oat"
    """Text that helps zeroth-order estimates, by four rules distilled from MeZO's paper."""
    plain = "plain"
    """A paraphrase, with no mention of optimisation: the control to compare ``oat`` with."""
    paper = "paper"
    """A paraphrase, by a prompt that explains MeZO and its paper's claims: an early form of ``oat``."""


class Check(StrEnum):
    """What is wrong with an answer before a judge sees it, in the order in which it is looked for."""

    empty = "empty"
    truncated = "truncated"
    lead_in = "lead_in"
    quotes = "quotes"
    line_break = "line_break"
    length = "length"
    loop = "loop"
    echo = "echo"
    numbers = "numbers"
    anchors = "anchors"
    leak = "leak"


@dataclass(kw_only=True, slots=True)
class OatRephraseConfig(StageConfig):
    """A language model rewrites one column of the training rows; checks and a judge filter it (OAT-Rephrase)."""

    style: Style = Style.oat
    column: str = ""
    """The column that is rewritten. Empty = that of the task; of a task of your own, the first of its template."""
    about: str = ""
    """What the task asks of a row: a sentence for the prompts. Empty = what is known of the task."""
    meanings: list[str] = field(default_factory=list)
    """What each of ``task.candidates`` means, in their order; a name in braces is a column. Empty = what is known of
    the task."""
    shown: list[str] = field(default_factory=list)
    """Columns that the prompts show beside the rewritten one. Empty = those of the task; of a task of your own, all
    others that it reads and that may not be blank."""
    prompt: str = ""
    """SHA-256 of the prompts and their examples, as ``fedzo rephrase --dry-run`` prints it. Empty = those of this fedzo
    without examples."""
    imported: str = ""
    """SHA-256 of a set of rewrites from elsewhere, as ``fedzo rephrase import`` prints it. Empty = the rewriter's."""
    checks: list[Check] = field(default_factory=lambda: list(Check))
    """What a rewrite must pass before the judge sees it. ``empty`` and ``truncated`` are always looked for."""
    min_length_ratio: float = 0.4
    """Fewest words of a rewrite, as a multiple of the original's. A guess: the paper has no such rule."""
    max_length_ratio: float = 2.0
    """Most words of a rewrite, as a multiple of the original's, or ``max_extra_words`` more. A guess, too."""
    max_extra_words: int = 6
    """How many words a rewrite may have more than the original however short that is."""
    max_attempts: int = 1
    """Rewrites that are asked for until one is accepted, 10 at most; 1 is what the paper's authors do."""
    judged: bool = True
    """Whether a judge decides on what passes the checks."""
    gate: bool = True
    """Whether the judge must have passed its test (``fedzo rephrase judge-test``) before it judges."""
    gate_share: float = 0.95
    """Least share of right verdicts in that test, on pairs that mean the same and on pairs that do not."""
    gate_order_points: float = 0.10
    """Most that the share of "same" may change with the order in which the verdicts are named. A guess."""
    gate_pairs: int = 60
    """Fewest pairs of the same meaning, and of another one, in that test. The test takes as many of each of its five
    kinds as the rows give, and names the kinds that it has fewer of. A guess."""

    def filled(self, task: TaskConfig) -> Self:
        """The recipe with its column and the digest of its prompts, where the task is known."""
        from fedzo.data.preprocess.rephrase.rephraser import prompts_of  # here, since prompts know this module's styles

        if self.prompt and self.column:
            return self
        try:
            prompts = prompts_of(self, task)
        except ConfigError:
            return self  # told of by ``problems``
        return replace(self, column=prompts.column, prompt=self.prompt or prompts.digest)

    def problems(self, run: RunSettings) -> Iterator[Problem]:
        from fedzo.data.preprocess.rephrase.tasks import told_problems  # here, since tasks know this module's recipes

        yield from told_problems(run.task, self)
        for key, digest in (("prompt", self.prompt), ("imported", self.imported)):
            if digest and not HASH.fullmatch(digest):
                yield problem(
                    f"{_KEY}.{key}", "be 64 hexadecimal digits, or empty", digest, "Leave it out, or copy it."
                )
        yield from at_least(f"{_KEY}.max_attempts", self.max_attempts, 1, "1 is one rewrite a row.")
        if self.max_attempts > MAX_ATTEMPTS:
            remedy = "Lower it: each one is a call that a site pays for."
            yield problem(f"{_KEY}.max_attempts", f"be <= {MAX_ATTEMPTS}", self.max_attempts, remedy)
        yield from at_least(f"{_KEY}.gate_pairs", self.gate_pairs, 1, "Or leave it out.")
        yield from at_least(f"{_KEY}.max_extra_words", self.max_extra_words, 0, "Or leave it out.")
        for key in ("gate_share", "gate_order_points"):
            if not 0 <= getattr(self, key) <= 1:
                yield problem(f"{_KEY}.{key}", "be from 0 to 1", getattr(self, key), "Or leave it out.")
        if not 0 <= self.min_length_ratio <= 1 <= self.max_length_ratio:
            bounds = [self.min_length_ratio, self.max_length_ratio]
            yield problem(
                f"{_KEY}.min_length_ratio",
                "be from 0 to 1, and max_length_ratio at least 1",
                bounds,
                "Or leave both out.",
            )

    def site_problems(self, rewriter: RewriterConfig) -> Iterator[Problem]:
        if isinstance(rewriter, NoRewriterConfig) and not self.imported:
            remedy = (
                "Set rewriter=openai_compatible with rewriter.base_url and rewriter.model, or rewriter=transformers "
                "with rewriter.model; a real site does so in its own file."
            )
            yield problem("rewriter", "name who rewrites the text at this site", "none", remedy)
