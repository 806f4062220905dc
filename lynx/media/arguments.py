"""Images and videos as callers pass them: alone or in lists, and in the parts of a chat's messages."""

from typing import Any

from lynx.media.videos import is_video_file


def as_list(media: Any, depth: int) -> list[Any]:
    """A list of items; a single item becomes a list of one.

    Args:
        media: an item, a list of items, or None for no items.
        depth: how many lists deep an item is: 0 for an image, 1 for a video. A video file is always an item.
    """
    if media is None:
        return []
    if isinstance(media, list | tuple) and media and is_video_file(media[0]):
        return list(media)
    first = media
    for _ in range(depth):
        first = first[0] if isinstance(first, list | tuple) and first else None
    return list(media) if isinstance(first, list | tuple) else [media]


def with_sources(message: Any) -> Any:
    """A message whose images and videos stand under "image" and "video", as ``LynxProcessor.encode`` wants them.

    Elsewhere in transformers they may also stand under "path", "url" or "base64".
    """
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
