"""From conversations about images and videos to the batches that Lynx reads, packed or padded."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from lynx.config import LynxConfig
from lynx.data.conversation import IGNORED, ConversationEncoder, Sample
from lynx.fusion import fusion_of
from lynx.media import tower
from lynx.media.arguments import as_list, with_sources
from lynx.media.image_processor import LynxImageProcessor
from lynx.media.images import ImageSource, load_image, random_resized_crop_box
from lynx.media.resampler import media_layout
from lynx.media.videos import VideoSource, load_video
from lynx_kernels import PackedLayout, SpanLayout

_ALWAYS = {"padding": (True, "longest"), "return_tensors": (None, "pt")}  # true of every batch
_SIGLIP = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "resize": "exact"}


class LynxProcessor(ProcessorMixin):
    """Turns text, images and videos into model inputs: ``[vision tokens] BOS User: question\\nBot: answer EOS``.

    With cross-attention a row has no vision tokens: ``cross_layout`` says which media its tokens see.

    Args:
        image_processor: turns frames into ``pixel_values``.
        tokenizer: a fast tokenizer with BOS, EOS and pad tokens.
        image_token_id: the placeholder id of a vision token; no text is tokenised to it.
        num_latents: vision tokens of one item, where a resampler makes them.
        tokens_per_frame: how many tokens the vision tower makes of one frame.
        max_frames: how many frames a video may have, and how many are taken from a video file.
        lowercase: whether text is lower-cased, as Lynx does.
        fusion, bridge, prefix_is_causal, sees_media: as in ``LynxConfig``.

    Raises:
        ValueError: a part is missing, or the tokenizer cannot be used.
    """

    def __init__(
        self,
        image_processor: LynxImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_token_id: int = 32001,
        num_latents: int = 32,
        tokens_per_frame: int = 901,
        max_frames: int = 5,
        lowercase: bool = True,
        fusion: str = "prefix",
        bridge: str = "resampler",
        prefix_is_causal: bool = True,
        sees_media: str = "preceding",
        **kwargs: Any,
    ):
        self.fusion = fusion
        self.bridge = bridge
        self.prefix_is_causal = prefix_is_causal
        self.sees_media = sees_media
        self.image_token_id = image_token_id
        self.num_latents = num_latents
        self.tokens_per_frame = tokens_per_frame
        self.max_frames = max_frames
        self.lowercase = lowercase
        super().__init__(image_processor, tokenizer, **kwargs)
        if image_processor is None or tokenizer is None:
            raise ValueError("LynxProcessor needs an image_processor and a tokenizer")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer has no {name.removesuffix('_id')}; set it before making a processor")
        if image_token_id < len(tokenizer):
            raise ValueError(
                f"image_token_id is {image_token_id}, one of the tokenizer's {len(tokenizer)} ids; choose a larger "
                "one, which no text can have"
            )
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer must be a fast one (of the tokenizers library), which gives offsets")

    @classmethod
    def for_model(
        cls,
        config: LynxConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        lowercase: bool = True,
        image_options: dict[str, Any] | None = None,
    ) -> Self:
        """The processor whose batches fit a model of this configuration.

        Args:
            config: of the model.
            tokenizer, lowercase: as above.
            image_options: options of ``LynxImageProcessor``, for a tower that needs others than CLIP, EVA or SigLIP.
        """
        vision_config = config.vision_config
        image_processor = LynxImageProcessor(
            **{
                "size": vision_config.image_size,
                "patch_size": vision_config.patch_size,
                "output": "patches" if tower.takes_patches(vision_config) else "pixels",
                **(_SIGLIP if vision_config.model_type.startswith("siglip") else {}),
                **(image_options or {}),
            }
        )
        return cls(
            image_processor,
            tokenizer,
            image_token_id=config.image_token_id,
            num_latents=config.num_latents,
            tokens_per_frame=tower.tokens_per_frame(vision_config),
            max_frames=config.max_frames,
            lowercase=lowercase,
            fusion=config.fusion,
            bridge=config.bridge,
            prefix_is_causal=config.prefix_is_causal,
            sees_media=config.sees_media,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The left-padded batch of some questions, each about images or videos, for ``generate``.

        Args:
            images: with one text, an image or a list of images. With a list of texts, a list that holds the same, or
                None, for each text. An image is a path, bytes, a PIL image or a (H, W, 3) uint8 array.
            text: a question, or a list of questions.
            videos: like images; a video is a list of images, or the path or bytes of a video file.
            kwargs: ``padding=True`` and ``return_tensors="pt"``, which other processors take; they change nothing.

        Returns:
            ``input_ids`` and ``attention_mask``; where there are media ``pixel_values``, ``frame_positions`` and
            ``media_layout``; with cross-attention also ``cross_layout``.

        Raises:
            ValueError: an empty question, an unusable image or video, too many frames, or lists of different lengths.
        """
        if text is None:
            raise ValueError("text is missing: pass a question, or a list of questions")
        _refuse_unexpected(kwargs)
        if isinstance(text, str):
            text, images, videos = [text], [images], [videos]
        if not isinstance(text, Sequence) or not all(isinstance(each, str) for each in text):
            raise ValueError(f"text must be a question or a list of questions, got {text!r}")
        per_text = {"images": images, "videos": videos}
        for name, media in per_text.items():
            if media is not None and (not isinstance(media, list | tuple) or len(media) != len(text)):
                raise ValueError(f"{name} must be a list with one entry (or None) for each of the {len(text)} texts")
        conversations = []
        for row, question in enumerate(text):
            content: list[dict[str, Any]] = [
                *({"type": "image", "image": image} for image in as_list(images and images[row], depth=0)),
                *({"type": "video", "video": video} for video in as_list(videos and videos[row], depth=1)),
                {"type": "text", "text": question},
            ]
            conversations.append([{"role": "user", "content": content}])
        return self._questions(conversations)

    def _questions(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> BatchFeature:
        batch = self.pad([self.encode(messages) for messages in conversations])
        del batch["labels"], batch["max_supervised"]
        return batch

    def apply_chat_template(  # type: ignore[override]  # fewer options
        self,
        conversation: Sequence[Any],
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The left-padded batch of one conversation, or of a list of conversations, as pipelines ask for it.

        Args:
            conversation: as ``encode`` takes it, ending with a question. As elsewhere in transformers, an image or
                video may also stand under "path", "url" or "base64" in its part; a URL is never fetched.
            tokenize, return_dict: must be True: Lynx has no template that makes text of images.
            continue_final_message, add_generation_prompt: must be False and True, as the conversation ends with a
                question.
            processor_kwargs, kwargs: as ``kwargs`` of a call.

        Raises:
            ValueError, TypeError: as for ``encode`` and a call; or another option was passed.
        """
        is_one = bool(conversation) and isinstance(conversation[0], dict)
        conversations = [conversation] if is_one else conversation
        is_asked = all(len(messages) % 2 for messages in conversations)  # user and assistant take turns
        if not (tokenize and return_dict and add_generation_prompt and is_asked) or continue_final_message:
            raise ValueError(
                "apply_chat_template makes batches of questions: pass tokenize=True, return_dict=True and "
                "add_generation_prompt=True, and conversations that each end with a question"
            )
        _refuse_unexpected({**kwargs, **(processor_kwargs or {})})
        return self._questions([[with_sources(message) for message in messages] for messages in conversations])

    def encode(self, messages: Sequence[dict[str, Any]]) -> Sample:
        """One conversation in transformers' messages format.

        Args:
            messages: ``{"role": "user" | "assistant", "content": ...}``, alternating, the user first. Content is a
                string, or a list of ``{"type": "text", "text": ...}``, ``{"type": "image", "image": ...}`` and
                ``{"type": "video", "video": ...}``; a video is a list of frames or a video file. With prefix fusion all
                media come before the text, in their order. With cross-attention each keeps its place in the content,
                and media before the text of a message come before its "User:". Every answer is supervised, with the EOS
                after it.

        Raises:
            ValueError: the roles do not alternate, a text is empty, a content type is unknown, or a video has too many
                frames.
        """
        return self._conversations.encode(messages)

    def encode_branches(
        self, conversations: Sequence[Sequence[dict[str, Any]]], parents: Sequence[int] | None = None
    ) -> Sample:
        """Several conversations about the same media; a pack holds the media, and what they share, once.

        Args:
            conversations: each as ``encode`` takes it.
            parents: for conversation i, the earlier one that its messages continue, or -1; depth first, as in
                ``PackedLayout.from_segments``. So several answers to one question are conversations that begin with
                the assistant. All tokens of an answer are supervised, the first one of a branch too: the last row of
                what it continues predicts it. None: no conversation continues another.

        Raises:
            ValueError: as for ``encode``, a conversation after the first has media, or the parents do not fit.
        """
        return self._conversations.encode_branches(conversations, parents)

    def costs(self, sample: Sample) -> tuple[int, int]:
        """What a sample adds to a pack: tokens of the row, and tokens of the vision tower. Its media are not opened."""
        frames = sum(self.max_frames if isinstance(item, VideoSource) else len(item) for item in sample.media)
        [(token_ids, _)] = self._rows([sample])
        return len(token_ids), frames * self.tokens_per_frame

    @property
    def _conversations(self) -> ConversationEncoder:
        return ConversationEncoder(self.tokenizer, max_frames=self.max_frames, lowercase=self.lowercase)

    def pack(
        self,
        samples: Sequence[Sample],
        *,
        generator: np.random.Generator | Sequence[np.random.Generator | None] | None = None,
        always_vision: bool = False,
        weighs_answers: bool = False,
    ) -> BatchFeature:
        """One packed row, (1, T): each sample's vision tokens as a root, and its text as a branch, or a tree of them.

        Args:
            samples: what ``encode`` or ``encode_branches`` returned, in the order of the row.
            generator: draws a random resized crop for every item and the frames of video files, as for training; None
                for the centre crop and the middle frames. Or a list with one for each sample, all None or all not.
            always_vision: if there are no media, give the vision tower a black image of which no token is made. The
                tower then runs in every batch, which the reduction of its gradients across processes needs.
            weighs_answers: also return ``label_weights``, those of ``Sample.label_weights``: long answers count for
                less than their tokens.

        Returns:
            ``input_ids``, ``labels``, ``max_supervised`` (how many labels there are) and ``layout``; where there are
            media ``pixel_values``, ``frame_positions`` and ``media_layout``; with cross-attention also
            ``cross_layout``.

        Raises:
            ValueError: there are no samples, or only some have a generator.
            ImageError: an image or video cannot be used.
        """
        rows = self._rows(samples)
        layout = self._layout(samples)
        weights = {}
        if weighs_answers:
            padded = [[0.0] * self.prefix_length(each.media) + each.label_weights() for each in samples]
            weights["label_weights"] = torch.tensor([[weight for row in padded for weight in row]])
        return BatchFeature(
            {
                "input_ids": torch.tensor([[token for ids, _ in rows for token in ids]], dtype=torch.int64),
                "labels": torch.tensor([[label for _, labels in rows for label in labels]], dtype=torch.int64),
                "max_supervised": sum(sample.num_supervised for sample in samples),
                "layout": layout,
                **weights,
                **(self._media(samples, generator) or (self._unseen_image() if always_vision else {})),
                **self._fusion_inputs(samples),
            }
        )

    def pad(self, samples: Sequence[Sample], *, generator: np.random.Generator | None = None) -> BatchFeature:
        """A left-padded batch, (B, L): ``input_ids``, ``attention_mask``, ``labels``, and the rest as from ``pack``.

        Raises:
            ValueError: there are no samples, or one has several branches.
            ImageError: an image or video cannot be used.
        """
        if any(sample.branch_lengths for sample in samples):
            raise ValueError("a sample with several branches cannot be padded; pack it, or encode each conversation")
        rows = self._rows(samples)
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        return BatchFeature(
            {
                "input_ids": torch.tensor([[pad] * (length - len(ids)) + ids for ids, _ in rows]),
                "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows]),
                "labels": torch.tensor([[IGNORED] * (length - len(labels)) + labels for _, labels in rows]),
                "max_supervised": sum(sample.num_supervised for sample in samples),
                **self._media(samples, generator),
                **self._fusion_inputs(samples, padded_length=length),
            }
        )

    def _layout(self, samples: Sequence[Sample]) -> PackedLayout:
        """Of each sample a root of vision tokens, which has none where there are no media, and its texts below."""
        lengths: list[int] = []
        parents: list[int] = []
        for sample in samples:
            root = len(lengths)
            lengths += [self.prefix_length(sample.media), *(sample.branch_lengths or [len(sample.token_ids)])]
            parents += [-1, *(root + 1 + parent if parent >= 0 else root for parent in sample.branch_parents or [-1])]
        full = None if self.prefix_is_causal else [parent == -1 for parent in parents]
        return PackedLayout.from_segments(lengths, parents, full=full)

    def _rows(self, samples: Sequence[Sample]) -> list[tuple[list[int], list[int]]]:
        if not samples:
            raise ValueError("a batch needs at least one sample")
        rows = []
        for sample in samples:
            vision_tokens = self.prefix_length(sample.media)
            token_ids = [self.image_token_id] * vision_tokens + sample.token_ids
            rows.append((token_ids, [IGNORED] * vision_tokens + sample.labels))
        return rows

    def prefix_length(self, media: Sequence[Sequence[ImageSource] | VideoSource]) -> int:
        """How many vision tokens the row of a sample with these media has."""
        if self.bridge == "resampler":
            vision_tokens = len(media) * self.num_latents
        else:
            frames = sum(self.max_frames if isinstance(item, VideoSource) else len(item) for item in media)
            vision_tokens = frames * self.tokens_per_frame
        return fusion_of(self).prefix_length(vision_tokens)

    def _fusion_inputs(self, samples: Sequence[Sample], padded_length: int | None = None) -> dict[str, Any]:
        return fusion_of(self).batch_inputs(
            samples, num_latents=self.num_latents, sees_media=self.sees_media, padded_length=padded_length
        )

    def _media(
        self,
        samples: Sequence[Sample],
        generator: np.random.Generator | Sequence[np.random.Generator | None] | None,
    ) -> dict[str, Any]:
        generators = generator if isinstance(generator, Sequence) else [generator] * len(samples)
        drawn = [(item, each) for sample, each in zip(samples, generators, strict=True) for item in sample.media]
        if not drawn:
            return {}
        items = [self.load_frames(item, generator=each) for item, each in drawn]
        is_video = [flag for sample in samples for flag in sample.is_video]
        counts = [len(item) for item in items]
        positions = [i if video else -1 for n, video in zip(counts, is_video, strict=True) for i in range(n)]
        cropping = [each for _, each in drawn if each is not None]
        if cropping and len(cropping) < len(drawn):
            raise ValueError("only some samples have a generator; pass one for each sample of the batch, or for none")
        crop_boxes = [box for item, each in zip(items, cropping, strict=False) for box in _crop_boxes(item, each)]
        frames = self.image_processor([frame for item in items for frame in item], crop_boxes=crop_boxes or None)
        batch = {"pixel_values": frames["pixel_values"], "frame_positions": torch.tensor(positions)}
        if self.bridge == "resampler":
            batch["media_layout"] = media_layout(counts, self.tokens_per_frame, self.num_latents)
        return batch

    def _unseen_image(self) -> dict[str, Any]:
        size, tokens = self.image_processor.size, self.tokens_per_frame
        return {
            **self.image_processor(np.zeros((size, size, 3), np.uint8)),
            "frame_positions": torch.tensor([-1]),
            "media_layout": SpanLayout.from_spans([0], [(0, tokens)], tokens),
        }

    def load_frames(
        self, item: Sequence[ImageSource] | VideoSource, *, generator: np.random.Generator | None = None
    ) -> list[Image.Image]:
        """Decode one item of a ``Sample``'s media; of a video file ``max_frames`` frames, which ``load_video`` picks.

        Raises:
            ImageError: an image or video cannot be used; the message names it.
        """
        limit = self.image_processor.max_image_pixels
        if isinstance(item, VideoSource):
            return load_video(item, self.max_frames, generator=generator, max_pixels=limit)
        return [load_image(frame, max_pixels=limit) for frame in item]

    def answer_of(self, token_ids: torch.Tensor) -> str:
        """The text of newly generated ``token_ids``, without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def _refuse_unexpected(options: dict[str, Any]) -> None:
    """Raise TypeError unless the options ask for what every batch is."""
    unexpected = {name: value for name, value in options.items() if value not in _ALWAYS.get(name, ())}
    if unexpected:
        raise TypeError(
            f"unexpected arguments {unexpected}; leave them out: batches are torch tensors, padded to the longest row"
        )


def _crop_boxes(frames: list[Image.Image], generator: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """A random box for each frame of an item; frames of the same size share one, so that a video does not jump."""
    boxes: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    for frame in frames:
        if frame.size not in boxes:
            boxes[frame.size] = random_resized_crop_box(frame.height, frame.width, generator)
    return [boxes[frame.size] for frame in frames]
