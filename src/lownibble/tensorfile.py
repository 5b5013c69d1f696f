"""Write and read safetensors files in parts, with only one part in memory at a time.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length, the header in JSON (name ->
dtype, shape and byte offsets), then all bytes without gaps. The safetensors library needs every tensor in memory at once to
write a file, and maps the file to read one, which counts as resident memory. Here the header is written first, then each part
at its offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""The format's dtype name -> torch dtype."""
_NAMES = {dtype: name for name, dtype in TYPES.items()}


class Entry(NamedTuple):
    """Dtype and shape of a tensor, and its byte offset after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def _bytes(values: Tensor) -> memoryview:
    whole = values.detach().contiguous().as_strided((values.numel(),), (1,))  # one of a single value may have any stride
    return memoryview(whole.view(torch.uint8).numpy())  # type: ignore[arg-type]


def write(
    path: Path, entries: dict[str, Entry], parts: Iterable[tuple[str, int, Tensor]], metadata: dict[str, str] | None = None
) -> None:
    """Write a file. `parts` are (name, index of the first value, values) and together cover every tensor of `entries` once."""
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))  # so that every tensor is aligned
    begins, end = {}, 0
    for name in order:
        begins[name], end = end, end + entries[name].nbytes
    header = json.dumps(
        ({"__metadata__": metadata} if metadata else {})
        | {
            name: {
                "dtype": _NAMES[entries[name].dtype],
                "shape": entries[name].shape,
                "data_offsets": [begins[name], begins[name] + entries[name].nbytes],
            }
            for name in order
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    written = 0
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, first, values in parts:
            file.seek(8 + len(header) + begins[name] + first * values.element_size())
            written += file.write(_bytes(values.cpu()))
    assert written == end, f"{written} bytes of {end} were given"


class Reader:
    """An open file: `entries` by name; `read_into` reads any part of a tensor.

    Raises:
        ValueError: it is not a complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        try:
            size = path.stat().st_size
            length = int.from_bytes(self._file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            self._start = 8 + length
            self.entries = {
                name: Entry(TYPES[found["dtype"]], tuple(found["shape"]), found["data_offsets"][0])
                for name, found in header.items()
            }
            end = self._start + max((entry.begin + entry.nbytes for entry in self.entries.values()), default=0)
            if size != end:
                raise ValueError(f"it has {size} bytes and should have {end}")
        except (KeyError, TypeError, AttributeError) as error:
            self._file.close()
            raise ValueError(f"its header is not safetensors' ({error!r})") from error
        except BaseException:
            self._file.close()
            raise

    def read_into(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out`, on any device, with values of a tensor from index `first` on."""
        values = out if out.device.type == "cpu" and out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
        self._file.seek(self._start + self.entries[name].begin + first * out.element_size())
        memory, done = _bytes(values), 0
        while done < len(memory):
            moved = self._file.readinto(memory[done:])
            if not moved:
                raise ValueError("it ended early")
            done += moved
        if values is not out:
            out.detach().copy_(values)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
