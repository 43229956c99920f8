"""What may be shown and logged: text without credentials and without control characters."""

from __future__ import annotations

import re

_USER = r"[^/?#\s:\"'{},]*"
_IN_PASSWORD = r"(?:[^/?#\s\"']|[\"'](?![\s,:;)\]}]|$))"  # a quote that ends a JSON value is not
_USER_INFO = re.compile(
    # Digits before a comma, a query or the path are a port, and an `@` after it is something
    # else's. But few ports are so short that they would not rather begin a password.
    rf"(?<=://)(?:{_USER}:(?!\d+[,}}?#]){_IN_PASSWORD}*@"  # to the last `@` before the path
    # S3 secrets may hold a `/`, so a password goes as far as the `@`; S3 has no ports. No password
    # holds `://`: so no part of a text is read from more than one URL's start.
    rf"|(?:(?<=s3://)|(?<=s3a://)|(?!{_USER}:(?:(?:2[12]|80|\d{{3,5}})/|\d+[,}}?#])))"
    rf"{_USER}:(?:[/?#]|(?!@|://){_IN_PASSWORD})*+@"
    # One blank, as more are a sentence: `cannot reach https://host:80 of ops@example.org`.
    rf"|{_USER}:(?!\d+\W)[^/?#\s@:;,(){{}}\"']+ [^/?#\s@:;,(){{}}\"']+@"
    r"|[^/?#\s:\"'{},]+@)"  # a user or token alone
)
_QUERY = re.compile(r"([?&]([\w.%-]+)=)[^&#\s'\"]+")
_SHORTEST_SECRET = 4
"""Characters; to blank out shorter pieces of credentials would garble a message, not guard it."""

_WORD_END = re.compile(r"[\W_]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SECRET_WORDS = frozenset(
    (
        *("key", "apikey", "accesskey", "secretkey"),
        *("token", "apitoken", "authtoken", "accesstoken", "bearer", "cookie"),
        *("secret", "password", "passwd", "pwd", "passphrase", "credential", "credentials"),
        *("auth", "oauth", "authorization"),
    )
)
_SIGNING = ("signature", "credential", "token", "secret", "password", "passwd", "pwd")
"""What ends the names of the query keys that make a URL a key: `X-Amz-Signature`, `mytoken`."""

_UNPRINTABLE = re.compile(
    # Control characters move cursors and hide text; of the others, these reverse what is read.
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def without_credentials(text: str) -> str:
    """Strip users, passwords, tokens and signatures from the URLs in a text."""
    return _QUERY.sub(_blanked, _USER_INFO.sub("", text))


def _blanked(query: re.Match[str]) -> str:
    name = query[2]
    signs = name.lower() == "sig" or name.lower().endswith(_SIGNING)
    return f"{query[1]}***" if signs or names_a_secret(name) else query[0]


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
    """Say whether a key of that name likely holds a secret: `apiKey` does, `api_key_env` not."""
    return _WORD_END.split(name)[-1].lower() in _SECRET_WORDS


def printable(text: str) -> str:
    r"""Write control characters, except tab and newline, as escapes such as `\x1b`.

    A corpus or a model may hold sequences that rename a terminal, overwrite what stands there, or
    make text read backwards.
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def clip(text: str, length: int) -> str:
    """Shorten a text for people: one printable paragraph of at most so many characters."""
    text = printable(" ".join(text[: 4 * length].split()))  # not all of a text of megabytes
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
