"""YAML as job files and overrides may have it: strict, of bounded size, wrong in one line."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

_QUOTED = re.compile(r"'[^']*'")
_SURROGATE = re.compile("[\ud800-\udfff]")

_MAX_ALIASED = 100_000
"""Nodes that all aliases together may stand for; a hundred characters of text count as one more.
Whoever walks over the job meets each of them again, so ten lines could fill the memory."""


def parse_yaml(text: str) -> Any:
    """Read YAML.

    Raises:
        ValueError: the text is not valid; the message is one line, with the place if it is known.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        words = ", ".join(filter(None, (error.context, error.problem)))
        if isinstance(error, (ComposerError, ConstructorError)):
            # They quote a text that begins like an alias or a tag, as a password may.
            words = _QUOTED.sub("…", words) + "; text that begins with *, & or ! needs quotes"
        raise ValueError(f"{place}{words}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # YAML's own types: 2024-13-45 looks like a date
        raise ValueError(f"{error}; text that looks like a date or a number needs quotes") from None


class _Loader(yaml.SafeLoader):
    """Refuses what PyYAML accepts silently: a key that is given twice, or is not text; an anchor
    that contains itself; aliases that stand for more than a job can be."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}  # id of a node → nodes in it, those of aliases included
        self._num_aliased = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias:
            if id(node) not in self._sizes:  # it is still being composed
                raise yaml.MarkedYAMLError(problem="an anchor contains itself", problem_mark=mark)
            self._num_aliased += self._sizes[id(node)]
            if self._num_aliased > _MAX_ALIASED:
                raise yaml.MarkedYAMLError(
                    problem=f"the aliases stand for more than {_MAX_ALIASED} values",
                    problem_mark=mark,
                )
        else:
            self._sizes[id(node)] = self._size(node)
        return node

    def _size(self, node: Any) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value) // 100
        if isinstance(node, yaml.MappingNode):
            return 1 + sum(self._sizes[id(each)] for pair in node.value for each in pair)
        return 1 + sum(self._sizes[id(each)] for each in node.value)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                problem = f"a key must be text, not {key.tag.rpartition(':')[2]}: put it in quotes"
            elif key.value in seen:
                problem = f"key {key.value!r} occurs twice"
            else:
                seen.add(key.value)
                continue
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and _SURROGATE.search(value):
            # JSON, which YAML includes, writes a character beyond U+FFFF as a pair of escapes.
            value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return value
