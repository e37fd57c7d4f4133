"""Tokens: what opens the door of a worker, and the file that they are kept in."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from farpoint.errors import InsecureListenerError

SECRET_CHARS: Final = 22
"""Characters of the shortest token: 128 bits, as `secrets.token_urlsafe(16)` writes them."""

_MAKE: Final = "python -c 'import secrets; print(secrets.token_urlsafe(24))' makes one"


def new_token() -> str:
    """Return a token that nobody can guess."""
    return secrets.token_urlsafe(24)


def read_tokens(path: Path) -> tuple[str, ...]:
    """Return the tokens in a file, one on each line. If there is no file, make one that holds one token.

    Raises:
        InsecureListenerError: Others can read it, or a token in it can be guessed.
        OSError: It cannot be read, or made.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(descriptor, "w") as file:
            file.write(new_token() + "\n")
    with path.open() as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise InsecureListenerError(str(path), "others can read the tokens in it", f"chmod 600 {path}")
        tokens = tuple(line.strip() for line in file if line.strip())
    if not tokens:
        raise InsecureListenerError(str(path), "there is no token in it", f"remove it, and it is made anew; or {_MAKE}")
    if any(len(token) < SECRET_CHARS for token in tokens):
        reason = f"a token in it has fewer than {SECRET_CHARS} characters, and could be guessed"
        raise InsecureListenerError(str(path), reason, _MAKE)
    return tokens
