"""Image embeddings in which precision and recall are computed."""

import hashlib
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import jax
from flax import nnx

from posterior_matching.data import cache
from posterior_matching.errors import UserError
from posterior_matching.evaluation.inception import Inception
from posterior_matching.evaluation.results import load_npz, save_npz
from posterior_matching.evaluation.torch_weights import read_torch_weights

# The weights of 2015-12-05, as the pytorch-fid project publishes them.
_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class PixelEmbedding(nnx.Module):
    """The pixels themselves: for checks and small images."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `[B, H, W, C]` to `[B, H W C]`."""
        return x.reshape(len(x), -1)


def load_inception() -> Inception:
    """Returns the network with its published weights, which are downloaded and converted once.

    Raises:
        UserError: The weights can neither be found nor downloaded, or are not the published ones.
    """
    converted = cache.folder() / "inception-2015-12-05.npz"
    weights = load_npz(converted)
    if weights is None:
        weights = read_torch_weights(_published_weights())
        converted.parent.mkdir(parents=True, exist_ok=True)
        save_npz(converted, weights)
    return Inception().load(weights)


def _published_weights() -> bytes:
    path = cache.folder() / Path(_URL).name
    if path.exists():
        content = path.read_bytes()
    else:
        print(f"downloading the Inception weights (96 MB) from {_URL}")
        try:
            with urllib.request.urlopen(_URL, timeout=60) as response:
                content = response.read()
        except (OSError, HTTPException) as error:
            raise UserError(
                f"cannot download the Inception weights ({error}): put {_URL} into {path.parent}, "
                "or choose embedding=pixels or none"
            ) from error
    if (digest := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise UserError(f"the Inception weights are damaged (SHA-256 {digest}, not {_SHA256}): delete {path}")
    return content


EMBEDDINGS: dict[str, Callable[[], nnx.Module]] = {"inception": load_inception, "pixels": PixelEmbedding}
