"""Packing embeddings against what people write: samples of vision rows and text to the language model's input.

Peers: ``pad_sequence`` (torch.cat for each sample, then pad_sequence: what padded models want, (samples, longest, d),
and the baseline), ``cat`` (one lookup for all text, then one torch.cat over the pieces of all samples),
``masked_scatter`` (what transformers' models do: look placeholders up too, then scatter the vision rows over them),
``where`` (both rows of every token, then choose), ``compile`` (torch.compile of ``where``). Floor: ``copy``, moving as
many bytes.

The table is frozen, as in every stage of Lynx: ``train`` is forward and backward with the gradient of the vision rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.checks import assert_near, forward, train
from benchmarks.harness import Case, Setup
from benchmarks.rows import OURS
from benchmarks.timing import cold_copies
from lynx_kernels.backends.dispatch import explain
from lynx_kernels.ops.pack_embeddings import OPERATION, pack_embeddings

# dtype, d, vision rows a sample, numbers of samples. 32 latents are Lynx's, 576 rows LLaVA's.
CPU = (
    ("fp32", 1024, 32, (1, 4, 16, 64, 256)), ("bf16", 1024, 32, (1, 4, 16, 64, 256)),
    ("fp32", 4096, 576, (1, 4, 8)), ("bf16", 4096, 576, (1, 4, 8)),
)  # fmt: skip
CUDA = (
    ("bf16", 4096, 32, (1, 4, 16, 64, 256)), ("bf16", 4096, 576, (1, 4, 16, 64)), ("fp32", 4096, 32, (16, 64, 256)),
)  # fmt: skip
QUICK = (("fp32", 1024, 32, (16, 64)), ("bf16", 1024, 32, (16, 64)))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PEERS = ("pad_sequence", "cat", "masked_scatter", "where", "compile")
_VOCABULARY = 32000
_LENGTHS = (16, 128)  # of a sample's text
# Up to here launching a peer's kernels from Python takes longer than running them.
_CAPTURED_BYTES = 2**28


@dataclass(frozen=True)
class Batch:
    """Samples of ``num_vision`` vision rows, then text: sample i has ``lengths[i]`` tokens of it.

    Attributes:
        token_ids: (T,), 0 where vision rows stand.
        vision_index: (T,) int32, -1 where text stands.
        text_ids: (tokens of text,), those of all samples.
    """

    num_vision: int
    lengths: list[int]
    token_ids: Tensor
    vision_index: Tensor
    text_ids: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.lengths) * self.num_vision + sum(self.lengths)


def make_batch(samples: int, num_vision: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*_LENGTHS, (samples,), generator=generator).tolist()
    token_ids, vision_index = [], []
    for sample, length in enumerate(lengths):
        token_ids += [torch.zeros(num_vision).long(), torch.randint(_VOCABULARY, (length,), generator=generator)]
        vision_index += [torch.arange(num_vision) + sample * num_vision, torch.full((length,), -1)]
    ids, index = torch.cat(token_ids).to(device), torch.cat(vision_index).int().to(device)
    return Batch(num_vision, lengths, ids, index, ids[index < 0])


def cat(batch: Batch, table: Tensor, vision: Tensor) -> Tensor:
    texts = F.embedding(batch.text_ids, table).split(batch.lengths)
    images = vision.split(batch.num_vision)
    return torch.cat([piece for pair in zip(images, texts, strict=True) for piece in pair])


def padded(batch: Batch, table: Tensor, vision: Tensor) -> Tensor:
    """(samples, longest, d)."""
    texts = F.embedding(batch.text_ids, table).split(batch.lengths)
    images = vision.split(batch.num_vision)
    rows = [torch.cat(pair) for pair in zip(images, texts, strict=True)]
    return pad_sequence(rows, batch_first=True)


def masked_scatter(batch: Batch, table: Tensor, vision: Tensor) -> Tensor:
    rows = F.embedding(batch.token_ids, table)
    return rows.masked_scatter((batch.vision_index >= 0)[:, None].expand_as(rows), vision)


def where(batch: Batch, table: Tensor, vision: Tensor) -> Tensor:
    index = batch.vision_index.long()
    return torch.where((index >= 0)[:, None], vision[index.clamp(0)], F.embedding(batch.token_ids, table))


def cases(*, quick: bool, device: str) -> Iterator[Case]:
    """Every dtype, width, number of vision rows, mode and number of samples, few first."""
    for name, width, num_vision, all_samples in QUICK if quick else {"cpu": CPU, "cuda": CUDA}[device]:
        for mode in ("forward", "train"):
            for samples in all_samples:
                yield Case(
                    "pack_embeddings",
                    mode,
                    f"{name} d={width} nv={num_vision} B={samples}",
                    partial(setup, mode, samples, num_vision, width, DTYPES[name], device),
                    (*_PEERS, *(OURS + impl for impl in OPERATION.names)),
                )


def setup(
    mode: str,
    samples: int,
    num_vision: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    compiler: Callable = torch.compile,
) -> Setup:
    """The providers of one case on random inputs, and a check of each against indexing in fp64."""
    torch._dynamo.reset()  # every shape is compiled for itself: the compiler at its best
    batch = make_batch(samples, num_vision, device)
    torch.manual_seed(0)
    table = torch.randn(_VOCABULARY, width, device=device).to(dtype)
    vision = torch.randn(samples * num_vision, width, device=device).to(dtype).requires_grad_()
    functions: dict[str, Callable[..., Tensor]] = {
        "pad_sequence": padded, "cat": cat, "masked_scatter": masked_scatter, "where": where,
        "compile": compiler(where, dynamic=False),
    }  # fmt: skip
    refused = explain(pack_embeddings, batch.token_ids, table, vision, batch.vision_index).reasons
    for impl in OPERATION.names:
        if impl not in refused:
            functions[OURS + impl] = partial(_ours, impl)
    packed_grad = torch.randn(batch.num_rows, width, device=device).to(dtype)
    grads = dict.fromkeys(functions, packed_grad) | {"pad_sequence": _pad(batch, packed_grad)}
    run = forward if mode == "forward" else train
    providers = {
        name: partial(run, partial(function, batch, table), grads[name]) for name, function in functions.items()
    }

    def check(name: str) -> None:
        exact_table, exact_vision = table.double(), vision.detach().double().requires_grad_()
        exact = run(partial(where, batch, exact_table), packed_grad.double(), [exact_vision])
        values = providers[name]([vision])
        if name == "pad_sequence":
            exact[0] = _pad(batch, exact[0])
        assert_near(values, exact)

    return Setup(
        providers=providers,
        copies=cold_copies([vision], device),
        check=check,
        traffic=_traffic(mode, batch, vision),
        device=device,
        captured=batch.num_rows * width * dtype.itemsize <= _CAPTURED_BYTES,
        parameters=[vision, table] if mode == "train" else (),
    )


def _ours(impl: str, batch: Batch, table: Tensor, vision: Tensor) -> Tensor:
    return pack_embeddings(batch.token_ids, table, vision, batch.vision_index, impl=impl)


def _pad(batch: Batch, rows: Tensor) -> Tensor:
    return pad_sequence(rows.split([batch.num_vision + length for length in batch.lengths]), batch_first=True)


def _traffic(mode: str, batch: Batch, vision: Tensor) -> int:
    """Every row is read once and written once; so is the gradient of every vision row."""
    row = vision.shape[1] * vision.dtype.itemsize
    return 2 * batch.num_rows * row + (2 * vision.nbytes if mode == "train" else 0)
