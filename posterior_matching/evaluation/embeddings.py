"""Embeddings of images, between which precision and recall of distributions are computed.

The Inception network is that of the Fréchet Inception Distance (Heusel et al. 2017, arXiv 1706.08500): Inception v3
(Szegedy et al. 2016, arXiv 1512.00567) with the weights of 2015-12-05, whose pooling differs in places from that of
other versions. Its weights are those that the pytorch-fid project publishes.
"""

import collections
import hashlib
import io
import os
import pickle
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from posterior_matching.data import cache
from posterior_matching.errors import UserError

_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class PixelEmbedding(nnx.Module):
    """The pixels themselves: for checks and small images."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `[B, H, W, C]` to `[B, H W C]`."""
        return x.reshape(len(x), -1)


class ConvNorm(nnx.Module):
    """A convolution without bias, batch normalisation by stored statistics, ReLU; `padding` in rows and columns."""

    def __init__(self, features_in: int, features: int, size: tuple[int, int], stride: int, padding: tuple[int, int]):
        self.kernel = nnx.Param(jnp.zeros((*size, features_in, features)))
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.mean, self.var = nnx.Param(jnp.zeros(features)), nnx.Param(jnp.ones(features))
        self.stride, self.padding = stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H', W', features]`."""
        pads, layout = [(p, p) for p in self.padding], ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, self.kernel[...], (self.stride,) * 2, pads, dimension_numbers=layout)
        x = (x - self.mean[...]) * (self.scale[...] * lax.rsqrt(self.var[...] + 1e-3)) + self.bias[...]
        return jax.nn.relu(x)


class Block(nnx.Module):
    """Branches side by side, their outputs concatenated.

    A branch is a list of steps: `(name, features, (rows, columns))` is a convolution that keeps the size, a fourth
    entry its stride, without padding; "mean" and "max" pool 3x3 at stride one, "max/2" at stride two; a list of steps
    in place of one applies them side by side.
    """

    def __init__(self, features_in: int, *branches: list[Any]):
        self.convs, self.features, self.branches = nnx.Dict(), 0, branches

        def build(step: Any, features: int) -> int:
            if isinstance(step, str):
                return features
            if isinstance(step, list):
                return sum(build(part, features) for part in step)
            name, features_out, size, *stride = step
            padding = (0, 0) if stride else tuple(n // 2 for n in size)
            self.convs[name] = ConvNorm(features, features_out, size, *(stride or [1]), padding)
            return features_out

        for branch in branches:
            features = features_in
            for step in branch:
                features = build(step, features)
            self.features += features

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H', W', features]`."""

        def apply(step: Any, x: jax.Array) -> jax.Array:
            if isinstance(step, list):
                return jnp.concatenate([apply(part, x) for part in step], axis=-1)
            return _POOLS[step](x) if isinstance(step, str) else self.convs[step[0]](x)

        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = apply(step, y)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1)


def _pool(x: jax.Array, initial: float, reduce: Any, stride: int, padding: str) -> jax.Array:
    return lax.reduce_window(x, initial, reduce, (1, 3, 3, 1), (1, stride, stride, 1), padding)


_POOLS = {
    # The mean over those of the 3x3 positions that exist: padding does not count.
    "mean": lambda x: _pool(x, 0.0, lax.add, 1, "SAME") / _pool(jnp.ones_like(x), 0.0, lax.add, 1, "SAME"),
    "max": lambda x: _pool(x, -jnp.inf, lax.max, 1, "SAME"),
    "max/2": lambda x: _pool(x, -jnp.inf, lax.max, 2, "VALID"),
}


def _block_a(pool_features: int) -> list[list[Any]]:
    return [
        [("branch1x1", 64, (1, 1))],
        [("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))],
        [("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))],
        ["mean", ("branch_pool", pool_features, (1, 1))],
    ]


def _block_b() -> list[list[Any]]:
    return [
        [("branch3x3", 384, (3, 3), 2)],
        [("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3), 2)],
        ["max/2"],
    ]


def _block_c(n: int) -> list[list[Any]]:
    return [
        [("branch1x1", 192, (1, 1))],
        [("branch7x7_1", n, (1, 1)), ("branch7x7_2", n, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [
            ("branch7x7dbl_1", n, (1, 1)),
            ("branch7x7dbl_2", n, (7, 1)),
            ("branch7x7dbl_3", n, (1, 7)),
            ("branch7x7dbl_4", n, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ],
        ["mean", ("branch_pool", 192, (1, 1))],
    ]


def _block_d() -> list[list[Any]]:
    return [
        [("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3), 2)],
        [
            ("branch7x7x3_1", 192, (1, 1)),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, (3, 3), 2),
        ],
        ["max/2"],
    ]


def _block_e(pool: str) -> list[list[Any]]:
    return [
        [("branch1x1", 320, (1, 1))],
        [("branch3x3_1", 384, (1, 1)), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
        [
            ("branch3x3dbl_1", 448, (1, 1)),
            ("branch3x3dbl_2", 384, (3, 3)),
            [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
        ],
        [pool, ("branch_pool", 192, (1, 1))],
    ]


_STEM = [
    ("Conv2d_1a_3x3", 32, (3, 3), 2),
    ("Conv2d_2a_3x3", 32, (3, 3), 1),
    ("Conv2d_2b_3x3", 64, (3, 3)),
    "max/2",
    ("Conv2d_3b_1x1", 80, (1, 1)),
    ("Conv2d_4a_3x3", 192, (3, 3), 1),
    "max/2",
]
_BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("max"),
}


class Inception(nnx.Module):
    """The network up to its last pooling, `pool3`; layers are named as in torchvision, for the sake of the weights."""

    def __init__(self):
        self.stem = Block(3, _STEM)
        self.blocks, features = nnx.Dict(), self.stem.features
        for name, branches in _BLOCKS.items():
            self.blocks[name] = Block(features, *branches)
            features = self.blocks[name].features

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `[B, H, W, C]` in [0, 1], C = 1 or 3, to `[B, 2048]`."""
        x = jnp.broadcast_to(x, (*x.shape[:-1], 3))
        x = jax.image.resize(x, (len(x), 299, 299, 3), "bilinear", antialias=False)
        x = self.stem(2 * x - 1)
        for block in self.blocks.values():
            x = block(x)
        return x.mean((1, 2))  # over positions

    def load(self, weights: dict[str, np.ndarray]) -> "Inception":
        """Takes over weights named and laid out as torchvision does, and returns itself."""
        layers = dict(self.stem.convs.items())
        layers |= {f"{b}.{name}": c for b, block in self.blocks.items() for name, c in block.convs.items()}
        for name, layer in layers.items():
            layer.kernel[...] = jnp.asarray(weights[f"{name}.conv.weight"].transpose(2, 3, 1, 0))  # OIHW -> HWIO
            for ours, theirs in (
                ("scale", "weight"),
                ("bias", "bias"),
                ("mean", "running_mean"),
                ("var", "running_var"),
            ):
                getattr(layer, ours)[...] = jnp.asarray(weights[f"{name}.bn.{theirs}"])
        return self


