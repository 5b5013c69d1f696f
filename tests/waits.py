"""What the host waits for: every use of a value of a tensor that on a GPU would be on the device, seen on a CPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lownibble.models.info import body

READS = {
    torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal, torch.ops.aten.nonzero,
    torch.ops.aten.masked_select, torch.ops.aten._unique2, torch.ops.aten.allclose, torch.ops.aten.item,
}  # fmt: skip
"""Operations whose result or its size the host needs."""

CALLS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu", "__repr__"}


class Waits(TorchDispatchMode):
    """Collects operations that read values of device tensors: all but those that are made of host tensors only, or of nothing; in
    `model`'s own code those that are made of nothing are the device's, too, but for our seeds."""

    def __init__(self, model):
        super().__init__()
        self.found, self._on_host, self._model, self._inside = [], {}, model, False

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def on_device(self, value):
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self._on_host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = any(map(self.on_device, inputs)) or (self._inside and not inputs and "rand" not in str(func))
        device = device and func is not torch.ops.aten.lift_fresh.default
        packet = func.overloadpacket
        masked = packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        masked = masked and any(i is not None and i.dtype == torch.bool and self.on_device(i) for i in args[1])
        if device and (packet in READS or masked):
            self.found.append(str(packet))
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                if device:
                    self._on_host.pop(storage._cdata, None)
                else:
                    self._on_host[storage._cdata] = storage  # held, so that its address is not used again
        return out

    def __enter__(self):
        self._hooks = [
            body(self._model).register_forward_pre_hook(lambda *_: setattr(self, "_inside", True)),
            body(self._model).register_forward_hook(lambda *_: setattr(self, "_inside", False)),
        ]
        self._methods = pytest.MonkeyPatch()
        for name in CALLS:
            self._methods.setattr(torch.Tensor, name, self._reported(name, getattr(torch.Tensor, name)))
        self._methods.setattr(torch, "frombuffer", self._of_host(torch.frombuffer))  # it is not dispatched
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._methods.undo()
        for hook in self._hooks:
            hook.remove()

    def _of_host(self, function):
        def call(*args, **kwargs):
            made = function(*args, **kwargs)
            storage = made.untyped_storage()
            self._on_host[storage._cdata] = storage
            return made

        return call

    def _reported(self, name, method):
        def call(tensor, *args, **kwargs):
            if self.on_device(tensor):
                self.found.append(name)
            return method(tensor, *args, **kwargs)

        return call
