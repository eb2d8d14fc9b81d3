"""What the rules that make pairs know of English: forms that mean the same, verbs to deny, words to exchange."""

from __future__ import annotations

import re

CONTRACTED = {
    "do not": "don't",
    "does not": "doesn't",
    "did not": "didn't",
    "is not": "isn't",
    "are not": "aren't",
    "was not": "wasn't",
    "were not": "weren't",
    "has not": "hasn't",
    "have not": "haven't",
    "had not": "hadn't",
    "could not": "couldn't",
    "would not": "wouldn't",
    "should not": "shouldn't",
    "cannot": "can't",
    "will not": "won't",
    "it is": "it's",
    "I am": "I'm",
    "they are": "they're",
    "we are": "we're",
}
"""Long forms and their contractions."""

SYNONYMS = {
    "began to": "started to",
    "started to": "began to",
    "tried to": "attempted to",
    "attempted to": "tried to",
    "wanted to": "wished to",
    "decided to": "chose to",
    "children": "kids",
    "kids": "children",
    "mom": "mother",
    "dad": "father",
    "bought": "purchased",
    "purchased": "bought",
    "couch": "sofa",
    "sofa": "couch",
    "garbage": "trash",
    "trash": "garbage",
    "refrigerator": "fridge",
    "bicycle": "bike",
    "bike": "bicycle",
    "photograph": "photo",
    "film": "movie",
    "movie": "film",
    "films": "movies",
    "movies": "films",
    "huge": "enormous",
    "enormous": "huge",
    "almost": "nearly",
    "nearly": "almost",
    "perhaps": "maybe",
    "woke up": "awoke",
}
"""Words that may take each other's place wherever they stand."""

_PAST = (
    "became began bit blew broke brought built bought came caught chose cut did drank drew drove ate fell felt fought "
    "found flew forgot froze gave got grew heard held hid hit hung hurt kept knew left lent lost made meant met paid "
    "put ran rang read rode said sang sat saw sent set shook shot shut slept slid sold spent spoke stole stood struck "
    "swam swept swung taught threw told took understood went woke won wore wrote"
)
PAST = re.compile(
    r"((?:I|You|He|She|It|We|They|(?:The|A|An|My|His|Her|Its|Our|Your|Their) [a-z]+)) "
    rf"((?:[a-z]+ed|{'|'.join(_PAST.split())})\b.*)",
    re.DOTALL,
)
"""A text that begins with a short subject and a verb in the past, which ``never`` may stand before."""
AUXILIARY = re.compile(
    r"\b(is|are|was|were|has|have|had|can|could|will|would|should|must|may|might|does|do|did)\b(?! not|n't)(?= )"
)

SAME_FRAMES = (
    "It is true that {lower}",
    "It is a fact that {lower}",
    "What follows is true: {text}",
    "{text} This is true.",
    "It so happens that {lower}",
)
"""Frames that leave a text's meaning as it is."""
NOT_FRAMES = (
    "It is not true that {lower}",
    "It is false that {lower}",
    "What follows is not true: {text}",
    "{text} This is not true.",
    "It is not the case that {lower}",
)
"""Frames that deny a text."""

NUMBER = re.compile(r"\d+")
NUMBER_WORD = re.compile(
    r"\b(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|hundred|thousand)"
    r"\b",
    re.IGNORECASE,
)
"""``one`` is none: it often says something else."""
OTHER_NUMBERS = ("seven", "four")
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b")
FIRST_WORD = re.compile(r"[A-Z][a-z]{2,}\b(?=(?:'s)? [a-z])")
NAMES = ("Miller", "Okafor", "Tanaka")
PERSONS = {
    "man": "girl",
    "woman": "boy",
    "boy": "woman",
    "girl": "man",
    "men": "girls",
    "women": "boys",
    "boys": "women",
    "girls": "men",
    "mother": "uncle",
    "father": "aunt",
    "mom": "uncle",
    "dad": "aunt",
    "parents": "neighbours",
    "children": "teachers",
    "child": "teacher",
    "brother": "aunt",
    "sister": "uncle",
    "son": "grandmother",
    "daughter": "grandfather",
    "husband": "sister",
    "wife": "brother",
    "friend": "employer",
    "friends": "employers",
    "neighbor": "dentist",
    "teacher": "plumber",
    "student": "farmer",
    "doctor": "sailor",
    "police": "teachers",
}
"""Nouns for persons and others that nobody can take for them."""
PERSON = re.compile(rf"\b({'|'.join(PERSONS)})\b")

_FUNCTION = (
    "A After All Although An Another Any As At Because Before Both But By Did Do Does During Each Even Every Few For "
    "From Had Has Have He Her Here His How However I If In It Its Just Many More Most Much My Neither No Not Now Of On "
    "Once One Only Or Our Over Several She Since So Some Soon Still Such Than That The Their Then There These They "
    "This Those Though Through To Under Until Up Was We Were What When Where Which While Who Why Will With Without "
    "Would Yes Yet You Your"
)
FUNCTION_WORDS = frozenset(_FUNCTION.split())
"""Words that begin a sentence and are no name."""
_ORDINARY = (
    "A After An As At Before He Her His In It Its My On One Our She That The Their There These They This Those We When "
    "You Your"
)
ORDINARY_WORDS = frozenset(_ORDINARY.split())
"""Those of them that are put in lower case where the text stands within a sentence."""
