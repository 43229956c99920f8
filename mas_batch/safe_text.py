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
_URL_QUERY = re.compile(r"((?:\bhttps?)?://(?:(?!://)[^\s?#'\"<>])*+\?)([^\s#'\"<>]+)")
_HARMLESS_KEYS = frozenset(
    (
        *("version", "versionid", "version_id", "api-version", "ref", "rev", "revision"),
        *("format", "gid", "alt", "dl", "download", "raw", "lang", "language"),
        *("page", "per_page", "offset", "limit"),
    )
)
"""Keys of a URL's query that say which content is meant, and no more; in lower case."""
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
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def without_credentials(text: str) -> str:
    """Strip users and passwords from the URLs in a text, and blank out their queries.

    Of a query only the keys stay, and the values of those that are known to be harmless. Where the
    URL's beginning is cut off, values stay whose keys are not called like a secret.
    """
    return _QUERY.sub(_blanked, _URL_QUERY.sub(_blanked_query, _USER_INFO.sub("", text)))


def without_secret_query(url: str) -> str:
    """Return the URL with only the harmless part of its query: the same when it is signed anew."""
    location, _, query = url.partition("#")[0].partition("?")
    kept = sorted(pair for pair in re.split("[&;]", query) if _is_harmless(pair))
    return "?".join(filter(None, (location, "&".join(kept))))


def _is_harmless(pair: str) -> bool:
    return pair.partition("=")[0].lower() in _HARMLESS_KEYS


def _blanked_query(match: re.Match[str]) -> str:
    # Elsewhere than in HTTP a question mark may be a part of a file's name.
    is_http = match[1].startswith("http")

    def shown(pair: str) -> str:
        name, equals, _ = pair.partition("=")
        if _is_harmless(pair) or not (equals or is_http):
            return pair
        return f"{name}=***" if equals else "***"

    return match[1] + "".join(p if p in "&;" else shown(p) for p in re.split("([&;])", match[2]))


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
    for query in _URL_QUERY.finditer(url):
        for pair in re.split("[&;]", query[2]):
            value = pair.rpartition("=")[2]
            if len(value) >= _SHORTEST_SECRET and not _is_harmless(pair):
                text = text.replace(value, "***")
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
