"""Runs the CUDA kernels on the CPU: ``*driver.cpp``, under AddressSanitizer and UBSan."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from lynx_kernels.backends import cuda_build

HERE = Path(__file__).parent
CSRC = cuda_build.find_csrc()
COMPILER = os.environ.get("CXX") or "c++"
MISSING = None if shutil.which(COMPILER) else f"there is no C++ compiler {COMPILER}"
# -ffp-contract=off as csrc/pack_frames/filter.h asks.
_FLAGS = (
    "-std=c++17",
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-ffp-contract=off",
    "-fno-sanitize-recover=all",
    "-Wall",
    "-Wextra",
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of lynx::Dtype


class KernelError(RuntimeError):
    """An assertion of a kernel, or what a sanitizer found."""


def compiled(source: Path) -> Path:
    """The program. It is compiled once for all test processes, and again only when a header changes."""
    digest = hashlib.sha256(" ".join((COMPILER, *_FLAGS)).encode())
    for path in [source, *sorted(HERE.glob("*.h")), *sorted(CSRC.rglob("*.h"))]:
        digest.update(path.read_bytes())
    program = cuda_build.cache_folder() / f"tests-{digest.hexdigest()[:16]}" / source.stem

    def make() -> None:
        unfinished = program.with_suffix(".unfinished")
        command = [COMPILER, *_FLAGS, f"-I{CSRC}", str(source), "-o", str(unfinished)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert not result.stderr, result.stderr  # warnings
        unfinished.rename(program)

    cuda_build.once(program, make)
    return program


def run(source: Path, *words: str, given: bytes = b"") -> bytes:
    """Run the program and return what it writes. Leaks are not checked: a program that fails frees nothing.

    Raises:
        KernelError: it failed. The message is what it printed.
    """
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=0"}
    result = subprocess.run([compiled(source), *words], input=given, capture_output=True, env=environment)
    if result.returncode != 0:
        raise KernelError(result.stderr.decode(errors="replace"))
    return result.stdout


class HostKernels:
    """Stands in for ``torch.ops.lynx_kernels_cuda``.

    Attributes:
        seed: of the random order of blocks and threads.
        offset: elements in front of the rows of embeddings and frames, so that they do not start at multiples of 16
            bytes. Other arguments have the alignment of their tensors.
        multiprocessors: of the GPU. They are so few that a block has several tiles of rows or keys.
    """

    def __init__(self):
        self.seed, self.offset, self.multiprocessors = 0, 0, 3

    def pack_embeddings(self, token_ids: Tensor, embedding: Tensor, vision: Tensor, vision_index: Tensor) -> Tensor:
        out = embedding.new_empty((token_ids.shape[0], embedding.shape[1]))
        given = [token_ids, vision_index, embedding, vision]
        return self._run("pack_rows", given, out, embedding=embedding, vision=vision)

    def pack_embeddings_backward(
        self, grad: Tensor, vision_index: Tensor, num_vision: int, dtype: torch.dtype
    ) -> Tensor:
        out = grad.new_empty((num_vision, grad.shape[1]), dtype=dtype)
        return self._run("sum_rows", [vision_index, grad], out, grad=grad)

    def pack_frames(
        self,
        frames: list[Tensor],
        out: Tensor,
        levels: Tensor,
        boxes: list[int],
        flips: list[int],
        fits: list[int],
        grid: list[int],
        resample: int,
    ) -> None:
        numbers = {
            "seed": self.seed, "frames": len(frames), "resample": resample, "element_size": out.element_size(),
            "out_offset": self.offset,
        }  # fmt: skip
        given = [torch.tensor(grid).numpy().tobytes(), _memory(levels)]
        for index, frame in enumerate(frames):
            top, left, height, width = boxes[4 * index : 4 * index + 4]
            memory = _memory(frame[top : top + height, left : left + width])
            head = [*frame.stride(), height, width, flips[index], 0, len(memory), *fits[5 * index : 5 * index + 5]]
            given += [torch.tensor(head).numpy().tobytes(), memory]
        words = [f"{name}={value}" for name, value in numbers.items()]
        said = run(HERE / "pack_driver.cpp", "pack_frames", *words, given=b"".join(given))
        if said:
            out.copy_(torch.frombuffer(bytearray(said), dtype=out.dtype).view(out.shape))

    def adapter_small_m(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor | None,
        scale: Tensor,
        eps: float,
        activation: int,
    ) -> tuple[Tensor, ...]:
        (tokens, width), bottleneck = x.shape, down_weight.shape[0]
        statistics = x.new_empty(tokens if norm_weight is not None else 0, dtype=torch.float32)
        results = [x.new_empty(x.shape), statistics, statistics, down_weight.new_empty(tokens, bottleneck)]
        arguments = {
            "x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "down": down_weight, "down_bias": down_bias,
            "up": up_weight, "up_bias": up_bias, "scale": scale,
        }  # fmt: skip
        numbers = {
            "seed": self.seed, "multiprocessors": self.multiprocessors, "tokens": tokens, "width": width,
            "bottleneck": bottleneck, "activation": activation,
        }  # fmt: skip
        for name, tensor in arguments.items():
            numbers[f"{name}_dtype"] = -1 if tensor is None else _DTYPES.index(tensor.dtype)
            numbers[f"{name}_offset"] = 0 if tensor is None else _offset(tensor)
            if tensor is not None and tensor.dim() == 2:
                numbers[f"{name}_stride"] = tensor.stride(0)
        given = [_memory(torch.tensor(eps)), *(_memory(each) for each in arguments.values() if each is not None)]
        return _run_for("adapter_driver.cpp", numbers, given, results)

    def prefix_attention_decode(
        self,
        q: Tensor,
        shared_k: Tensor,
        shared_v: Tensor,
        branch_k: Tensor,
        branch_v: Tensor,
        ranges: Tensor,
        branch_lengths: Tensor,
        scale: float,
    ) -> tuple[Tensor, ...]:
        caches = {"shared_k": shared_k, "shared_v": shared_v, "branch_k": branch_k, "branch_v": branch_v}
        indices = {"ranges": ranges, "branch_lengths": branch_lengths}
        numbers = {
            "seed": self.seed, "multiprocessors": self.multiprocessors, "branches": q.shape[0], "queries": q.shape[1],
            "heads": q.shape[2], "dim": q.shape[3], "kv_heads": shared_k.shape[1], "ranges": ranges.shape[1],
            "num_shared": shared_k.shape[0], "branch_capacity": branch_k.shape[1], "q_dtype": _DTYPES.index(q.dtype),
            "cache_dtype": _DTYPES.index(shared_k.dtype), "q_offset": _offset(q),
        }  # fmt: skip
        given = [torch.tensor(scale, dtype=torch.float64).numpy().tobytes(), _memory(q)]
        for name, cache in caches.items():
            given.append(_memory(cache))
            numbers |= {f"{name}_bytes": len(given[-1]), f"{name}_offset": _offset(cache)}
            strides = cache.stride()[:-1] if cache.dim() == 4 else (cache.stride(0), *cache.stride()[:-1])
            numbers |= {f"{name}_stride{i}": stride for i, stride in enumerate(strides)}
        for name, index in indices.items():
            given.append(_memory(index))
            numbers[f"{name}_is_long"] = int(index.dtype == torch.int64)
        results = [q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)]
        return _run_for("decode_driver.cpp", numbers, given, results)

    def _run(self, kernel: str, given: list[Tensor], out: Tensor, **rows: Tensor) -> Tensor:
        numbers = {"seed": self.seed, "width": out.shape[1], "out_offset": 0}
        for name, tensor in {**rows, "out": out}.items():
            numbers |= {
                f"{name}_rows": tensor.shape[0], f"{name}_stride": tensor.stride(0),
                f"{name}_dtype": _DTYPES.index(tensor.dtype),
            }  # fmt: skip
            numbers.setdefault(f"{name}_offset", self.offset)
        words = [f"{name}={value}" for name, value in numbers.items()]
        said = run(HERE / "pack_driver.cpp", kernel, *words, given=b"".join(map(_memory, given)))
        return torch.frombuffer(bytearray(said), dtype=out.dtype).view(out.shape) if said else out


def launches(driver: str, **numbers: int) -> list[list[int]]:
    """How kernels would be launched, as ``driver`` prints it: a row of numbers for each launch."""
    words = [f"{name}={value}" for name, value in numbers.items()]
    return [[int(word) for word in line.split()] for line in run(HERE / driver, "shape", *words).splitlines()]


def _run_for(driver: str, numbers: dict[str, int], given: list[bytes], results: list[Tensor]) -> tuple[Tensor, ...]:
    """Run the program and return what it writes as tensors like ``results``."""
    said = run(HERE / driver, *(f"{name}={value}" for name, value in numbers.items()), given=b"".join(given))
    sizes = [each.nbytes for each in results]
    if not said:  # frombuffer takes no empty buffer
        return tuple(results)
    pieces = torch.frombuffer(bytearray(said), dtype=torch.uint8).split(sizes)
    return tuple(piece.clone().view(each.dtype).view(each.shape) for piece, each in zip(pieces, results, strict=True))


def _offset(tensor: Tensor) -> int:
    """Bytes behind a multiple of 16, which decide how kernels may load."""
    return tensor.data_ptr() % 16


def _memory(tensor: Tensor) -> bytes:
    """The bytes from the first element to the last, with what lies between rows."""
    if tensor.numel() == 0:
        return b""
    length = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.detach().as_strided((length,), (1,)).view(torch.uint8).numpy().tobytes()
