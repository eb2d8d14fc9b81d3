"""What a word is, and which words are names. All of it takes time linear in the text.

The scores of written answers go by it, and the checks of rewritten text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u1049\u104c-\u109f\u1780-\u17d3\u17d7\u17db-\u17ff"
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
"""Signs of scripts that write words without spaces: each counts as a word."""
BETWEEN = (
    r"\s!-/:-@\[-`{-~\u00a0-\u00bf\u2000-\u206f\u3000-\u303f\uff00-\uff0f\uff1a-\uff20"
    r"\u037e\u0387\u055d\u0589\u05be\u05c0\u05c3\u060c\u061b\u061f\u066a-\u066d\u06d4\u0964\u0965"
    r"\u0f0b-\u0f11\u104a\u104b\u1360-\u1368\u17d4-\u17d6\u17d8-\u17da"
)
"""White space and punctuation: of Latin and East Asian text, then of Greek, Armenian, Hebrew, Arabic and Indic scripts,
then Tibetan, Burmese, Ethiopic and Khmer. Signs that stand inside words, as Armenian's question mark does, are left."""
_PART = rf"[^{BETWEEN}{UNSPACED}]+"
_WORD = re.compile(rf"[{UNSPACED}]|{_PART}(?:'{_PART})*")
_LONE = re.compile(f"[{UNSPACED}]")
_POSSESSIVE = re.compile("'[sS]$")
_STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "\u202f": " "})
_SENTENCE_END = re.compile(r"[.!?:\u2026\"\n(\[]['\s\"(\[]*$|^\s*'$")


def is_utf8(text: str) -> bool:
    """Whether a text can be sent and written: JSON may name halves of characters, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def folded(text: str) -> str:
    """The text for comparisons: composed, straight quotes, plain spaces, case folded.

    The dot that folding leaves over a Turkish capital i is dropped: else it would end the word.
    """
    composed = unicodedata.normalize("NFC", text).translate(_STRAIGHT)
    return unicodedata.normalize("NFC", composed.casefold().replace("i\u0307", "i"))


def words(text: str) -> list[str]:
    """Words of a text, folded; a possessive is its owner, and a sign of a script without spaces is a word."""
    return [word.removesuffix("'s") for word in _WORD.findall(folded(text))]


def spaceless(tokens: Sequence[str]) -> bool:
    """Whether most of the words are signs of a script that writes no spaces."""
    return 2 * sum(1 for token in tokens if _LONE.match(token)) > len(tokens)


def phrases(tokens: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """All runs of ``size`` words."""
    return zip(*(tokens[start:] for start in range(size)), strict=False)


def holds(tokens: Sequence[str], phrase: Sequence[str]) -> int:
    """How often a phrase occurs as whole words, not counting overlaps; 0 for an empty one."""
    # Each word between its own two spaces, so that neighbours can both match.
    spread = "".join(f" {token} " for token in tokens)
    return spread.count("".join(f" {token} " for token in phrase)) if phrase else 0


def names(text: str) -> list[str]:
    """Capitalised words inside a sentence, as written; not ``I``."""
    composed = unicodedata.normalize("NFC", text).translate(_STRAIGHT)
    found: list[str] = []
    end = 0
    for match in _WORD.finditer(composed):
        gap = composed[max(end, match.start() - 8) : match.start()]
        word = _POSSESSIVE.sub("", match.group())
        if end and word[0].isupper() and word.split("'")[0] != "I" and not _SENTENCE_END.search(gap):
            found.append(word)
        end = match.end()
    return found
