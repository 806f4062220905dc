"""Further tiny random models of transformers with images or sound; ``ALL`` has those of vlms, too."""

import torch
import transformers as hf

from tests.lynx_kernels.vlms import (
    END,
    FAMILIES,
    IMAGE,
    MROPE,
    QWEN_TOKENS,
    QWEN_VISION,
    START,
    TEXT,
    VISION,
    VOCABULARY,
    WIDTH,
    Family,
    Gemma3,
    LlavaOneVision,
    PaliGemma,
    Pixtral,
    Qwen3VL,
    Row,
    SmolVLM,
)

WITHOUT_HEAD_DIM = {name: value for name, value in TEXT.items() if name != "head_dim"}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


class Llava(Family):
    title = "LLaVA"

    def model(self):
        config = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE
        )
        return hf.LlavaForConditionalGeneration(config)


class LlavaNext(LlavaOneVision):
    title = "LLaVA-Next"

    def model(self):
        grid = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]], "image_seq_length": 4}
        config = hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=hf.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            **grid,
        )
        return hf.LlavaNextForConditionalGeneration(config)


class Idefics3(SmolVLM):
    title = "Idefics 3"

    def model(self):
        vision, text = hf.Idefics3VisionConfig(**VISION), hf.LlamaConfig(**TEXT)
        config = hf.Idefics3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2)
        return hf.Idefics3ForConditionalGeneration(config)


class Idefics2(SmolVLM):
    """A Perceiver resampler; the second image of the last row is half as wide, with padding at its right."""

    title = "Idefics 2"
    tokens = (3, 3, 3)

    def model(self):
        resampler = hf.Idefics2PerceiverConfig(
            hidden_size=WIDTH, resampler_n_latents=3, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=8,
            num_key_value_heads=2,
        )  # fmt: skip
        config = hf.Idefics2Config(
            vision_config=hf.Idefics2VisionConfig(**VISION),
            perceiver_config=resampler,
            text_config=hf.MistralConfig(**TEXT, sliding_window=None),
            image_token_id=IMAGE,
        )
        return hf.Idefics2ForConditionalGeneration(config)

    def pixels(self, images):
        pixels = super().pixels(images)
        for index, image in enumerate(images):
            if image == 2:
                pixels["pixel_values"][index, ..., 4:] = 0
        return pixels


class Idefics(Family):
    """Gated cross-attention to resampled images between the layers of the decoder; tokens that see no image."""

    title = "Idefics"

    def model(self):
        vision = {
            "embed_dim": 24, "image_size": 8, "patch_size": 4, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }  # fmt: skip
        resampler = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8}
        sizes = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")}
        config = hf.IdeficsConfig(
            **sizes, num_hidden_layers=2, num_attention_heads=4, cross_layer_interval=1, qk_layer_norms=True,
            use_resampler=True, freeze_text_layers=False, freeze_vision_layers=False, max_position_embeddings=128,
            vision_config=vision, perceiver_config={"use_resampler": True, **resampler},
        )  # fmt: skip
        return hf.IdeficsForVisionText2Text(config)

    def image(self, number):
        return [9]

    def batch(self, side="right", rows=(0, 1, 2)):
        batch = super().batch(side, rows)
        tokens = batch["input_ids"]
        most = max(1, *(len(self.rows()[row].images) for row in rows), 1)
        pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        batch["pixel_values"] = torch.zeros(len(rows), most, 3, 8, 8)
        sees = torch.zeros(*tokens.shape, most, dtype=torch.int64)
        for index, row in enumerate(rows):
            first = int(batch["attention_mask"][index].argmax())
            for column, image in enumerate(self.rows()[row].images):
                batch["pixel_values"][index, column] = pixels[image]
                sees[index, first + 1 + 3 * column :, column] = 1
        return {**batch, "image_attention_mask": sees}


class InstructBLIP(Family):
    """Each row has one image, and a Q-Former that reads a text of its own beside it."""

    title = "InstructBLIP"
    tokens = (3, 3, 3)

    def model(self):
        former = hf.InstructBlipQFormerConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            encoder_hidden_size=24, cross_attention_frequency=2, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        config = hf.InstructBlipConfig(
            vision_config=hf.InstructBlipVisionConfig(**VISION, initializer_range=0.02),
            qformer_config=former,
            text_config=hf.LlamaConfig(**TEXT),
            num_query_tokens=3,
            image_token_index=IMAGE,
        )
        return hf.InstructBlipForConditionalGeneration(config)

    def rows(self):
        first, _, last = super().rows()
        return [first, Row([each for each in last.ids if each != IMAGE] + [IMAGE] * 3 + [7, 8], [1])]

    def batch(self, side="right", rows=(0, 1)):
        batch = super().batch(side, rows)
        ids = torch.randint(3, 58, (2, 5), generator=torch.Generator().manual_seed(6))
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        return {**batch, "qformer_input_ids": ids[list(rows)], "qformer_attention_mask": mask[list(rows)]}


