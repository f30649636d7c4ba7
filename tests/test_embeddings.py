"""The Inception network against PyTorch, and reading its weights without PyTorch."""

import collections
import io
import pickle
import re
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers.runs import refusal
from posterior_matching.evaluation import embeddings, inception
from posterior_matching.evaluation.torch_weights import read_torch_weights


class TorchInception:
    """The network written down layer by layer in PyTorch, with random weights under torchvision's names."""

    def __init__(self, torch):
        self.torch, self.f = torch, torch.nn.functional
        self.weights = {}
        self.generator = torch.Generator().manual_seed(0)

    def parameter(self, name, shape, low, high):
        if name not in self.weights:
            self.weights[name] = low + (high - low) * self.torch.rand(*shape, generator=self.generator)
        return self.weights[name]

    def conv(self, x, name, features, size, stride=1, padding=(0, 0)):
        bound = (6 / (x.shape[1] * size[0] * size[1])) ** 0.5
        kernel = self.parameter(f"{name}.conv.weight", (features, x.shape[1], *size), -bound, bound)
        x = self.f.conv2d(x, kernel, stride=stride, padding=padding)
        ranges = {"running_mean": (-0.1, 0.1), "running_var": (0.5, 1.5), "weight": (0.5, 1.5), "bias": (-0.1, 0.1)}
        statistics = [self.parameter(f"{name}.bn.{k}", (features,), *bounds) for k, bounds in ranges.items()]
        return self.f.relu(self.f.batch_norm(x, *statistics, eps=1e-3))

    def mean(self, x):
        return self.f.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def a(self, x, n, pool):
        small = self.conv(x, f"{n}.branch1x1", 64, (1, 1))
        five = self.conv(x, f"{n}.branch5x5_1", 48, (1, 1))
        five = self.conv(five, f"{n}.branch5x5_2", 64, (5, 5), padding=2)
        three = self.conv(x, f"{n}.branch3x3dbl_1", 64, (1, 1))
        three = self.conv(three, f"{n}.branch3x3dbl_2", 96, (3, 3), padding=1)
        three = self.conv(three, f"{n}.branch3x3dbl_3", 96, (3, 3), padding=1)
        pooled = self.conv(self.mean(x), f"{n}.branch_pool", pool, (1, 1))
        return self.torch.cat([small, five, three, pooled], 1)

    def b(self, x, n):
        three = self.conv(x, f"{n}.branch3x3", 384, (3, 3), stride=2)
        double = self.conv(x, f"{n}.branch3x3dbl_1", 64, (1, 1))
        double = self.conv(double, f"{n}.branch3x3dbl_2", 96, (3, 3), padding=1)
        double = self.conv(double, f"{n}.branch3x3dbl_3", 96, (3, 3), stride=2)
        return self.torch.cat([three, double, self.f.max_pool2d(x, 3, stride=2)], 1)

    def c(self, x, n, c7):
        wide, high = {"size": (1, 7), "padding": (0, 3)}, {"size": (7, 1), "padding": (3, 0)}
        small = self.conv(x, f"{n}.branch1x1", 192, (1, 1))
        seven = self.conv(x, f"{n}.branch7x7_1", c7, (1, 1))
        seven = self.conv(seven, f"{n}.branch7x7_2", c7, **wide)
        seven = self.conv(seven, f"{n}.branch7x7_3", 192, **high)
        double = self.conv(x, f"{n}.branch7x7dbl_1", c7, (1, 1))
        for i, (features, shape) in enumerate([(c7, high), (c7, wide), (c7, high), (192, wide)]):
            double = self.conv(double, f"{n}.branch7x7dbl_{i + 2}", features, **shape)
        pooled = self.conv(self.mean(x), f"{n}.branch_pool", 192, (1, 1))
        return self.torch.cat([small, seven, double, pooled], 1)

    def d(self, x, n):
        three = self.conv(x, f"{n}.branch3x3_1", 192, (1, 1))
        three = self.conv(three, f"{n}.branch3x3_2", 320, (3, 3), stride=2)
        seven = self.conv(x, f"{n}.branch7x7x3_1", 192, (1, 1))
        seven = self.conv(seven, f"{n}.branch7x7x3_2", 192, (1, 7), padding=(0, 3))
        seven = self.conv(seven, f"{n}.branch7x7x3_3", 192, (7, 1), padding=(3, 0))
        seven = self.conv(seven, f"{n}.branch7x7x3_4", 192, (3, 3), stride=2)
        return self.torch.cat([three, seven, self.f.max_pool2d(x, 3, stride=2)], 1)

    def e(self, x, n, pool):
        small = self.conv(x, f"{n}.branch1x1", 320, (1, 1))
        outputs = [small]
        three = self.conv(x, f"{n}.branch3x3_1", 384, (1, 1))
        double = self.conv(x, f"{n}.branch3x3dbl_1", 448, (1, 1))
        double = self.conv(double, f"{n}.branch3x3dbl_2", 384, (3, 3), padding=1)
        for y, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3")):
            outputs.append(self.conv(y, f"{n}.{name}a", 384, (1, 3), padding=(0, 1)))
            outputs.append(self.conv(y, f"{n}.{name}b", 384, (3, 1), padding=(1, 0)))
        pooled = self.mean(x) if pool == "mean" else self.f.max_pool2d(x, 3, stride=1, padding=1)
        return self.torch.cat([*outputs, self.conv(pooled, f"{n}.branch_pool", 192, (1, 1))], 1)

    def __call__(self, x):
        x = self.f.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        x = self.conv(2 * x - 1, "Conv2d_1a_3x3", 32, (3, 3), stride=2)
        x = self.conv(x, "Conv2d_2a_3x3", 32, (3, 3))
        x = self.conv(x, "Conv2d_2b_3x3", 64, (3, 3), padding=1)
        x = self.conv(self.f.max_pool2d(x, 3, stride=2), "Conv2d_3b_1x1", 80, (1, 1))
        x = self.f.max_pool2d(self.conv(x, "Conv2d_4a_3x3", 192, (3, 3)), 3, stride=2)
        for name, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = self.a(x, name, pool)
        x = self.b(x, "Mixed_6a")
        for name, c7 in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = self.c(x, name, c7)
        x = self.e(self.e(self.d(x, "Mixed_7a"), "Mixed_7b", "mean"), "Mixed_7c", "max")
        return x.mean((2, 3))


