"""What may be shown and logged: text without credentials and without control characters."""

from __future__ import annotations

import re

_USER_INFO = re.compile(
    # `user@`, `token@` or `user:password@` before a host. S3 secrets may hold a `/`, so a password
    # goes as far as the `@`; but digits that end at a `/` are a port, and an `@` after it a path's.
    r"(?<=://)(?:[^/\s:@]+|[^/\s:@]*:(?!\d+/)[^\s@]*)@"
)
_SIGNED = re.compile(
    # What makes a URL of an object store a key to it: `X-Amz-Signature=`, `sig=`, `token=`, …
    r"(?i)([?&](?:[\w.%-]*(?:signature|credential|token|secret|password)|sig|(?:\w*[_-])?key)=)"
    r"[^&#\s'\"]+"
)
_SHORTEST_SECRET = 4
"""Characters; to blank out shorter pieces of credentials would garble a message, not guard it."""

_SECRET_NAME = re.compile(
    r"(?i)(?:.*[_-])?(?:key|apikey|token|secret|password|passwd|credentials?|authorization|cookie)"
)
_UNPRINTABLE = re.compile(
    # Control characters move cursors and hide text; of the others, these reverse what is read.
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def without_credentials(text: str) -> str:
    """Strip users, passwords, tokens and signatures from the URLs in a text."""
    return _SIGNED.sub(r"\1***", _USER_INFO.sub("", text))


def has_credentials(url: str) -> bool:
    """Say whether `without_credentials` would change the URL."""
    return without_credentials(url) != url


def without_pieces(text: str, url: str) -> str:
    """Blank out the URL's credentials where a text quotes pieces of them, as libraries do."""
    for user_info in _USER_INFO.findall(url):
        for piece in re.split("[:/@]", user_info):
            if len(piece) >= _SHORTEST_SECRET:
                text = text.replace(piece, "***")
    return without_credentials(text)


def names_a_secret(name: str) -> bool:
    """Say whether a key of that name is likely to hold a secret: `api_key`, not `api_key_env`."""
    return _SECRET_NAME.fullmatch(name) is not None


def printable(text: str) -> str:
    r"""Write control characters, except tab and newline, as escapes such as `\x1b`.

    A corpus or a model may hold sequences that rename a terminal, overwrite what stands there, or
    make text read backwards.
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
