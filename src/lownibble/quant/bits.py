"""Codes of 1 to 8 bits in bytes.

Two orders occur. `pack` is for our own codecs: a string of bits with the first code in the highest bits, so that two 4-bit
codes are a byte with the first in the high nibble, as in bitsandbytes; `kernels/reference.unpack` reads it. `pack_words` and
`unpack_words` are for GPTQ's and compressed-tensors' files: 32-bit words with the first code in the lowest bits; codes that do
not divide 32 continue in the next word. `unpack_planes` reads GPTQModel's other order for those: for 32 codes first the words
with their low bits, then those with the next ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lownibble.quant.layouts import unit_of


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes below 2^bits, (n,), into `layouts.n_bytes_of(n, bits)` bytes; the last ones are filled with zeros."""
    size, n = unit_of(bits)
    units = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.numel() % n)).view(-1, n)
    packed = torch.zeros(len(units), size, dtype=torch.uint8, device=codes.device)
    for i in range(n):
        byte, start = divmod(bits * i, 8)
        after = 8 - start - bits  # as in `kernels/reference.unpack`
        packed[:, byte] |= units[:, i] << after if after >= 0 else units[:, i] >> -after
        if after < 0:
            packed[:, byte + 1] |= units[:, i] << (8 + after)
    return packed.view(-1)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits as 32-bit words, (rows, n) -> (rows, ceil(n * bits / 32)) int32; the last word is filled with zeros."""
    n_rows, n = codes.shape
    blocks = torch.nn.functional.pad(codes.to(torch.uint8), (0, -n % 32)).view(n_rows, -1, 32)
    words = torch.zeros(n_rows, blocks.shape[1], bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, start = divmod(bits * i, 32)
        code = blocks[..., i].long() << start
        words[..., word] |= code & 0xFFFFFFFF
        if start + bits > 32:
            words[..., word + 1] |= code >> 32
    signed = words - ((words >> 31) << 32)
    return signed.to(torch.int32).flatten(1)[:, : -(-n * bits // 32)].contiguous()


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes of each row of 32-bit words, (rows, words) int32 -> (rows, n) uint8."""
    whole = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).reshape(len(words), -1, bits)
    out = torch.empty(*whole.shape[:2], 32, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, start = divmod(bits * i, 32)
        code = whole[..., word] >> start
        kept = 32 - start
        if kept < bits:
            code = (code & (2**kept - 1)) | (whole[..., word + 1] << kept)
        out[..., i] = code & (2**bits - 1)
    return out.flatten(1)[:, :n]


_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Bits of a code -> those in each plane, the low ones first."""


def unpack_planes(words: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes of each row of 32-bit words in planes, (rows, words) int32 -> (rows, n) uint8."""
    whole = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).reshape(len(words), -1, bits)
    codes, place, first = torch.zeros(*whole.shape[:2], 32, dtype=torch.uint8, device=words.device), 0, 0
    for width in _PLANES.get(bits, (bits,)):
        part = unpack_words(whole[..., place : place + width].reshape(-1, width), width, 32).view(codes.shape)
        codes |= part << first
        place, first = place + width, first + width
    return codes.flatten(1)[:, :n]