def test_inception_equals_pytorch():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).uniform(size=(2, 28, 28, 1)).astype(np.float32)
    reference = TorchInception(torch)
    expected = reference(torch.tensor(np.broadcast_to(x, (2, 28, 28, 3)).transpose(0, 3, 1, 2).copy())).numpy()
    network = inception.Inception().load({name: value.numpy() for name, value in reference.weights.items()})
    found = np.asarray(nnx.jit(lambda network, x: network(x))(network, x))
    assert found.shape == (2, 2048) and expected.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("new_format", [True, False])
def test_what_pytorch_has_saved_is_read_without_it(new_format):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24.0).reshape(2, 3, 4)
    weights = {"whole": whole, "part": whole[1, :, 1:3], "turned": whole.permute(2, 0, 1), "count": torch.tensor(7)}
    saved = io.BytesIO()
    torch.save(collections.OrderedDict(weights), saved, _use_new_zipfile_serialization=new_format)
    found = read_torch_weights(saved.getvalue())
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value.numpy())


def refused_weights(files):
    saved = io.BytesIO()
    with zipfile.ZipFile(saved, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return refusal(read_torch_weights, saved.getvalue())


def test_weights_that_want_to_run_code_are_refused():
    message = refused_weights({"archive/data.pkl": pickle.dumps(collections.OrderedDict(a=print))})
    assert "only tensors, but this one holds builtins.print" in message


def test_weights_that_reach_beyond_what_is_stored_are_refused():
    torch = pytest.importorskip("torch")
    saved = io.BytesIO()
    torch.save(collections.OrderedDict(a=torch.arange(6.0)), saved)
    whole = zipfile.ZipFile(saved)
    files = {name: whole.read(name)[: -4 if "/data/" in name else None] for name in whole.namelist()}
    assert "beyond the stored values" in refused_weights(files)


def test_inception_has_the_published_number_of_parameters():
    network = nnx.to_flat_state(nnx.state(nnx.eval_shape(inception.Inception)))
    sizes = [leaf.get_value().size for path, leaf in network if path[-1] in ("kernel", "scale", "bias")]
    assert sum(sizes) == 21_785_568  # torchvision's inception_v3 without its auxiliary and last layers
    assert embeddings.PixelEmbedding()(jnp.ones((2, 3, 4, 1))).shape == (2, 12)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTERIOR_MATCHING_CACHE", str(tmp_path))
    return tmp_path


PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"


def test_without_network_or_with_damaged_weights_one_line_says_what_to_do(empty_cache, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(embeddings.urllib.request, "urlopen", refuse)
    message = refusal(embeddings.load_inception)
    assert re.search(rf"no route to host.*put https://.*{PUBLISHED} into .*=pixels or none", message)
    assert not list(empty_cache.iterdir())
    (empty_cache / PUBLISHED).write_bytes(b"cut short")
    assert re.search(r"damaged .*: delete", refusal(embeddings.load_inception))


def test_weights_are_converted_once_and_again_when_damaged(empty_cache, monkeypatch):
    weights, calls = {"kernel": np.arange(1000.0)}, []
    monkeypatch.setattr(embeddings, "read_torch_weights", lambda content: calls.append(content) or weights)
    monkeypatch.setattr(embeddings, "_SHA256", embeddings.hashlib.sha256(b"published").hexdigest())
    monkeypatch.setattr(embeddings.Inception, "load", lambda _, loaded: loaded)
    (empty_cache / PUBLISHED).write_bytes(b"published")
    embeddings.load_inception()
    (converted,) = empty_cache.glob("*.npz")
    content = converted.read_bytes()
    for damage, reads in ((content, 1), (content[:-100], 2), (b"", 3)):
        converted.write_bytes(damage)
        np.testing.assert_array_equal(embeddings.load_inception()["kernel"], weights["kernel"])
        assert len(calls) == reads
