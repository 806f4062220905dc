"""Lynx (arXiv 2307.02469) on lynx_kernels: the model, its processor, trainers and evaluation."""

from importlib.util import find_spec

# First of all, and by name: what follows would only say which of them it met first.
_MISSING = [
    each for each in ("accelerate", "PIL", "safetensors", "tqdm", "transformers", "yaml") if not find_spec(each)
]
if _MISSING:
    raise ImportError(
        f"lynx, the model layer, needs packages that are not installed ({', '.join(_MISSING)}): "
        "pip install 'lynx-kernels[lynx]'. lynx_kernels works without them."
    )

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

# From its own module: until 5.18 or so, transformers' front door hides it where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from lynx.config import LynxConfig
from lynx.media.image_processor import LynxImageProcessor
from lynx.model import LynxForConditionalGeneration
from lynx.processor import LynxProcessor

AutoConfig.register(LynxConfig.model_type, LynxConfig, exist_ok=True)
AutoModel.register(LynxConfig, LynxForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(LynxConfig, LynxForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(LynxConfig, LynxImageProcessor, exist_ok=True)
AutoProcessor.register(LynxConfig, LynxProcessor, exist_ok=True)

__all__ = ["LynxConfig", "LynxForConditionalGeneration", "LynxImageProcessor", "LynxProcessor"]
