"""Names that travel: ids of workers, tags and descriptions of objects, and the words they are searched by.

The same checks run where a name is given, so that a mistake is an error at once, and where it arrives, because nobody vouches for
what a peer sends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from farpoint.errors import InvalidNameError
from farpoint.limits import DEFAULT_LIMITS
from farpoint.store import Annotation

_ALPHABET: Final = re.compile(r"[A-Za-z0-9_.:#-]+")
_HALVES: Final = re.compile("[\ud800-\udfff]")
_LONGEST: Final = DEFAULT_LIMITS.name_chars
_CHARACTERS: Final = "of the characters A-Z a-z 0-9 _ . : # -"


def check_worker_id(name: object) -> str:
    """Return the id of a worker.

    Raises:
        InvalidNameError: It is too long, empty, or holds other characters than letters, digits and `_.:#-`.
    """
    if not isinstance(name, str) or len(name) > _LONGEST or not _ALPHABET.fullmatch(name):
        raise InvalidNameError("worker id", _show(name), f"1 to {_LONGEST} {_CHARACTERS}")
    return name


def check_tag(tag: object) -> str:
    """Return a tag.

    Raises:
        InvalidNameError: It does not begin with `#`, is too long, or holds other characters than ids may.
    """
    if (
        not isinstance(tag, str)
        or not 1 < len(tag) <= _LONGEST
        or tag[0] != "#"
        or not _ALPHABET.fullmatch(tag)
    ):
        raise InvalidNameError("tag", _show(tag), f"a # and then 1 to {_LONGEST - 1} {_CHARACTERS}")
    return tag


def check_tags(tags: object) -> frozenset[str]:
    """Return the tags of one object.

    Raises:
        InvalidNameError: One of them is none, or there are too many.
    """
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise InvalidNameError("tags", _show(tags), "a list of them, like ['#x', '#train']")
    checked = frozenset(check_tag(tag) for tag in tags)
    if len(checked) > DEFAULT_LIMITS.tags:
        raise InvalidNameError("tags", " ".join(sorted(checked)), f"at most {DEFAULT_LIMITS.tags} tags for one object")
    return checked


def check_description(text: object) -> str:
    """Return the description of an object.

    Raises:
        InvalidNameError: It is no text, or too long.
    """
    if not isinstance(text, str) or len(text) > DEFAULT_LIMITS.description_chars:
        raise InvalidNameError("description", _show(text), f"a text of at most {DEFAULT_LIMITS.description_chars} characters")
    if _HALVES.search(text):  # Python has them, and UTF-8 has not: such a text cannot travel
        raise InvalidNameError("description", ascii(text)[:80], "a text without halves of surrogate pairs")
    return text


def check_note(tags: object, description: object, requires_grad: object = False) -> Annotation:
    """Return what a peer says is written on an object.

    Raises:
        InvalidNameError: A tag or the description is not what it must be.
    """
    return Annotation(check_tags(tags), check_description(description), bool(requires_grad))


def check_query(query: object) -> tuple[frozenset[str], frozenset[str]]:
    """Return the tags and the words that a search asks for.

    Args:
        query: Texts: those that begin with `#` are tags, the words of the others are looked up in descriptions.

    Raises:
        InvalidNameError: A tag is none, there is nothing to look for, or too much.
    """
    asked = list(query) if isinstance(query, Iterable) and not isinstance(query, str) else []
    tags = check_tags([text for text in asked if isinstance(text, str) and text.startswith("#")])
    words: frozenset[str] = frozenset()
    for text in asked:
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise InvalidNameError("search", _show(text), f"tags like '#x', or words of at most {_LONGEST} characters")
        if not text.startswith("#"):
            words |= words_of(text)
    if not tags and not words:
        raise InvalidNameError("search", " ".join(map(_show, asked)), "at least one tag like '#x', or one word")
    if len(words) > DEFAULT_LIMITS.tags:
        raise InvalidNameError("search", " ".join(sorted(words)), f"at most {DEFAULT_LIMITS.tags} words")
    return tags, words


def words_of(text: str) -> frozenset[str]:
    """Return the words of a text, without regard to case and punctuation."""
    return frozenset(re.findall(r"\w+", text.casefold()))


def _show(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)[:80]