class Blip2(InstructBLIP):
    """A Q-Former without a text of its own, over OPT."""

    title = "BLIP-2"

    def model(self):
        former = hf.Blip2QFormerConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            encoder_hidden_size=24, cross_attention_frequency=2, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        text = hf.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=WIDTH, max_position_embeddings=64, pad_token_id=0, dropout=0.0,
        )  # fmt: skip
        config = hf.Blip2Config(
            vision_config=hf.Blip2VisionConfig(**VISION, initializer_range=0.02),
            qformer_config=former,
            text_config=text,
            num_query_tokens=3,
            image_token_index=IMAGE,
        )
        return hf.Blip2ForConditionalGeneration(config)

    def batch(self, side="right", rows=(0, 1)):
        batch = super().batch(side, rows)
        return {name: value for name, value in batch.items() if not name.startswith("qformer")}


class PaliGemma2(PaliGemma):
    """Over Gemma 2, whose layers have windows and soft caps, and which SDPA cannot run."""

    title = "PaliGemma 2"
    implementation = "eager"

    def model(self):
        vision = hf.SiglipVisionConfig(**VISION, vision_use_head=False)
        text = hf.Gemma2Config(**TEXT, sliding_window=64, query_pre_attn_scalar=8)
        config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, projection_dim=WIDTH)
        return hf.PaliGemmaForConditionalGeneration(config)


class Gemma4(Gemma3):
    """Patches with positions; layers with windows and layers without. Its tower has linear layers of its own."""

    title = "Gemma 4"
    lora = r".*language_model.*(q|v)_proj"
    tolerance = 5e-5  # its own gradients in fp32 differ from those in fp64 by 2.4e-5

    def model(self):
        kinds = ["sliding_attention", "full_attention"]
        text = hf.Gemma4TextConfig(
            **TEXT, sliding_window=5, layer_types=kinds, vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=4,
        )  # fmt: skip
        vision = hf.Gemma4VisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=12, patch_size=4, pooling_kernel_size=2, position_embedding_size=64,
        )  # fmt: skip
        config = hf.Gemma4Config(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=61)
        return hf.Gemma4ForConditionalGeneration(config)

    def pixels(self, images):
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(16, 2)
        pixels = torch.rand(3, 16, 48, generator=torch.Generator().manual_seed(5))[images]
        return {"pixel_values": pixels, "image_position_ids": grid.repeat(len(images), 1, 1)}

    def extra(self, ids):
        return {"mm_token_type_ids": (ids == IMAGE).long()}


class InternVL(Family):
    title = "InternVL"

    def model(self):
        vision = hf.InternVLVisionConfig(**{**VISION, "image_size": [16, 16], "patch_size": [4, 4]})
        config = hf.InternVLConfig(
            vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=4
        )
        return hf.InternVLForConditionalGeneration(config)

    def pixels(self, images):
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))[images]}


class Mistral3(Pixtral):
    title = "Mistral 3"
    sizes = torch.tensor([[16, 16], [16, 32], [16, 16]])

    def model(self):
        vision = hf.PixtralVisionConfig(**{**VISION, "image_size": 32}, **ROPE)
        text = hf.MistralConfig(**TEXT, sliding_window=None)
        config = hf.Mistral3Config(
            vision_config=vision, text_config=text, image_token_id=IMAGE, spatial_merge_size=2, vision_feature_layer=-1
        )
        return hf.Mistral3ForConditionalGeneration(config)

    def pixels(self, images):
        sizes = self.sizes[images]
        pixels = torch.randn(3, 3, 16, 32, generator=torch.Generator().manual_seed(5))[images]
        return {"pixel_values": pixels[..., : int(sizes[:, 1].max())], "image_sizes": sizes}


