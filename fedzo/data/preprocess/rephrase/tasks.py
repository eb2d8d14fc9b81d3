"""What the rewriter and the judge are told of a task: its columns, what it asks, what its labels mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedzo.data.config import TaskConfig, TaskKind
from fedzo.data.derivations import DERIVATIONS
from fedzo.data.files import Row
from fedzo.data.preprocess.rephrase.config import OatRephraseConfig
from fedzo.data.tasks import FIELD, answer_columns, columns_used, lists_candidates
from fedzo.data.words import is_utf8, words
from fedzo.errors import ConfigError, Problem, problem

MAX_ABOUT, MAX_MEANING = 1000, 200
"""Most characters of what a recipe says of a task and of a label: each prompt holds them, and the site pays for it."""
_KEY = "preprocess.oat_rephrase"


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
        written: Columns that hold the answer, of a task whose answer is written.
        template: The prompt of the task's preset, for which all this is said; empty for a task of a recipe's own words.
    """

    column: str
    shown: tuple[str, ...]
    about: str
    labels: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    answer_words: tuple[tuple[str, ...], ...] = ()
    written: tuple[str, ...] = ()
    template: str = ""

    def others(self, column: str) -> tuple[str, ...]:
        """The columns that are shown beside the one that is rewritten: all of the question, whichever that is."""
        return tuple(dict.fromkeys(each for each in (self.column, *self.shown) if each != column))

    def meaning(self, label: int, row: Row) -> str:
        """What a label means, with the row's text where it names a column."""
        return FIELD.sub(lambda match: str(row[match[1]]), self.labels[label])


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
        template="{premise} {conjunction}",
    ),
    "cb": RephraseTask(
        "premise",
        ("hypothesis",),
        "Given a premise, the task is to say whether its writer commits to the hypothesis, denies it, or does neither.",
        ("entailment", "contradiction", "neutral"),
        answer_words=(_ENTAILED, _NOT_ENTAILED, _NEITHER),
        template='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
    ),
    "rte": RephraseTask(
        "premise",
        ("hypothesis",),
        "Given a premise, the task is to say whether the hypothesis follows from it.",
        ("entailment", "not entailment"),
        answer_words=(_ENTAILED, _NOT_ENTAILED),
        template='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
    ),
    "boolq": RephraseTask(
        "passage",
        ("question",),
        "Given a passage, the task is to answer a yes-or-no question about it.",
        ("no", "yes"),
        answer_words=(("no", "false"), ("yes", "true")),
        template="{passage} {question}",
    ),
    "multirc": RephraseTask(
        "paragraph",
        ("question", "answer"),
        "Given a paragraph and a question, the task is to say whether a candidate answer is correct.",
        ("the answer is wrong", "the answer is correct"),
        answer_words=(("no", "false", "wrong", "incorrect"), ("yes", "true", "correct")),
        template='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
    ),
    "wic": RephraseTask(
        "sentence1",
        ("word", "sentence2"),
        "Given a word and two sentences, the task is to say whether the word has the same meaning in both.",
        ("different meanings", "the same meaning"),
        anchors=("word",),
        answer_words=(("no", "false"), ("yes", "true")),
        template=(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
        ),
    ),
    "wsc": RephraseTask(
        "text",
        ("span1_text", "span2_text"),
        "Given a text, the task is to say whether the pronoun (span2_text) refers to the noun phrase (span1_text).",
        ("it does not refer to it", "it refers to it"),
        anchors=("span1_text", "span2_text"),
        answer_words=(("no", "false"), ("yes", "true")),
        template=(
            '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n'
        ),
    ),
    "squad": RephraseTask(
        "context",
        ("question", "answer"),
        "Given a passage, the task is to answer a question with words of the passage.",
        anchors=("answer",),
        written=("answer",),
        template="{context}\nQuestion: {question}\nAnswer:",
    ),
    "sst2": RephraseTask(
        "text",
        (),
        "The task is to say whether a sentence of a film review is negative or positive.",
        ("negative", "positive"),
        answer_words=_SENTIMENT,
        template="{text} It was",
    ),
    "rotten_tomatoes": RephraseTask(
        "text",
        (),
        "The task is to say whether a sentence of a film review is negative or positive.",
        ("negative", "positive"),
        answer_words=_SENTIMENT,
        template="Review: {text}\nSentiment: The movie was",
    ),
    "yelp": RephraseTask(
        "text",
        (),
        "The task is to say whether a review of a business is negative or positive.",
        ("negative", "positive"),
        answer_words=_SENTIMENT,
        template="{text} . It is",
    ),
    "ag_news": RephraseTask(
        "text",
        (),
        "The task is to say what a news text is about.",
        ("world", "sports", "business", "technology"),
        answer_words=(("world",), ("sports",), ("business",), ("technology", "tech")),
        template="{text} The news above is about",
    ),
}
"""By ``task.name``."""


