"""Tiny random vision-language models of transformers, with batches of no, one and two images a row."""

from dataclasses import dataclass, field

import torch
import transformers as hf

VOCABULARY, IMAGE, WIDTH, START, END = 64, 60, 32, 62, 63
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_VISION = {
    "depth": 2, "hidden_size": 24, "intermediate_size": 40, "out_hidden_size": WIDTH, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": START, "vision_end_token_id": END
}  # fmt: skip


@dataclass
class Row:
    ids: list[int]
    images: list[int]  # numbers of its images


class Family:
    """Square images of four tokens each."""

    title: str  # its name
    tokens = (4, 4, 4)  # of each image
    implementation = "sdpa"  # what it runs without ours
    tolerance = 2e-5
    answer_type = 0  # the type of an answer's tokens, in what extra() returns
    lora: list[str] | str = ["q_proj", "v_proj"]  # noqa: RUF012  # what peft adapts

    def model(self):
        raise NotImplementedError

    def rows(self):
        generator = torch.Generator().manual_seed(11)

        def text(length):
            return torch.randint(3, 58, (length,), generator=generator).tolist()

        image = [self.image(number) for number in range(3)]
        return [
            Row(text(2) + image[0] + text(3), [0]),
            Row(text(4), []),
            Row(text(1) + image[1] + text(2) + image[2] + text(2), [1, 2]),
        ]

    def image(self, number):
        return [IMAGE] * self.tokens[number]

    def pixels(self, images):
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))[images]}

    def extra(self, ids):
        return {}

    def batch(self, side="right", rows=(0, 1, 2)):
        """Inputs of a padded batch."""
        rows = [self.rows()[row] for row in rows]
        length = max(len(row.ids) for row in rows)
        ids, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens = slice(length - len(row.ids), length) if side == "left" else slice(0, len(row.ids))
            ids[index, tokens], mask[index, tokens] = torch.tensor(row.ids), 1
        images = [image for row in rows for image in row.images]
        pixels = self.pixels(images) if images else {}
        return {"input_ids": ids, "attention_mask": mask, **pixels, **self.extra(ids)}


class LlavaOneVision(Family):
    title = "LLaVA-OneVision"
    tokens = (16, 16, 16)

    def model(self):
        vision = hf.SiglipVisionConfig(**VISION, vision_use_head=False)
        grid = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
        text = hf.Qwen2Config(**TEXT)
        config = hf.LlavaOnevisionConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=61, **grid
        )
        return hf.LlavaOnevisionForConditionalGeneration(config)

    def pixels(self, images):
        pixels = torch.randn(3, 3, 3, 8, 8, generator=torch.Generator().manual_seed(5))[images]
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 8]] * len(images))}


class SmolVLM(Family):
    title = "SmolVLM"
    tokens = (1, 1, 1)

    def model(self):
        vision, text = hf.SmolVLMVisionConfig(**VISION), hf.LlamaConfig(**TEXT)
        config = hf.SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2)
        return hf.SmolVLMForConditionalGeneration(config)

    def batch(self, side="right", rows=(0, 1, 2)):
        """(B, images, 3, 8, 8), where black images are none."""
        batch, counts = super().batch(side, rows), [self.rows()[row].images for row in rows]
        most = max(map(len, counts))
        if "pixel_values" not in batch:
            return batch
        pixels, images = torch.zeros(len(rows), most, 3, 8, 8), iter(batch["pixel_values"])
        for row, numbers in enumerate(counts):
            for column in range(len(numbers)):
                pixels[row, column] = next(images)
        mask = pixels.ne(0).any(2).long()
        return {**batch, "pixel_values": pixels, "pixel_attention_mask": mask}


class Gemma3(Family):
    """Blocks of image tokens that see each other, longer than what is left of the window."""

    title = "Gemma 3"

    def model(self):
        vision = hf.SiglipVisionConfig(**VISION, vision_use_head=False)
        kinds = ["sliding_attention", "full_attention"]
        text = hf.Gemma3TextConfig(**TEXT, sliding_window=5, layer_types=kinds, query_pre_attn_scalar=8)
        tokens = {"boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": 4}
        config = hf.Gemma3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, **tokens)
        return hf.Gemma3ForConditionalGeneration(config)

    def extra(self, ids):
        return {"token_type_ids": (ids == IMAGE).long()}


class PaliGemma(Family):
    """A prefix in which everything sees everything."""

    title = "PaliGemma"
    answer_type = 1

    def model(self):
        vision = hf.SiglipVisionConfig(**VISION, vision_use_head=False)
        text = hf.GemmaConfig(**TEXT)
        config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, projection_dim=WIDTH)
        return hf.PaliGemmaForConditionalGeneration(config)

    def extra(self, ids):
        types = torch.zeros_like(ids)
        types[:, -2:] = 1
        return {"token_type_ids": types}


class Qwen25VL(Family):
    """Images of several sizes; one layer of the tower attends to windows of them."""

    title = "Qwen2.5-VL"
    grids = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 6, 4]])  # in patches; four are a token
    tokens = (4, 8, 6)

    def model(self):
        vision = {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}
        text = {**TEXT, "rope_parameters": MROPE}
        config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
        return hf.Qwen2_5_VLForConditionalGeneration(config)

    def image(self, number):
        return [START, *super().image(number), END]

    def pixels(self, images):
        patches = torch.randn(3, 32, 96, generator=torch.Generator().manual_seed(5))
        chosen = [patches[image, : int(self.grids[image].prod())] for image in images]
        return {"pixel_values": torch.cat(chosen), "image_grid_thw": self.grids[images]}

    def extra(self, ids):
        return {"mm_token_type_ids": (ids == IMAGE).long()}