class Qwen35(Qwen3VL):
    """A layer of linear attention beside one of full attention."""

    title = "Qwen3.5"

    def model(self):
        vision = {**QWEN_VISION, "num_position_embeddings": 64}
        rope = {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
        text = {
            **TEXT, "layer_types": ["linear_attention", "full_attention"], "rope_parameters": rope,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
        }  # fmt: skip
        config = hf.Qwen3_5Config(text_config=text, vision_config=vision, **QWEN_TOKENS)
        return hf.Qwen3_5ForConditionalGeneration(config)


class GLM4V(Qwen3VL):
    title = "GLM-4V"

    def model(self):
        vision = {**QWEN_VISION, "image_size": 32}
        tokens = {name: value for name, value in QWEN_TOKENS.items() if "vision" not in name}
        config = hf.Glm4vConfig(
            text_config={**WITHOUT_HEAD_DIM, "rope_parameters": MROPE},
            vision_config=vision,
            image_start_token_id=START,
            image_end_token_id=END,
            **tokens,
        )
        return hf.Glm4vForConditionalGeneration(config)


class Molmo2(Family):
    """Image tokens of a row see each other, also those of several images; each is pooled from four patches."""

    title = "Molmo 2"

    def model(self):
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12}
        vision = hf.Molmo2VisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, image_size=[16, 16], patch_size=4, **heads
        )
        adapter = hf.Molmo2AdapterConfig(
            vision_feature_layer=[-1, -2], hidden_size=24, intermediate_size=40, text_hidden_size=WIDTH, **heads
        )
        tokens = {
            "image_patch_id": IMAGE, "image_start_token_id": START, "image_end_token_id": END,
            "low_res_image_start_token_id": 61, "frame_start_token_id": 3, "frame_end_token_id": 4,
        }  # fmt: skip
        text = hf.Molmo2TextConfig(**TEXT, additional_vocab_size=4)
        config = hf.Molmo2Config(vision_config=vision, adapter_config=adapter, text_config=text, **tokens)
        return hf.Molmo2ForConditionalGeneration(config)

    def pixels(self, images):
        count = len(images)
        pixels = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(5))[images]
        pooled = torch.cat([torch.arange(16).view(4, 4) + 16 * index for index in range(count)])
        return {
            "pixel_values": pixels,
            "image_token_pooling": pooled,
            "image_grids": torch.tensor([[2, 2, 0, 0]] * count),
            "image_num_crops": torch.ones(count, dtype=torch.int64),
        }

    def extra(self, ids):
        return {"mm_token_type_ids": (ids == IMAGE).long()}


class LFM2VL(Family):
    """Convolutions beside attention; images as patches, with padding."""

    title = "LFM2-VL"
    tokens = (4, 2, 4)

    def model(self):
        vision = hf.Siglip2VisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, patch_size=4,
            num_patches=16, vision_use_head=False,
        )  # fmt: skip
        text = hf.Lfm2Config(**WITHOUT_HEAD_DIM, layer_types=["conv", "full_attention"])
        config = hf.Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, projector_hidden_size=24)
        return hf.Lfm2VlForConditionalGeneration(config)

    def pixels(self, images):
        patches = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(5))
        shapes = torch.tensor([[4, 4], [2, 4], [4, 4]])
        mask = (torch.arange(16) < shapes.prod(1)[:, None]).long()
        return {
            "pixel_values": (patches * mask[..., None])[images],
            "spatial_shapes": shapes[images],
            "pixel_attention_mask": mask[images],
        }


class Qwen2Audio(Family):
    """Sound, some of it shorter than the longest."""

    title = "Qwen2-Audio"
    tokens = (8, 8, 5)

    def model(self):
        audio = hf.Qwen2AudioEncoderConfig(
            num_mel_bins=8, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=40, d_model=24,
            max_source_positions=16,
        )  # fmt: skip
        config = hf.Qwen2AudioConfig(audio_config=audio, text_config=hf.Qwen2Config(**TEXT), audio_token_index=IMAGE)
        return hf.Qwen2AudioForConditionalGeneration(config)

    def pixels(self, images):
        features = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(5))
        mask = torch.ones(3, 32, dtype=torch.int64)
        mask[2, 20:] = 0
        return {"input_features": features[images], "feature_attention_mask": mask[images]}


ALL = FAMILIES | {each.__name__: each() for each in (
    Qwen35, Gemma4, PaliGemma2, InternVL, Mistral3, GLM4V, Idefics2, Idefics3, Llava, LlavaNext, Molmo2, LFM2VL,
    InstructBLIP, Blip2, Qwen2Audio, Idefics,
)}  # fmt: skip