def rephrase_task(task: TaskConfig, recipe: OatRephraseConfig) -> RephraseTask:
    """What the prompts tell of a task: what is known of it, or what the recipe says.

    Raises:
        ConfigError: Neither tells it, or the recipe's words do not fit the task.
    """
    if found := next(told_problems(task, recipe), None):
        raise ConfigError(found.text)
    return _told(task, recipe)


def usual_column(task: TaskConfig) -> str:
    """The column that is rewritten where a recipe names none: that of the task's name, else the template's first.

    Empty where the task reads neither.
    """
    named, columns = TASKS.get(task.name), _columns(task)
    if named is not None and named.column in columns:
        return named.column
    return next((each for each in columns if f"{{{each}}}" in task.template), "")


def misplaced(told: RephraseTask, candidates: Sequence[str]) -> str | None:
    """The first candidate that is not known to stand for the label of its place; None if there is none."""
    for place, (candidate, name) in enumerate(zip(candidates, told.labels, strict=False)):
        word = candidate.strip().casefold()
        if word != name and word not in (told.answer_words[place] if told.answer_words else ()):
            return candidate
    return None


def told_problems(task: TaskConfig, recipe: OatRephraseConfig) -> Iterator[Problem]:
    """Broken rules on what the prompts tell of a task.

    A preset with another template or other answers may ask anything: the recipe must say what.
    """
    if task.messages:
        rule = "be left out for oat_rephrase, whose prompts show columns of text and no conversation"
        yield problem("task.messages", rule, task.messages, "Leave preprocess out, or write texts into columns.")
        return
    if lists_candidates(task):
        rule = "name each answer for oat_rephrase, whose prompts show no list of a row"
        yield problem("task.candidates", rule, task.candidates, "Write each choice into a column of its own.")
        return
    is_known = _known(task) is not None
    if not is_known and not recipe.about:
        yield _untold(task)
        return
    for key, texts, most in (("about", [recipe.about], MAX_ABOUT), ("meanings", recipe.meanings, MAX_MEANING)):
        if any(len(each) > most or len(each.splitlines()) > 1 or not is_utf8(each) for each in texts):
            rule = f"be one line of at most {most} characters"
            yield problem(f"{_KEY}.{key}", rule, getattr(recipe, key), "Correct it.")
    told, count = _told(task, recipe), len(_candidates(task))
    if (recipe.meanings or not is_known) and len(recipe.meanings) != count:
        rule = f"say what each of task.candidates means ({count})" if count else "be empty where answers are written"
        yield problem(f"{_KEY}.meanings", rule, recipe.meanings, f"Write {_what_to_write(task)}")
    elif len({each.strip() for each in recipe.meanings} - {""}) < len(recipe.meanings):
        rule = "differ from one another, none of them blank"
        yield problem(f"{_KEY}.meanings", rule, recipe.meanings, f"Write {_what_to_write(task)}")
    elif recipe.meanings and _is_turned(told):
        rule = f"be answers that mean {', '.join(recipe.meanings)}, in this order, as {_KEY}.meanings says"
        yield problem("task.candidates", rule, task.candidates, "Bring both into one order.")
    column, readable = recipe.column or told.column, _columns(task)
    fixed = {*told.written, *told.anchors}
    if column not in readable or column in fixed:
        allowed = ", ".join(each for each in readable if each not in fixed)
        rule = f"be a column that the task reads ({allowed}), no label and no text that must stay"
        yield problem(f"{_KEY}.column", rule, column, "Name one of them; others are sent to nobody.")
    if any(each not in readable for each in recipe.shown):
        rule = f"hold columns that the task reads ({', '.join(readable)}), no label"
        yield problem(f"{_KEY}.shown", rule, recipe.shown, "Others are sent to nobody.")
    named = {name for each in told.labels for name in FIELD.findall(each)}
    if hidden := sorted(named - {column, *told.others(column)}):
        rule = f"name columns in braces that the prompts show ({', '.join((column, *told.others(column)))})"
        yield problem(f"{_KEY}.meanings", rule, hidden, f"Add them to {_KEY}.shown, or take the braces off.")