def load_inception() -> Inception:
    """Returns the network with its published weights, which are downloaded and converted once.

    Raises:
        UserError: The weights can neither be found nor downloaded, or are not the published ones.
    """
    converted = cache.folder() / "inception-2015-12-05.npz"
    if not converted.exists():
        _convert(converted)
    with np.load(converted, allow_pickle=False) as archive:
        return Inception().load(dict(archive))


def _convert(converted: Path) -> None:
    original = cache.folder() / Path(_URL).name
    if original.exists():
        content = original.read_bytes()
    else:
        print(f"downloading the Inception weights (96 MB) from {_URL}")
        try:
            with urllib.request.urlopen(_URL, timeout=60) as response:
                content = response.read()
        except OSError as error:
            raise UserError(
                f"cannot download the Inception weights ({error}): put {_URL} into {original.parent}, "
                "or choose --embedding=pixels"
            ) from error
    if (found := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise UserError(f"the Inception weights are damaged (SHA-256 {found}, not {_SHA256}): delete {original}")
    converted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=converted.parent) as temporary:
        unfinished = Path(temporary) / converted.name
        np.savez(unfinished, **read_torch_weights(content))
        os.replace(unfinished, converted)


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
    """Reads the description of a state dict; executes nothing, and refuses all but tensors in an ordered dict."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UserError(f"a file of weights must hold tensors only, it holds {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, identifier: tuple) -> tuple[str, type]:
        _, dtype, key, *_ = identifier
        return key, dtype


def read_torch_weights(content: bytes) -> dict[str, np.ndarray]:
    """Reads a state dict that PyTorch has saved, in its older or its zip format, without PyTorch.

    Raises:
        UserError: The file holds something else than tensors, or less than they need.
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
        values = np.frombuffer(storages[key], dtype)[tensor.offset :]
        steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
        if tensor.offset < 0 or min(tensor.strides, default=0) < 0 or sum(steps) >= len(values):
            raise UserError("a file of weights is damaged: a tensor reaches beyond what is stored")
        strides = [stride * values.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(values, tensor.shape, strides).copy()

    return {name: array(tensor) for name, tensor in tensors.items()}


EMBEDDINGS = {"inception": load_inception, "pixels": PixelEmbedding}
