"""YAML that people wrote or were sent: plain values, or a sentence that says why not."""

from typing import Any

import yaml

_LEVELS = 64  # of nesting
_VALUES = 2**20  # aliases written out: ten lines can stand for a billion values


class YamlError(ValueError):
    """A text is not YAML."""


class YamlBombError(ValueError):
    """A text is YAML, but nobody needs so much of it: its nesting, or what its aliases stand for."""


class _Loader(yaml.SafeLoader):
    levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As SafeLoader's, which recurses for every level."""
        self.levels += 1
        if self.levels > _LEVELS:
            raise YamlBombError(f"it is nested more than {_LEVELS} levels deep")
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


def read(text: str) -> Any:
    """The values of a YAML document. No tag makes an object of anything else.

    Raises:
        YamlError: the text is not YAML; the message is one line.
        YamlBombError: it is nested too deeply, an alias stands inside of what it stands for, or aliases stand for too
            many values.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from error


def _count(node: Any, counts: dict[int, int]) -> int:
    """How many values a node stands for, with aliases written out. A node is counted once."""
    key = id(node)
    if counts.get(key) == 0:
        raise YamlBombError("an alias stands inside of what it stands for")
    if key not in counts:
        counts[key] = 0
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (each if isinstance(each, tuple) else (each,) for each in children)
        counts[key] = 1 + sum(_count(each, counts) for pair in pairs for each in pair)
    if counts[key] > _VALUES:
        raise YamlBombError(f"its aliases stand for more than {_VALUES:,} values")
    return counts[key]