def _untold(task: TaskConfig) -> Problem:
    """The problem of a task that neither fedzo nor the recipe tells of."""
    named, write = TASKS.get(task.name), _what_to_write(task)
    if named is not None and named.labels and _candidates(task) and _has_other_answers(task, named):
        rule = f"be answers that mean {', '.join(named.labels)}, in this order, for oat_rephrase, whose prompts say so"
        return problem("task.candidates", rule, task.candidates, f"Leave them out, or write {write}")
    if named is not None and task.template != named.template:
        rule = f"be {named.template!r} for oat_rephrase, whose prompts say: {named.about.removesuffix('.')}"
        return problem("task.template", rule, task.template, f"Leave it out, or write {write}")
    names = ", ".join(sorted(TASKS))
    rule = f"say what the task {task.name!r} is, for oat_rephrase knows the presets of {names} alone, as they are"
    return problem(f"{_KEY}.about", rule, "", f"Write {write}")


def _known(task: TaskConfig) -> RephraseTask | None:
    """What is known of a task; None unless it has the template, the answers and the columns of its preset."""
    named = TASKS.get(task.name)
    if named is None or task.template != named.template or _has_other_answers(task, named):
        return None
    return named if {named.column, *named.shown} <= {*_columns(task)} else None


def _told(task: TaskConfig, recipe: OatRephraseConfig) -> RephraseTask:
    told = _known(task) or _guessed(task, recipe)
    told = replace(told, about=recipe.about or told.about, labels=tuple(recipe.meanings) or told.labels)
    if not recipe.shown:
        return told
    return replace(told, column=recipe.column or told.column, shown=tuple(recipe.shown))


def _guessed(task: TaskConfig, recipe: OatRephraseConfig) -> RephraseTask:
    """What a task's columns and answers say of it; of a known name also the columns whose text must stay."""
    named, columns, candidates = TASKS.get(task.name), tuple(_columns(task)), _candidates(task)
    choices = tuple(found[1] for each in candidates if (found := FIELD.fullmatch(each.strip())))
    is_filled = any(FIELD.search(each) for each in candidates)  # other words in each row
    written = answer_columns(task)
    blank = DERIVATIONS[task.derive].may_be_blank if task.derive is not None else ()
    return RephraseTask(
        recipe.column or usual_column(task),
        shown=tuple(each for each in columns if each not in blank),
        about=recipe.about,
        choices=choices if len(choices) == len(candidates) and {*choices} <= {*columns} else (),
        anchors=_kept(named, written, columns) if named is not None else (),
        answer_words=() if is_filled else tuple((" ".join(words(each)),) for each in candidates),
        written=tuple(each for each in written if each in columns),
    )


def _kept(named: RephraseTask, written: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """The columns whose text must stay, in a known task with other columns: an answer may be in one of another name."""
    there = (each for kept in named.anchors for each in (kept, *(written if kept in named.written else ())))
    return tuple(each for each in dict.fromkeys(there) if each in columns)


def _has_other_answers(task: TaskConfig, named: RephraseTask) -> bool:
    candidates = _candidates(task)
    return len(candidates) != len(named.labels) or misplaced(named, candidates) is not None


def _is_turned(told: RephraseTask) -> bool:
    """Whether what a label means is a word of another label's answer."""
    meant = [" ".join(words(each)) for each in told.labels]
    return any(
        text and text in known
        for place, text in enumerate(meant)
        for other, known in enumerate(told.answer_words)
        if other != place
    )


def _candidates(task: TaskConfig) -> list[str]:
    return task.candidates if task.kind is TaskKind.candidates else []


def _columns(task: TaskConfig) -> list[str]:
    """The columns that prompts may show: those that the task reads, but for its label, in the template's order."""
    label = {task.label} if task.kind is TaskKind.candidates else set()
    places = {each: task.template.find(f"{{{each}}}") for each in columns_used(task) if each not in label}
    return sorted(places, key=lambda each: (places[each] < 0, places[each]))


def _what_to_write(task: TaskConfig) -> str:
    """The keys that tell of a task; the end of a sentence."""
    about = f'{_KEY}.about="The task is to say ..."'
    if not _candidates(task):
        return f"{about}, a sentence on what a text is and what the task asks."
    return f"{about}, and {_KEY}.meanings=[...] with what each of task.candidates means."
