"""Put our arithmetic under an image processor of transformers that is there already, and take it out again.

Nothing of a processor's code is copied. Its class becomes a subclass of the one it had, of the same name, in which the
methods of transformers' Pillow backend compute in another way. Pixel values stay those of that backend, bit for bit.
"""

from collections import Counter
from types import TracebackType
from typing import Any, Self

from lynx_kernels.backends import cpu as cpu_backend

try:
    from transformers.image_processing_backends import PilBackend
except ImportError as error:
    raise ImportError(
        "lynx_kernels.integrations.processors needs a release of transformers whose image processors have backends "
        "(transformers.image_processing_backends), 5.23 say"
    ) from error

from lynx_kernels.integrations.processors.backend import PendingBackend, accelerated, counts


class Acceleration:
    """What ``accelerate_processor`` changed in a processor. Also a context manager, which undoes it at its end.

    Attributes:
        processor: the image processor that was changed.
    """

    def __init__(self, processor: PilBackend, own: type) -> None:
        self.processor, self._own = processor, own

    def report(self) -> str:
        """How many images ``pack_frames`` computed, what went the processor's own way, how often, and why."""
        noted = counts.get(self.processor, Counter())
        reasons = sorted(each for each in noted if each)
        lines = [f"in its own way, {noted[each]} times: {each}" for each in reasons]
        return "\n".join([f"{self._own.__name__}: {noted.get('', 0)} images by pack_frames", *lines])

    def undo(self) -> None:
        """Give the processor its class back. Undoing twice changes nothing.

        Raises:
            RuntimeError: something else changed its class since.
        """
        found = type(self.processor)
        if found is self._own:
            return
        if found is not accelerated(self._own):
            raise RuntimeError(
                f"undo: the processor is a {found.__module__}.{found.__qualname__} by now, which is not what "
                "accelerate_processor() made it; undo first what changed it since"
            )
        self.processor.__class__ = self._own
        counts.pop(self.processor, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def accelerate_processor(processor: Any) -> Acceleration:
    """Run ``pack_frames`` under an image processor's resize, rescale, normalize and patchify.

    All outputs stay those of the processor before, pixel values bit for bit: sizes, tiles and padding are decided by
    the processor's own code. What ``pack_frames`` cannot do exactly (filters other than bilinear, bicubic and Lanczos,
    images of floats or of one channel) goes the processor's own way. The logger ``lynx_kernels`` says so at INFO once
    for each reason, and the report counts it.

    Args:
        processor: an image processor of transformers with the Pillow backend, such as
            ``AutoImageProcessor.from_pretrained(..., backend="pil")`` loads; or a processor that has one as its
            ``image_processor``. Changed in place; a processor's videos stay as they are. Copies (``copy.deepcopy``,
            pickle) are accelerated as well and have nothing to undo. ``save_pretrained`` saves what it did before.

    Returns:
        ``undo()`` takes everything back, ``print(acceleration.report())`` says what was computed where.

    Raises:
        TypeError: it has no image processor with the Pillow backend; torchvision's computes other values.
        RuntimeError: it is accelerated already, or the kernels for CPUs are not built.
    """
    image_processor = getattr(processor, "image_processor", processor)
    own = type(image_processor)
    if not isinstance(image_processor, PilBackend):
        raise TypeError(
            "accelerate_processor: expected an image processor of transformers with the Pillow backend, got a "
            f'{own.__module__}.{own.__qualname__}; load it by from_pretrained(..., backend="pil")'
        )
    if issubclass(own, PendingBackend):
        raise RuntimeError(f"accelerate_processor: this {own.__name__} is accelerated already; undo() that first")
    if cpu_backend.MISSING:
        raise RuntimeError(
            f"accelerate_processor: without the kernels for CPUs it would be slow: {cpu_backend.MISSING}"
        )
    image_processor.__class__ = accelerated(own)  # type: ignore[arg-type]  # a class is hashable
    return Acceleration(image_processor, own)
