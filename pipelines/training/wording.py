"""How captions word findings: which of a type's words a caption uses, so that the decoder learns it."""

from __future__ import annotations

import re
from typing import Final

from reports.mentions import STEMS
from reports.taxonomy import CT_TYPES, TYPE_OF_WORD, WORDS_OF_TYPE

WORDS: Final = ("", *TYPE_OF_WORD)  # an example holds a word as its place here; the first: the type's own noun


def word_of(finding_type: str, caption: str) -> str:
    """The one word of the type that the caption uses; empty where it uses none, or several."""
    text = caption.lower()
    used = [word for word in WORDS_OF_TYPE.get(finding_type, ()) if re.search(STEMS[word], text)]
    return used[0] if len(used) == 1 else ""


def words_of(caption: str) -> list[int]:
    """For each CT type the place of its word in `WORDS`."""
    return [WORDS.index(word_of(name, caption)) for name in CT_TYPES]
