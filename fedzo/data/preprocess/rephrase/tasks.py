"""What the rewriter and the judge are told of a task: its columns, what it asks, what its labels mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedzo.data.config import TaskConfig
from fedzo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RephraseTask:
    """A task as the prompts tell it.

    Attributes:
        column: The column that is rewritten.
        shown: The other columns that belong to the question, in the order in which they are shown.
        about: What the task asks, as a full sentence.
        labels: Meaning of each label, in the order of the task's candidates; a name in braces is a column. Empty for a
            task whose answer is written.
        choices: Columns that hold the answers to choose from, in the order of the labels.
        anchors: Columns whose text must still occur in the rewritten one.
        answer_words: Words that give an answer away where a rewrite brings them in, for each label.
    """

    column: str
    shown: tuple[str, ...]
    about: str
    labels: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    answer_words: tuple[tuple[str, ...], ...] = ()


_ENTAILED = ("yes", "true", "entailment", "entails", "entailed")
_NOT_ENTAILED = ("no", "false", "contradiction", "contradicts", "contradicted")
_NEITHER = ("maybe", "neutral", "neither")
_SENTIMENT = (("negative", "terrible"), ("positive", "great"))

TASKS = {
    "copa": RephraseTask(
        "premise",
        ("question", "choice1", "choice2"),
        "Given a premise, the task is to choose which of two alternatives is its more plausible cause or effect.",
        ("{choice1}", "{choice2}"),
        choices=("choice1", "choice2"),
    ),
    "cb": RephraseTask(
        "premise",
        ("hypothesis",),
        "Given a premise, the task is to say whether its writer commits to the hypothesis, denies it, or does neither.",
        ("entailment", "contradiction", "neutral"),
        answer_words=(_ENTAILED, _NOT_ENTAILED, _NEITHER),
    ),
    "rte": RephraseTask(
        "premise",
        ("hypothesis",),
        "Given a premise, the task is to say whether the hypothesis follows from it.",
        ("entailment", "not entailment"),
        answer_words=(_ENTAILED, _NOT_ENTAILED),
    ),
    "boolq": RephraseTask(
        "passage",
        ("question",),
        "Given a passage, the task is to answer a yes-or-no question about it.",
        ("no", "yes"),
        answer_words=(("no", "false"), ("yes", "true")),
    ),
    "multirc": RephraseTask(
        "paragraph",
        ("question", "answer"),
        "Given a paragraph and a question, the task is to say whether a candidate answer is correct.",
        ("the answer is wrong", "the answer is correct"),
        answer_words=(("no", "false", "wrong", "incorrect"), ("yes", "true", "correct")),
    ),
    "wic": RephraseTask(
        "sentence1",
        ("word", "sentence2"),
        "Given a word and two sentences, the task is to say whether the word has the same meaning in both.",
        ("different meanings", "the same meaning"),
        anchors=("word",),
        answer_words=(("no", "false"), ("yes", "true")),
    ),
    "wsc": RephraseTask(
        "text",
        ("span1_text", "span2_text"),
        "Given a text, the task is to say whether the pronoun (span2_text) refers to the noun phrase (span1_text).",
        ("it does not refer to it", "it refers to it"),
        anchors=("span1_text", "span2_text"),
        answer_words=(("no", "false"), ("yes", "true")),
    ),
    "squad": RephraseTask(
        "context",
        ("question", "answer"),
        "Given a passage, the task is to answer a question with words of the passage.",
        anchors=("answer",),
    ),
    "sst2": RephraseTask(
        "text",
        (),
        "The task is to say whether a sentence of a film review is negative or positive.",
        ("negative", "positive"),
        answer_words=_SENTIMENT,
    ),
    "rotten_tomatoes": RephraseTask(
        "text",
        (),
        "The task is to say whether a sentence of a film review is negative or positive.",
        ("negative", "positive"),
        answer_words=_SENTIMENT,
    ),
    "yelp": RephraseTask(
        "text",
        (),
        "The task is to say whether a review of a business is negative or positive.",
        ("negative", "positive"),
        answer_words=_SENTIMENT,
    ),
    "ag_news": RephraseTask(
        "text",
        (),
        "The task is to say what a news text is about.",
        ("world", "sports", "business", "technology"),
        answer_words=(("world",), ("sports",), ("business",), ("technology", "tech")),
    ),
}
"""By ``task.name``."""


def misplaced(told: RephraseTask, candidates: Sequence[str]) -> str | None:
    """The first candidate that stands for another label than that of its place; None if there is none.

    Only words that are known to be an answer can tell: others mean what stands at their place.
    """
    for place, candidate in enumerate(candidates):
        word = candidate.strip().casefold()
        means = [label for label, words in enumerate(told.answer_words) if word in words]
        means += [label for label, name in enumerate(told.labels) if word == name]
        if means and place not in means:
            return candidate
    return None


def rephrase_task(task: TaskConfig) -> RephraseTask:
    """What the prompts tell of a task.

    Raises:
        ConfigError: Nothing is known of it.
    """
    if task.name not in TASKS:
        known = ", ".join(sorted(TASKS))
        raise ConfigError(f"oat_rephrase must know the task, got task.name={task.name!r}. Known: {known}.")
    return TASKS[task.name]
