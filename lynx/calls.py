"""What a processor may be called with: the forms that transformers has for options, chats and lists of media."""

from typing import Any

from lynx.media.videos import is_video_file

_ALWAYS = {"padding": (True, "longest"), "return_tensors": (None, "pt")}  # how every batch is


def as_list(media: Any, depth: int) -> list:
    """A single item as a list of one; an item is ``depth`` lists deep (an image 0, a video 1 unless it is a file)."""
    if media is None:
        return []
    if isinstance(media, list | tuple) and media and is_video_file(media[0]):
        return list(media)
    first = media
    for _ in range(depth):
        first = first[0] if isinstance(first, list | tuple) and first else None
    return list(media) if isinstance(first, list | tuple) else [media]


def refuse_unexpected(options: dict[str, Any]) -> None:
    """Raise TypeError unless the options say how every batch is."""
    unexpected = {name: value for name, value in options.items() if value not in _ALWAYS.get(name, ())}
    if unexpected:
        raise TypeError(f"unexpected arguments {unexpected}; batches are torch tensors, padded to the longest row")


def with_sources(message: Any) -> Any:
    """A message whose images and videos stand under the names that ``encode`` knows."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return message  # text, or what encode refuses
    parts = []
    for part in content:
        kind = part.get("type")
        found = [part[key] for key in ("path", "url", "base64") if part.get(key) is not None]
        parts.append(
            {"type": kind, kind: found[0]} if kind in ("image", "video") and kind not in part and found else part
        )
    return {**message, "content": parts}
