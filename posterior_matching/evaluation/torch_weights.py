"""Reads weights saved by PyTorch, without PyTorch and without executing code from the file."""

import collections
import io
import pickle
import zipfile
from typing import Any, NamedTuple

import numpy as np

from posterior_matching.errors import UserError


class _Tensor(NamedTuple):
    storage: tuple[str, type]  # key and NumPy type
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: _Tensor(
        storage, offset, shape, strides
    ),
    ("torch", "FloatStorage"): np.float32,
    ("torch", "LongStorage"): np.int64,
}


class _TensorReader(pickle.Unpickler):
    """Reads the description of a state dict; executes nothing, and rejects anything but tensors in an ordered dict."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UserError(f"a weights file must hold only tensors, but this one holds {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, identifier: tuple) -> tuple[str, type]:
        _, dtype, key, *_ = identifier
        return key, dtype


def read_torch_weights(content: bytes) -> dict[str, np.ndarray]:
    """Reads a state dict saved by PyTorch, in the older or the zip format.

    Raises:
        UserError: The file holds something other than tensors, or too few values for them.
    """
    file = io.BytesIO(content)
    if zipfile.is_zipfile(file):
        archive = zipfile.ZipFile(file)
        (description,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        tensors = _TensorReader(io.BytesIO(archive.read(description))).load()
        folder = description.removesuffix("data.pkl") + "data/"
        storages = {name.removeprefix(folder): archive.read(name) for name in archive.namelist() if folder in name}
    else:
        file.seek(0)
        for _ in range(3):  # magic number, version, system
            _TensorReader(file).load()
        tensors = _TensorReader(file).load()
        item_sizes = {key: np.dtype(dtype).itemsize for (key, dtype), *_ in tensors.values()}
        storages = {}
        for key in _TensorReader(file).load():
            count = int.from_bytes(file.read(8), "little")
            storages[key] = file.read(count * item_sizes[key])

    def array(tensor: _Tensor) -> np.ndarray:
        key, dtype = tensor.storage
        values: np.ndarray = np.frombuffer(storages[key], dtype)[tensor.offset :]
        steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
        if tensor.offset < 0 or min(tensor.strides, default=0) < 0 or sum(steps) >= len(values):
            raise UserError("the weights file is damaged: a tensor extends beyond the stored values")
        strides = [stride * values.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(values, tensor.shape, strides).copy()

    return {name: array(tensor) for name, tensor in tensors.items()}
