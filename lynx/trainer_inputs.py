"""What transformers' ``Trainer`` and its collators hand to ``forward`` that a Lynx model cannot use: refused by name.

``forward`` sees what comes of an option of ``TrainingArguments``, never the option; docs/training.md lists them.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # of the texts that DataCollatorWithFlattening joins


def check(
    labels: Tensor | None,
    position_ids: Tensor | None,
    num_items: Tensor | int | None,
    skip_logits: bool | None,
    others: Mapping[str, Any],
) -> None:
    """Raise ValueError where the labels were taken out of a batch or shifted, or texts joined without positions.

    With label_smoothing_factor Trainer scores the logits of a token by its own label rather than by the next one, and
    it knows nothing of layouts. A compute_loss_func may do better, but here both look alike.

    Args:
        labels, position_ids, num_items, skip_logits: of ``forward``.
        others: its keyword arguments that are not those of a Lynx model.
    """
    if labels is None and num_items is not None and skip_logits is not False:
        raise ValueError(
            "num_items_in_batch without labels: Trainer took the labels out of the batch. label_smoothing_factor is "
            "not supported, since its labels are not shifted: leave it out, and let data_collator add "
            "label_smoothing=0.1 to the batch. For a compute_loss_func, which must shift labels itself, let "
            "data_collator add skip_logits=False to the batch"
        )
    if others.get("shift_labels") is not None:
        raise ValueError(
            "shift_labels is not supported, nor is the context or sequence parallelism that makes it: pass labels, "
            "which the model shifts, and leave out parallelism_config"
        )
    bounds = [name for name in _BOUNDS if others.get(name) is not None]
    if bounds and position_ids is None:
        raise ValueError(
            f"{', '.join(bounds)} without position_ids: the texts of a row would see each other; let the collator "
            "return position_ids, or pass a layout"
        )
