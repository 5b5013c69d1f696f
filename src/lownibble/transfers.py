"""Copies from the host to a device that the host does not wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`; to CUDA from pinned memory, so that the copy is queued like any other work of the stream.

    A copy from pageable memory makes the host wait until the device has done all that was queued before it.
    """
    if tensor.device.type != "cpu" or str(device).partition(":")[0] != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
