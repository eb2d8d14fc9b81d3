"""The recipe: what all peers of a run agree on about rewriting. Who rewrites is the site's own (``backend``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from fedzo.data.preprocess.stage import StageConfig


class Style(StrEnum):
    """What the rewriter is asked for beside the same meaning."""

    oat = "oat"
    """Text that helps zeroth-order estimates, as four wishes distilled from MeZO's paper."""
    plain = "plain"
    """A paraphrase without a word on optimisation: the control that decides whether ``oat`` means anything."""
    paper = "paper"
    """A paraphrase, with what MeZO is and its paper's claims told to the rewriter: an early form of ``oat``."""


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
    """Rewrites one column of the training rows by a language model, behind checks and a judge (OAT-Rephrase)."""

    style: Style = Style.oat
    column: str = ""
    """The column that is rewritten. Empty = that of the task."""
    prompt: str = ""
    """SHA-256 of the prompts and their examples, as ``fedzo rephrase --dry-run`` prints it. Empty = those of this fedzo
    without examples."""
    checks: list[Check] = field(default_factory=lambda: list(Check))
    """What a rewrite must pass before the judge sees it."""
    least_length: float = 0.4
    """Fewest words of a rewrite, as a multiple of the original's. A guess: the paper has no such rule."""
    most_length: float = 2.0
    """Most words of a rewrite, as a multiple of the original's, or ``most_more_words`` more. A guess, too."""
    most_more_words: int = 6
    """How many words a rewrite may have more than the original however short that is."""
    max_attempts: int = 1
    """Rewrites that are asked for until one is accepted; 1 is what the paper's authors do."""
    judged: bool = True
    """Whether a judge decides on what passes the checks."""
    gate: bool = True
    """Whether the judge must have passed its test (``fedzo rephrase judge-test``) before it judges."""
    gate_share: float = 0.95
    """Least share of right verdicts in that test, on pairs that mean the same and on pairs that do not."""
    gate_order_points: float = 0.10
    """Most that the share of "same" may change with the order in which the verdicts are named. A guess."""
    gate_pairs: int = 60
    """Fewest pairs of each kind in that test. A guess."""
