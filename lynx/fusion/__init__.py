"""How media reach the language model; ``lynx.fusion.base`` says what a fusion is."""

from typing import Any

from lynx.fusion.base import Fusion, check_choice
from lynx.fusion.cross_attention import CrossAttentionFusion
from lynx.fusion.prefix import PrefixFusion

FUSIONS: dict[str, Fusion] = {fusion.name: fusion for fusion in (PrefixFusion(), CrossAttentionFusion())}


def fusion_of(config: Any) -> Fusion:
    """The fusion that the ``fusion`` of a configuration or a processor names.

    Raises:
        ValueError: there is none of this name.
    """
    check_choice("fusion", config.fusion, list(FUSIONS))
    return FUSIONS[config.fusion]


def take_inputs(fusion: Fusion, arguments: dict[str, Any]) -> dict[str, Any]:
    """Take the inputs of a fusion out of the keyword arguments of a call.

    Raises:
        ValueError: an input of another fusion is among them.
    """
    taken = {name: arguments.pop(name, None) for other in FUSIONS.values() for name in other.inputs}
    taken = {name: value for name, value in taken.items() if value is not None}
    for other in FUSIONS.values():
        for name in other.inputs:
            if name in taken and name not in fusion.inputs:
                raise ValueError(f"{name} is for fusion={other.name!r}, this model has {fusion.name!r}")
    return taken
