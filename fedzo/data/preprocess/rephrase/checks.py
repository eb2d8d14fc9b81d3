"""What a rewriter's answer must pass before a judge sees it: pure functions of strings and a row."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from fedzo.data.files import Row
from fedzo.data.preprocess.rephrase.config import Check, OatRephraseConfig
from fedzo.data.preprocess.rephrase.numbers import numbers
from fedzo.data.preprocess.rephrase.prompts import Prompts
from fedzo.data.preprocess.rephrase.tasks import RephraseTask
from fedzo.data.tasks import answers_in
from fedzo.data.words import folded, holds, names, phrases, spaceless, words

_OUTER = " \t\r\n\v\f\u00a0\u200b\ufeff\u2028\u2029\u3000"
_NOTHING = frozenset({"", "none", "null", "nil", "nan", "n/a", "undefined", "[]", "{}", '""', "''"})
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb", "\u300c": "\u300d", "`": "`"}
_SINGLE = str.maketrans({"\u2018": "'", "\u2019": "'"})
_DOUBLE = '"\u201c\u201d\u201e\u00ab\u00bb'

_NOUN = "(?:text|version|sentence|premise|passage|paragraph|context|answer|output|result|statement|example|field|form)"
_REWRITTEN = r"(?:rephras|reword|rewrit|rewrot|paraphras)\w*"
_REVISED = r"(?:revis|restat|reformulat)\w*"  # of much else than text, too
_KIND = r"(?: (?:new|updated|improved|alternative|different|possible|shorter|clearer|concise|simpler|cleaner|better))*"
_SURE = r"(?:sure|certainly|of course|absolutely|okay|ok|great)\b"
_LEAD_IN = re.compile(
    rf"(?:(?:{_SURE}|yes\b)[^\w]{{0,3}})?"
    rf"(?:(?:here(?:'s| is| are)|below is|this is|the following is)\b[^:\n]{{0,60}}\b"
    rf"(?:{_REWRITTEN}|{_REVISED} {_NOUN}|(?:an?|the|my|your|one){_KIND} version)"
    rf"|(?:the |a |my |your )?(?:{_REWRITTEN}(?: \w+)?|{_REVISED}(?: {_NOUN})?)(?= ?[:\n]|\*)"
    rf"|here(?:'s| it is| is(?: the| a)? {_NOUN})(?= ?[:\n]))"
)
_OPENER = re.compile(rf"(?:{_SURE}|here (?:you go|you are|it is)\b)[^\w\n:]{{0,3}}[:\n]")
_REFUSAL = re.compile(
    r"(?:(?:i'm |i am )?sorry|i'm unable|i am unable|i'm not able|i am not able)\b[^\n]{0,40}\b"
    r"(?:can't|cannot|can not|rephrase|rewrite|assist|help)"
    r"|i (?:can't|cannot) (?:rephrase|rewrite|assist|help with)|as an ai\b"
)
_LABELS = ("text", "answer", "output", "rewrite", "response")
_TOLD = "right answer"  # a line of the prompt, as each column is
_OF_LABEL = re.compile(r"^(?:new|updated|final|rewritten|rephrased|revised|reworded|paraphrased) | ?\([^()]*\)$")
_MARKUP = ("{", "[", "<", "```")
_HEAD = 200
_MAX_TIMES, _MAX_SIGNS = 20, 10_000

_ECHOED_WORDS, _ECHOED_SIGNS = 6, 20
_STEM = 5
_LOOPED_WORDS, _LOOPED_SIGNS, _LONGEST_PERIOD = 4, 12, 8

_STOP_WORDS = (
    "a an the this that these those and or but nor so if then than as of at by for with about against between into "
    "through during before after above below to from up down in out on off over under again once here there when "
    "where why how all any both each few more most other some such no not only own same too very can could will "
    "would shall should may might must do does did done doing have has had having be am is are was were been being "
    "i me my mine we us our ours you your yours he him his she her hers it its they them their theirs who whom whose "
    "which what myself himself herself itself themselves yourself ourselves while because until since though although "
    "also just ever never yet upon one get got"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
_LETTERS = frozenset("ai")  # words of many texts, and answers by letter: they give nothing away


@dataclass(frozen=True, slots=True)
class Checked:
    """What the checks say of an answer.

    Attributes:
        text: The answer without outer white space, a lead-in and one pair of enclosing quotes.
        fault: The first check that it fails; None if it passes all.
    """

    text: str
    fault: Check | None


@dataclass(frozen=True, slots=True)
class _Case:
    """An answer beside its row, with what several checks read."""

    text: str
    original: str
    row: Row
    label: int | None
    prompts: Prompts
    rules: OatRephraseConfig
    new: list[str]
    old: list[str]


def check(
    answer: str, row: Row, label: int | None, *, prompts: Prompts, rules: OatRephraseConfig, truncated: bool = False
) -> Checked:
    """Clean an answer and look for its first fault among ``rules.checks``, in the order of ``Check``.

    ``empty`` and ``truncated`` are among them whatever the rules: what is blank or cut off is no rewrite.

    An answer that is the original is no fault, whatever the original holds. Two rows are unusable all the same,
    as nothing could be said of any rewrite: an empty original (``empty``), and one in which an anchor does not occur
    as whole words (``anchors``; WiC's word is often inflected in its sentence).

    An answer far beyond any sane length is not read at all, whatever the rules: an endpoint may send a megabyte.

    Args:
        answer: As the rewriter gave it.
        row: The original's.
        label: The right answer among the task's; None where the answer is written.
        prompts: What the rewriter was asked with.
        rules: Which checks, and their bounds.
        truncated: Whether the answer was cut off.
    """
    column, others = prompts.column, prompts.task.others(prompts.column)
    original = str(row[column]).strip(_OUTER)
    if len(answer) > _MAX_TIMES * len(original) + _MAX_SIGNS:
        return Checked(answer[:_MAX_SIGNS], Check.truncated if truncated else Check.length)
    text, led = _cleaned(answer, original, column, {*map(folded, others), _TOLD} - {folded(column)})
    same = text == original
    faults: dict[Check, Callable[[_Case], bool]] = {
        Check.empty: lambda _: not original or (not same and folded(text).strip(" .") in _NOTHING),
        Check.truncated: lambda _: truncated,
        Check.lead_in: lambda _: not same and (led or _is_wrapped(text, original)),
        Check.quotes: _has_stray_quotes,
        Check.line_break: lambda case: len(case.text.splitlines()) > max(1, len(case.original.splitlines())),
        Check.length: _has_wrong_length,
        Check.loop: _loops,
        Check.echo: _echoes,
        Check.numbers: _changes_numbers,
        Check.anchors: _loses_anchor,
        Check.leak: _leaks,
    }
    case = _Case(text, original, row, label, prompts, rules, words(text), words(original))
    wanted = [each for each in Check if each in (Check.empty, Check.truncated, *rules.checks)]
    return Checked(text, next((each for each in wanted if faults[each](case)), None))


def _cleaned(answer: str, original: str, column: str, others: set[str]) -> tuple[str, bool]:
    """The answer without what surrounds it, and whether a lead-in stays in it.

    That is one without a clear end, or the name of one of ``others``, the prompt's other fields.
    """
    text = answer.strip(_OUTER)
    if text == original:
        return text, False
    text, led = _without_lead_in(text, original, column, others)
    text = _without_quotes(text, original)
    return text, led


def _without_lead_in(text: str, original: str, column: str, others: set[str]) -> tuple[str, bool]:
    head, known = folded(text[:_HEAD]), folded(original[:_HEAD])
    opener = _OPENER.match(head)
    match = _LEAD_IN.match(head.lstrip("*\"'# "))
    if opener is None and match is None:
        label = head.lstrip("*# ").partition(":")[0].strip(" *")
        name = _OF_LABEL.sub("", label)
        if ":" in head and name in (*_LABELS, folded(column), *others) and not known.startswith(label):
            return (text, True) if name in others else (text.partition(":")[2].strip(_OUTER + "*"), False)
        return text, _REFUSAL.match(head) is not None and _REFUSAL.match(known) is None
    if any(found is not None and known.startswith(found.group()) for found in (match, opener)):
        return text, False
    end = re.search(r"[:\n]", text[:_HEAD])
    if end is None:
        return text, True
    return text[end.end() :].strip(_OUTER + "*"), False


def _is_wrapped(text: str, original: str) -> bool:
    """Whether it is JSON, a tag or a block of code, or has a model's own signs or control characters in it."""
    markup = any(text.startswith(sign) and not original.startswith(sign) for sign in _MARKUP)
    strange = {sign for sign in text if unicodedata.category(sign) == "Cc"} - {*"\t\n\r", *original}
    return markup or bool(strange) or ("<|" in text and "<|" not in original)


def _without_quotes(text: str, original: str) -> str:
    known = _straight(original)
    whole = known[:1] == known[-1:] == text[:1]  # a quotation, or two: no pair is brought in
    if len(text) < 2 or _QUOTES.get(text[0]) != text[-1] or whole:
        return _without_outer_quotes(text, original)
    inner = text[1:-1]
    if text[0] == '"' and _straight(inner).count('"') not in (0, _straight(original).count('"')):
        return text  # as in: "Yes," he said, "no."
    return inner.strip(_OUTER)


def _without_outer_quotes(text: str, original: str) -> str:
    """Also where the original begins with a quotation, if the pair stands around one just like it."""
    inner = text[1:-1].strip(_OUTER)
    twice = len(text) > 1 and text[0] in _DOUBLE and text[-1] in _DOUBLE and _straight(inner).startswith('"')
    return inner if twice and _straight(inner).count('"') == _straight(original).count('"') else text


def _straight(text: str) -> str:
    """With all double quotes alike, LaTeX's too: corpora of news and books write ``so''."""
    straight = text.translate(dict.fromkeys(map(ord, _DOUBLE), '"')).translate(_SINGLE)
    return straight.replace("``", '"').replace("''", '"')


def _has_stray_quotes(case: _Case) -> bool:
    """An odd number of double quotes, or one at the begin of a rewrite of a text without any."""
    new, old = _straight(case.text), _straight(case.original)
    if new.count('"') % 2 and not old.count('"') % 2:
        return True
    if new.startswith('"'):
        return '"' not in old
    return new.startswith(("'", "`")) and not old.startswith(("'", "`"))


def _has_wrong_length(case: _Case) -> bool:
    new, old, rules = len(case.new), len(case.old), case.rules
    return not rules.min_length_ratio * old <= new <= max(rules.max_length_ratio * old, old + rules.max_extra_words)


def _loops(case: _Case) -> bool:
    """A phrase thrice on end (a word four times), or again and again far more often than in the original."""
    for period in range(1, _LONGEST_PERIOD + 1):
        run = _longest_run(case.new, period)
        if run >= max(2 * period, 3) and run > _longest_run(case.old, period):
            return True
    size = _LOOPED_SIGNS if spaceless(case.new) else _LOOPED_WORDS
    known = Counter(phrases(case.old, size))
    return any(count > 2 + 2 * known[phrase] for phrase, count in Counter(phrases(case.new, size)).items())


def _longest_run(tokens: Sequence[str], period: int) -> int:
    equal = (a == b for a, b in zip(tokens, tokens[period:], strict=False))
    return max((sum(1 for _ in run) for same, run in groupby(equal) if same), default=0)


def _echoes(case: _Case) -> bool:
    size = _ECHOED_SIGNS if spaceless(case.new) else _ECHOED_WORDS
    told = set(phrases(words(case.prompts.instructions), size)) - set(phrases(case.old, size))
    return any(phrase in told for phrase in phrases(case.new, size))


def _changes_numbers(case: _Case) -> bool:
    old, old_loose = numbers(case.original)
    new, new_loose = numbers(case.text)
    return bool(old - new - new_loose or new - old - old_loose)


def lacks_anchor(row: Row, task: RephraseTask, column: str) -> bool:
    """Whether an anchor does not stand in the text itself, as whole words: then no rewrite can pass."""
    old = words(str(row[column]))
    return any(anchor and not holds(old, anchor) for anchor in _anchors(row, task))


def _loses_anchor(case: _Case) -> bool:
    anchors = _anchors(case.row, case.prompts.task)
    return any(anchor and not (holds(case.new, anchor) and holds(case.old, anchor)) for anchor in anchors)


def _anchors(row: Row, task: RephraseTask) -> list[list[str]]:
    """Of an answer that lists several it is the first: the row is trained on it."""
    return [words(str(answers_in(row, column)[0])) for column in task.anchors]


def leaking_labels(new: Sequence[str], old: Sequence[str], *, row: Row, task: RephraseTask) -> set[int]:
    """Labels of which a rewrite has a new word, or a new answer of several words, that belongs to no other label.

    Of a choice these are its content words, by their first five letters: "sneezing" tells as much as "sneezed".

    Args:
        new: Words of the rewrite.
        old: Words of the original.
        row: The original's.
        task: Of the row.
    """
    if task.choices:
        stems = [_stems(words(str(row[choice]))) for choice in task.choices]
        count = Counter(stem for each in stems for stem in each)
        added = _stems({*new} - {*old}) - _stems(old)
        return {label for label, each in enumerate(stems) if any(count[stem] == 1 for stem in each & added)}
    own = _own_answers(task.answer_words)
    sizes = {len(answer) for answer in own}
    added_phrases = {phrase for size in sizes for phrase in {*phrases(new, size)} - {*phrases(old, size)}}
    return {own[phrase] for phrase in added_phrases if phrase in own}


@cache
def _own_answers(answers: tuple[tuple[str, ...], ...]) -> dict[tuple[str, ...], int]:
    """The words of each answer that stands for one label only, and that label."""
    told = [{tuple(words(each)) for each in label} for label in answers]
    count = Counter(answer for label in told for answer in label)
    return {
        answer: number
        for number, label in enumerate(told)
        for answer in label
        if count[answer] == 1 and not _LETTERS.issuperset(answer)
    }


def _stems(tokens: Iterable[str]) -> set[str]:
    return {word[:_STEM] for word in tokens if word not in STOP_WORDS}


def _leaks(case: _Case) -> bool:
    """Whether the right answer's words are new, or any answer itself is written more often, at the begin or the end.

    A wrong one counts, too: "..., positive" is no text of a row, whatever the label.
    """
    task, label = case.prompts.task, case.label
    if label is None:
        answers = [str(answer) for column in task.written for answer in answers_in(case.row, column)]
    else:
        if label in leaking_labels(case.new, case.old, row=case.row, task=task):
            return True
        answers = [word for each in task.answer_words for word in each]
        answers += [task.meaning(each, case.row) for each in range(len(task.labels))]
    for answer in map(words, answers):
        if _LETTERS.issuperset(answer):
            continue
        more = holds(case.new, answer) > holds(case.old, answer)
        outer = answer in (case.new[: len(answer)], case.new[-len(answer) :])
        if more and (outer or len(answer) > 1 or label is None):
            return True
    return False


def lost_names(text: str, original: str) -> tuple[str, ...]:
    """Capitalised words inside a sentence that a rewrite lost, or brought in: a warning only."""
    old, new = {*words(original)}, {*words(text)}
    lost = [name for name in names(original) if folded(name) not in new]
    brought = [name for name in names(text) if folded(name) not in old]
    return tuple(dict.fromkeys([*lost, *brought]))
