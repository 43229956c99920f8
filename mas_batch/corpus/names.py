"""The files' names below their corpus: they go into the ids of records without ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import count

from mas_batch.safe_text import without_secret_query

HTTP = re.compile("https?://")


def stable_path(path: str) -> str:
    """Return a path as it may be kept: the file at a URL is the same when it is signed anew."""
    return without_secret_query(path) if HTTP.match(path) else path


def last_part(path: str) -> str:
    """Return the last name in a path, with what is kept of a query."""
    location, mark, query = path.partition("?") if HTTP.match(path) else (path, "", "")
    return location.rsplit("/", 1)[-1] + mark + query


def with_distinct_names(
    names: Sequence[str], paths: Sequence[str], urls: Sequence[str]
) -> list[str]:
    """Give files of equal names distinct ones, by as many parent folders as needed.

    Where that does not help, as with URLs that differ in what is secret in their queries only,
    the order in the job tells them apart.

    Args:
        names: below the root, in the order in which the job names the files.
        paths: the files' stable paths, of which the names are the ends.
        urls: the files' stable URLs, which differ where only the filesystems do.
    """
    distinct = list(names)
    for depth in count(1):
        doubled = {name for name, times in Counter(distinct).items() if times > 1}
        if not doubled:
            return distinct
        seen: Counter[str] = Counter()
        for i, name in enumerate(distinct):
            if name not in doubled:
                continue
            parts = paths[i].split("/")
            num_parts = names[i].count("/") + 1 + depth
            if num_parts <= len(parts):
                distinct[i] = "/".join(parts[-num_parts:])
            elif name != urls[i]:
                distinct[i] = urls[i]
            else:
                seen[name] += 1
                distinct[i] = f"{seen[name]}/{name}"
    raise AssertionError
