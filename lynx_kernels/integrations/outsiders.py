"""Models of transformers that do not call its AttentionInterface, and so cannot run our attention.

transformers accepts any registered name for them. Some look the name up among attention classes of their own, and fail
with a bare KeyError. Others ask for a mask under that name and compute with it themselves, which ``AttentionMask``
refuses when it happens. Here both are refused by name when the model is built, as far as its source shows it.
"""

import inspect
import logging
import re
import sys
from functools import cache, wraps
from typing import Any

from transformers import PreTrainedModel

logger = logging.getLogger("lynx_kernels")

_ATTENTION = re.compile(r"^class \w*Attention\w*\((torch\.)?nn\.Module\)", re.MULTILINE)
_INTERFACE = re.compile(r"ALL_ATTENTION_FUNCTIONS|AttentionInterface")
_OWN_CLASSES = re.compile(r"\w+_CLASSES\[[^\]]*attn_implementation\]")
_BUILDS_MASKS = re.compile(r"\bcreate_(causal|bidirectional|sliding_window|chunked|masks_for_generate)\w*\(")
_DEFINITION = re.compile(r"^(?=class |def )", re.MULTILINE)
_NAME = re.compile(r"\b[A-Za-z_]\w+")


def refuse_outsiders(name: str) -> None:
    """Make transformers' check of attention names, in the constructor of every model, refuse ``name`` for outsiders.

    Calling it again changes nothing. Other names are checked as before.
    """
    original = PreTrainedModel.get_correct_attn_implementation
    if getattr(original, "refuses_outsiders", False):
        return

    @wraps(original)
    def get_correct_attn_implementation(self: PreTrainedModel, *args: Any, **kwargs: Any) -> str:
        found = original(self, *args, **kwargs)
        if found == name:
            check(type(self), name)  # type: ignore[arg-type]  # a class is hashable
        return found

    get_correct_attn_implementation.refuses_outsiders = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation


@cache
def check(model_class: type[PreTrainedModel], name: str) -> None:
    """Raise ValueError if a model cannot run attention of this name; log once if it has attention of its own."""
    source = _source(model_class)
    takes_own = _OWN_CLASSES.search(source)
    is_outside = _ATTENTION.search(source) and not _INTERFACE.search(source)
    if takes_own or (is_outside and _BUILDS_MASKS.search(source)):
        how = f"takes {takes_own[0]}" if takes_own else "computes with attention masks itself"
        raise ValueError(
            f"{model_class.__name__} does not call transformers' AttentionInterface (it {how}), so "
            f'attn_implementation="{name}" cannot run it; take "sdpa" or "eager". A model of several parts can take '
            f'one for each: attn_implementation={{"": "{name}", "vision_config": "eager"}}'
        )
    if is_outside:
        logger.warning(
            "%s has attention of its own, which does not call transformers' AttentionInterface: "
            'attn_implementation="%s" does not change it',
            model_class.__name__,
            name,
        )


def _source(model_class: type[PreTrainedModel]) -> str:
    """The source of a model and of what it uses in its module, without other models, which have their own check."""
    module = sys.modules.get(model_class.__module__)
    try:
        source = inspect.getsource(module)  # type: ignore[arg-type]
    except (OSError, TypeError):  # defined in a notebook; AttentionMask refuses it when it is used
        return ""
    definitions = {each.split("(")[0].split(":")[0].split()[-1]: each for each in _DEFINITION.split(source)[1:]}
    texts: dict[str, str] = {}
    waiting = {model_class.__name__}
    while waiting:
        name = waiting.pop()
        found = getattr(module, name, None)
        if name in texts or (_is_model(found) and not _builds(found, model_class)):
            continue
        texts[name] = definitions.get(name, "")
        waiting |= definitions.keys() & set(_NAME.findall(texts[name]))
        waiting |= {each for each in _NAME.findall(texts[name]) if isinstance(getattr(module, each, None), dict)}
        if isinstance(found, dict):  # classes by name
            waiting |= {each.__name__ for each in found.values() if isinstance(each, type)}
    return "".join(texts.values())


def _is_model(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, PreTrainedModel)


def _builds(found: Any, model_class: type[PreTrainedModel]) -> bool:
    """Whether ``found`` is the model or a base of it that has layers."""
    return found in model_class.__mro__ and (found is model_class or "forward" in vars(found))