class Qwen3VL(Qwen25VL):
    title = "Qwen3-VL"

    def model(self):
        vision = {**QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        text = {**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
        config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
        return hf.Qwen3VLForConditionalGeneration(config)


class Pixtral(Family):
    """Images of several sizes, padded to the largest."""

    title = "Pixtral (LLaVA)"
    sizes = torch.tensor([[8, 8], [8, 16], [8, 8]])
    tokens = (4, 8, 4)

    def model(self):
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        vision = hf.PixtralVisionConfig(**{**VISION, "image_size": 16}, **rope)
        text = hf.MistralConfig(**TEXT, sliding_window=6)
        select = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **select)
        return hf.LlavaForConditionalGeneration(config)

    def pixels(self, images):
        sizes = self.sizes[images]
        pixels = torch.randn(3, 3, 8, 16, generator=torch.Generator().manual_seed(5))[images]
        return {"pixel_values": pixels[..., : int(sizes[:, 1].max())], "image_sizes": sizes}


class Mllama(Family):
    """Cross-attention to tiles of the images, instead of image tokens. Not every image has all of its tiles."""

    title = "Mllama"
    tokens = (1, 1, 1)

    def model(self):
        vision = hf.MllamaVisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
            vision_output_dim=48, image_size=8, patch_size=4, max_num_tiles=2, intermediate_layers_indices=[0],
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        )  # fmt: skip
        sizes = {name: value for name, value in TEXT.items() if name not in ("head_dim", "attention_dropout")}
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        text = hf.MllamaTextConfig(**{**sizes, "num_hidden_layers": 4}, cross_attention_layers=[1, 3], **rope)
        config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
        return hf.MllamaForConditionalGeneration(config)

    def batch(self, side="right", rows=(0, 1, 2)):
        ids = super().batch(side, rows)
        tokens = ids["input_ids"]
        if not (tokens == IMAGE).any():
            return {"input_ids": tokens, "attention_mask": ids["attention_mask"]}
        count, length = tokens.shape
        generator = torch.Generator().manual_seed(5)
        pixels = torch.randn(count, 2, 2, 3, 8, 8, generator=generator)
        tiles, ratios = torch.zeros(2, count, 2, 2, dtype=torch.int64)
        sees = torch.zeros(count, length, 2, 2, dtype=torch.int64)
        for row in range(count):
            for number, start in enumerate((tokens[row] == IMAGE).nonzero()[:, 0].tolist()):
                used = 2 - (row + number) % 2
                tiles[row, number, :used], ratios[row, number] = 1, used
                sees[row, start:, number, :used] = 1
        pixels = pixels * tiles[..., None, None, None]
        return {
            "input_ids": tokens, "attention_mask": ids["attention_mask"], "pixel_values": pixels,
            "aspect_ratio_ids": ratios[..., 0], "aspect_ratio_mask": tiles, "cross_attention_mask": sees,
        }  # fmt: skip


@dataclass
class Ran:
    """What a model returned, and its gradients."""

    logits: torch.Tensor | None
    loss: torch.Tensor | None
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


FAMILIES = {each.__name__: each() for each in (
    Qwen3VL, Gemma3, Qwen25VL, SmolVLM, LlavaOneVision, Mllama, PaliGemma, Pixtral,
)}  # fmt: skip


def build(family, implementation=None):
    """A model of a family, or of the one of that name, with values far from the initial ones."""
    torch.manual_seed(0)
    family = FAMILIES[family] if isinstance(family, str) else family
    model = family.model().eval()
    model.set_attn_implementation(implementation or family.implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_().clamp_(-2, 2).add_(0.05 * torch.randn_like(parameter))
    return model


def run(model, inputs):
    """Logits at tokens (tokens, V) with the gradients of a sum over them, or of the loss if there are labels."""
    model.zero_grad()
    out = model(**inputs, use_cache=False)
    logits, mask = out.logits, inputs.get("attention_mask")
    if logits is not None and isinstance(mask, torch.Tensor):
        logits = logits[mask.bool()]
    if "labels" in inputs:
        out.loss.backward()
    else:
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
        (logits * weight).sum().backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return Ran(*(None if each is None else each.detach() for each in (logits, out.loss)), found)


def assert_close(actual, expected, tolerance=2e-5):
    """Relative to the largest value; gradients to the largest of their kind, where they are not nearly zero."""
    for ours, theirs in ((actual.logits, expected.logits), (actual.loss, expected.loss)):
        if ours is not None and theirs is not None:
            assert ((ours - theirs).abs().max() <= tolerance * theirs.abs().max()).item()
    assert actual.gradients.keys() == expected.gradients.keys()
    largest = max(each.abs().max() for each in expected.gradients.values())
    for name, theirs in expected.gradients.items():
        error = (actual.gradients[name] - theirs).abs().max()
        assert error <= tolerance * max(theirs.abs().max(), 0.01 * largest), f"{name}: {error / theirs.abs().max()}"
