"""Tiny vision-language models with processors made here, and data, for TRL's trainers."""

import sys

import numpy as np
import torch
import transformers as hf
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.lynx_kernels import vlms

IMAGES = 3
_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}{% if message['content'] is string %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' <end>' }}{% endgeneration %}"
    "{{ ' ' }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] + ' <end>' }}{% endgeneration %}{{ ' ' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
WORDS = [f"w{number}" for number in range(5, 60)]


class Llava(vlms.Family):
    """CLIP's tower without its class token."""

    def model(self):
        vision, text = hf.CLIPVisionConfig(**vlms.VISION), hf.LlamaConfig(**vlms.TEXT)
        config = hf.LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=vlms.IMAGE, image_token_index=vlms.IMAGE
        )
        return hf.LlavaForConditionalGeneration(config)


FAMILIES = {
    "Qwen25VL": vlms.FAMILIES["Qwen25VL"],
    "Qwen3VL": vlms.FAMILIES["Qwen3VL"],
    "Gemma3": vlms.FAMILIES["Gemma3"],
    "SmolVLM": vlms.FAMILIES["SmolVLM"],
    "Llava": Llava(),
}


def tokenizer():
    special = ["<pad>", "<bos>", "<end>", "<user>", "<assistant>"]
    words = {word: number for number, word in enumerate([*special, *WORDS, "<image>", "<video>", "<start>", "<stop>"])}
    assert words["<image>"] == vlms.IMAGE
    found = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", bos_token="<bos>", eos_token="<end>", chat_template=_TEMPLATE,
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


class TinyProcessor(hf.ProcessorMixin):
    """Square images of 8 pixels for one of ``FAMILIES``, words for tokens."""

    def __init__(self, tokenizer=None, chat_template=None, family="Llava"):
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.family = family

    @classmethod
    def get_attributes(cls):
        return ["tokenizer"]

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(self, images=None, text=None, videos=None, audio=None, **options):
        texts = [text] if isinstance(text, str) else list(text)
        options = {name: each for name, each in options.items() if name in (
            "padding", "padding_side", "return_tensors", "add_special_tokens", "truncation", "max_length",
            "return_offsets_mapping",
        )}  # fmt: skip
        family = FAMILIES[self.family]
        tokens = " ".join("<start>" if each == vlms.START else "<stop>" if each == vlms.END else "<image>"
                          for each in family.image(0))  # fmt: skip
        found = self.tokenizer([each.replace("<image>", tokens) for each in texts], **options)
        if options.get("return_offsets_mapping"):
            found["text_replacement_offsets"] = [_replacements(each, "<image>", tokens) for each in texts]
        ids = found["input_ids"]
        name = {"Qwen25VL": "mm_token_type_ids", "Qwen3VL": "mm_token_type_ids", "Gemma3": "token_type_ids"}.get(
            self.family
        )
        if name is not None:
            is_image = [[int(token == vlms.IMAGE) for token in row] for row in ids]
            found[name] = torch.tensor(is_image) if isinstance(ids, torch.Tensor) else is_image
        else:
            found.pop("token_type_ids", None)
        if images is not None:
            groups = [each if isinstance(each, (list, tuple)) else [each] for each in images if each is not None]
            found.update(self.pixels(groups))
        return hf.BatchFeature(found)

    def pixels(self, groups):
        pixels = [[_pixels(each) for each in group] for group in groups]
        if self.family == "SmolVLM":
            most = max(map(len, pixels))
            found, mask = torch.zeros(len(pixels), most, 3, 8, 8), torch.zeros(len(pixels), most, 8, 8).long()
            for row, group in enumerate(pixels):
                for column, image in enumerate(group):
                    found[row, column], mask[row, column] = image, 1
            return {"pixel_values": found, "pixel_attention_mask": mask}
        flat = torch.stack([image for group in pixels for image in group])
        if self.family.startswith("Qwen"):  # 16 patches of 4 pixels twice, four of which are a token
            patches = flat.repeat_interleave(2, 2).repeat_interleave(2, 3).unfold(2, 4, 4).unfold(3, 4, 4)
            patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)[:, :, :, None].expand(-1, -1, -1, 2, -1, -1)
            return {
                "pixel_values": patches.flatten(2).flatten(0, 1).contiguous(),
                "image_grid_thw": torch.tensor([[1, 4, 4]] * len(flat)),
            }
        return {"pixel_values": flat}


def _replacements(text, old, new):
    """Where ``new`` stands for ``old``, as processors say it for masks of the assistant's tokens."""
    starts = [place for place in range(len(text)) if text.startswith(old, place)]
    gained = len(new) - len(old)
    return [
        {"span": (start, start + len(old)), "new_span": (start + number * gained, start + len(new) + number * gained)}
        for number, start in enumerate(starts)
    ]


def _pixels(image):
    return torch.from_numpy(np.array(image.convert("RGB").resize((8, 8)), np.float32).transpose(2, 0, 1)) / 99 - 1


def build(family, folder=None, dtype=torch.float32):
    """A model and its processor; saved to ``folder``, and loaded from there, as references are."""
    model = vlms.build(FAMILIES[family]).to(dtype)
    model.generation_config = hf.GenerationConfig(eos_token_id=2, pad_token_id=0)
    if folder is not None:
        model.save_pretrained(folder)
        model = type(model).from_pretrained(folder, dtype=dtype)
    return model, TinyProcessor(tokenizer(), family=family)


def without_fp32(model, monkeypatch):
    """Undo what transformers rounds to fp32 on the way, whatever the dtype of the model is."""
    for kind in {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(kind, "forward", _rms_norm)
    module = sys.modules[type(model).__module__]
    if hasattr(module, "apply_rotary_pos_emb_vision"):
        monkeypatch.setattr(module, "apply_rotary_pos_emb_vision", _rotated)


def _rms_norm(norm, x):
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    factor = 1 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight
    return factor * x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()


def _rotated(query, key, cos, sin):
    def rotated(x):
        left, right = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]

    return rotated(query), rotated(key)


def image(number):
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def said(role, text):
    return {"role": role, "content": text}


def prompts(count=4):
    """Questions of several lengths, each with an image."""
    words = iter(WORDS * 3)
    questions = [" ".join(next(words) for _ in range(2 + number % 3)) for number in range(count)]
    return Dataset.from_dict({
        "prompt": [[said("user", each)] for each in questions],
        "image": [image(number % IMAGES) for number in range(count)],
        "number": list(range(count)),
    })  # fmt: skip


def pairs(count=4):
    """Questions with answers that differ in their first word, or begin alike."""
    found = prompts(count).to_dict()
    chosen = [" ".join(WORDS[number : number + 3 + number % 2]) for number in range(count)]
    rejected = [
        " ".join(WORDS[number : number + 1] + WORDS[40:42]) if number % 2 else " ".join(WORDS[30 : 34 + number])
        for number in range(count)
    ]
    del found["number"]
    return Dataset.from_dict(found | {
        "chosen": [[said("assistant", each)] for each in chosen],
        "rejected": [[said("assistant", each)] for each in rejected],
        "image": [image(number % IMAGES) for number in range(count)],
    })  # fmt: skip
