"""What a fusion is: how media reach a decoder that knows text alone."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from lynx.fusion.rows import Rows

if TYPE_CHECKING:
    from lynx.config import LynxConfig
    from lynx.data.conversation import Sample
    from lynx.model import LynxForConditionalGeneration


class Fusion(ABC):
    """What a fusion installs in the decoder, what it feeds it, what trains, what it costs, and how it generates.

    A fusion is one object without state. The configuration and the model are arguments, and the vision tokens of a
    batch are handed on as arguments too; they are never stored on a module.

    Attributes:
        name: the value of ``LynxConfig.fusion``.
        options: the fields it adds to ``LynxConfig``, with their defaults. Integers must be at least 1.
        inputs: the keyword arguments it adds to the model's ``forward`` and ``generate``.
        submodule: the name of the module it adds to a layer of the decoder. Parameters are known by it.
        param_group: what recipes call these parameters, in a stage's list of what trains.
        param_group_help: what this group is, in a few words.
        shares_roots: whether ``generate`` may keep what rows share once, in a ``SharedRootCache``.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, int | str]]
    inputs: ClassVar[tuple[str, ...]]
    submodule: ClassVar[str]
    param_group: ClassVar[str]
    param_group_help: ClassVar[str]
    shares_roots: ClassVar[bool]

    # The configuration

    def check_options(self, config: "LynxConfig") -> None:
        """Raise ValueError for one of ``options`` that is out of range, whether this fusion is used or not."""
        for name, default in self.options.items():
            if isinstance(default, int):
                check_count(name, getattr(config, name))

    @abstractmethod
    def check(self, config: "LynxConfig") -> None:
        """Raise ValueError where this fusion is used and another field of the configuration contradicts it."""

    # The decoder

    @abstractmethod
    def install(self, decoder: nn.ModuleList, config: "LynxConfig") -> set[str]:
        """Add this fusion's modules to layers of the decoder; ``lynx_kernels.integrations.layers`` has what this takes.

        Args:
            decoder: all layers of the decoder, in their order.
            config: of the model.

        Returns:
            The class names that the changed layers now have, for ``_no_split_modules``.
        """

    def flops_rows(self, name: str) -> Literal["tokens", "latents"]:
        """What runs through the weight ``name`` of an installed module: the rows of text, or the vision tokens."""
        return "tokens"

    # Batches

    @abstractmethod
    def prefix_length(self, num_vision_tokens: int) -> int:
        """How many of a sample's vision tokens stand in its row, before the text."""

    def batch_inputs(
        self, samples: Sequence["Sample"], *, num_latents: int, sees_media: str, padded_length: int | None = None
    ) -> dict[str, Any]:
        """What the processor adds to a batch, some of ``inputs``.

        Args:
            samples: of the batch, in their order.
            num_latents: vision tokens of one image or video.
            sees_media: as ``LynxConfig.sees_media``.
            padded_length: tokens of a row in a left-padded batch; None for a packed one.
        """
        return {}

    # The forward pass

    @abstractmethod
    def embed(self, model: "LynxForConditionalGeneration", input_ids: Tensor, vision_tokens: Tensor | None) -> Tensor:
        """The embeddings of a batch's rows, (B, L, width), the vision tokens among them if that is their place."""

    @abstractmethod
    def feed(
        self,
        model: "LynxForConditionalGeneration",
        rows: Rows,
        vision_tokens: Tensor | None,
        inputs: Mapping[str, Any],
    ) -> Rows:
        """What the decoder is called with.

        Args:
            model: whose decoder it is.
            rows: embedded, with the masks and positions of causal text.
            vision_tokens: (N, width) of all items; None where the batch has no media.
            inputs: those of ``inputs`` that were passed.

        Returns:
            ``rows``, its mask, cache and ``keywords`` changed as this fusion needs them.

        Raises:
            ValueError: the inputs do not fit the rows or the cache.
        """

    # Generation

    @abstractmethod
    def generation_inputs(
        self,
        model: "LynxForConditionalGeneration",
        input_ids: Tensor | None,
        vision_tokens: Tensor | None,
        attention_mask: Tensor | None,
        inputs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What ``generate`` passes to every forward pass in place of ``inputs`` and of the media, which are encoded.

        Raises:
            ValueError: the inputs do not fit the rows.
        """

    def repeat_rows(self, inputs: dict[str, Any], rows: int, repeats: int) -> dict[str, Any]:
        """``generation_inputs`` for a batch whose ``rows`` rows are each repeated, as for beams.

        Tensors are left as they are: transformers repeats them itself.
        """
        return inputs


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless the field ``name`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, must be an integer of at least 1")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless the field ``name`` has one of the values it may have."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; there is {', '.join(map(repr, choices))}")


def check_frequency(name: str, config: "LynxConfig") -> None:
    """Raise ValueError where "every k-th layer" is beyond the decoder's last one."""
    layers = config.text_config.num_hidden_layers
    if getattr(config, name) > layers:
        raise ValueError(f"{name} is {getattr(config, name)}, but text_config has {layers} layers")
