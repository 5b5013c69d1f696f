"""Safetensors files in parts. Oracle: the safetensors library, both ways."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lownibble.tensorfile import Entry, Reader, write

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]


def _tensors(shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        f"a/{number}.é": (100 * torch.rand(shape, generator=generator)).to(dtype)
        for number, (shape, dtype) in enumerate(shapes)
    }  # fmt: skip


@given(
    shapes=st.lists(st.tuples(st.lists(st.integers(0, 7), max_size=3), st.sampled_from(DTYPES)), max_size=6),
    part=st.integers(1, 9),
    backwards=st.booleans(),
)
@settings(max_examples=60)
def test_files_written_and_read_in_parts_are_safetensors(tmp_path_factory, shapes, part, backwards):
    folder, tensors = tmp_path_factory.mktemp("files"), _tensors(shapes)
    parts = [
        (name, first, value.reshape(-1)[first : first + part])
        for name, value in tensors.items()
        for first in range(0, value.numel(), part)
    ]
    entries = {name: Entry(value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    write(folder / "ours", entries, reversed(parts) if backwards else parts)
    save_file(tensors, folder / "theirs")
    loaded = load_file(folder / "ours")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in tensors.items())
    for file in ("ours", "theirs"):
        with Reader(folder / file) as reader:
            found = {name: (entry.dtype, entry.shape) for name, entry in reader.entries.items()}
            assert found == {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
            for name, first, values in parts:
                out = torch.empty_like(values)
                reader.read_into(name, first, out)
                assert torch.equal(out, values)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b[:-1], "bytes and should have"),
        (lambda b: b + b"x", "bytes and should have"),
        (lambda b: b[:5], "cut off"),
        (lambda b: b"\xff" * 8 + b[8:], "cut off"),
        (lambda b: b[:8] + b"[" + b[9:], "delimiter"),
        (lambda b: b.replace(b'"F32"', b'"F31"'), "not safetensors"),
    ],
)
def test_damage_is_found(tmp_path, damage, words):
    save_file({"x": torch.ones(3, 4)}, tmp_path / "file")
    (tmp_path / "file").write_bytes(damage((tmp_path / "file").read_bytes()))
    with pytest.raises(ValueError, match=words):
        Reader(tmp_path / "file")


def test_a_strided_tensor_is_read_in_place(tmp_path):
    x = torch.arange(12.0).view(3, 4)
    save_file({"x": x}, tmp_path / "file")
    out = torch.zeros(4, 3).t()
    with Reader(tmp_path / "file") as reader:
        reader.read_into("x", 0, out)
    assert torch.equal(out, x)


def test_a_single_value_is_written_whatever_its_stride(tmp_path):
    """torch calls a tensor of one value contiguous with any strides: the corner of a matrix, as words that were cut are."""
    corner = torch.arange(2, dtype=torch.int32).view(1, 2)[:, 1:].t().contiguous()
    write(tmp_path / "file", {"a": Entry(torch.int32, (1, 1))}, [("a", 0, corner)])
    assert load_file(tmp_path / "file")["a"].tolist() == [[1]]
