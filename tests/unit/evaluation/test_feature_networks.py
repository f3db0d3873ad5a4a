"""Feature networks: frozen, in eval mode, deterministic in their seed, named after how they came by their weights."""

import numpy as np
import pytest
import torch

from latentray.data import synthetic
from latentray.errors import ArtifactError, ConfigError, InputMissing
from latentray.evaluation import feature_networks, metrics


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shapes():
    kinds = [synthetic.kind_of("train", i) for i in range(204)]
    pictures = np.stack([synthetic.draw(kind, 0, i) for i, kind in enumerate(kinds)])
    return pictures, [synthetic.caption(kind) for kind in kinds]


@pytest.fixture(scope="module")
def trained(shapes):
    return feature_networks.classifier(*shapes, steps=30)


def test_training_learns_the_classes(shapes):
    pictures, captions = shapes
    backgrounds = [c.split()[-2] for c in captions]
    labels = feature_networks.caption_labels(backgrounds)
    net = feature_networks.train_classifier(pictures, labels, seed=0, steps=40)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    assert (net(x).argmax(1).numpy() == labels).mean() > 0.95


def test_a_seed_gives_the_same_weights_whatever_was_drawn_before(shapes, trained):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = feature_networks.classifier(*shapes, steps=30)
    assert again.digest == trained.digest and again.name == trained.name
    assert torch.equal(torch.random.get_rng_state(), before)  # nor does it disturb the caller's draws
    assert feature_networks.classifier(*shapes, steps=30, seed=1).digest != trained.digest


def test_features_do_not_depend_on_the_batch_and_carry_no_gradient(trained, shapes):
    pictures = shapes[0][:10]
    whole, parts = trained.features_of(pictures), trained.features_of(list(pictures), batch_size=3)
    assert whole.shape == (10, 64) and not whole.requires_grad
    assert torch.allclose(whole, parts, atol=1e-5)


def test_it_stays_in_eval_mode(trained, shapes):
    trained.module.train()
    trained.features_of(shapes[0][:2])
    assert not trained.module.training
    assert not any(p.requires_grad for p in trained.module.parameters())


def test_its_features_tell_worse_pictures(trained, shapes):
    pictures = shapes[0]
    features = trained.features_of(pictures[:102])  # each of the 51 kinds twice, as in the other half
    near = metrics.frechet_distance(features, trained.features_of(pictures[102:]))
    scrambled = (
        np.random.default_rng(0).permuted(pictures[102:].reshape(102, -1, 3), axis=1).reshape(pictures[102:].shape)
    )
    collapsed = np.repeat(pictures[102:104], 51, axis=0)
    for worse in (scrambled, collapsed):
        assert metrics.frechet_distance(features, trained.features_of(worse)) > 3 * near


def test_other_sizes_are_resized_with_antialiasing(trained):
    """A one-pixel checkerboard shrinks to gray; without antialiasing it would alias to black or white."""
    board = torch.from_numpy(np.indices((256, 256)).sum(0) % 2).float().expand(1, 3, 256, 256)
    small = feature_networks.resized(board, 64)
    assert (small - 0.5).abs().max() < 0.02
    assert trained.features(board).shape == (1, 64)


def test_too_many_captions_fall_back_to_a_network_that_says_it_is_random():
    pictures = np.zeros((300, 8, 8, 3), dtype=np.uint8)
    network = feature_networks.classifier(pictures, [f"caption {i}" for i in range(300)], seed=3)
    assert network.name == "random-convolutions (seed=3)"
    assert network.digest == feature_networks.random_network(seed=3).digest
    assert network.digest != feature_networks.random_network(seed=4).digest


def test_labels_are_classes_in_sorted_order():
    assert feature_networks.caption_labels(["b", "a", "b"]).tolist() == [1, 0, 1]
    assert feature_networks.caption_labels(["a", "a"]) is None
    assert feature_networks.caption_labels([str(i) for i in range(257)]) is None
    assert feature_networks.caption_labels([str(i) for i in range(256)]) is not None


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ConfigError, match="0 pictures"):
        feature_networks.train_classifier(np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, np.int64), seed=0, steps=1)


def test_inception_without_its_file_is_refused_and_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("download"))
    with pytest.raises(InputMissing, match="Inception"):
        feature_networks.inception(tmp_path / "weights.pth")


def test_inception_refuses_other_weights_and_code(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="no weights"):
        feature_networks.inception(path)
    ran = tmp_path / "ran"
    torch.save(_Touch(ran), path)
    with pytest.raises(ArtifactError, match="no weights") as caught:
        feature_networks.inception(path)
    assert not ran.exists()
    assert "\x1b" not in str(caught.value) and "can still be loaded" not in str(caught.value)


class _Touch:
    """What an attacker would pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_inception_from_a_local_file(tmp_path):
    from latentray.models import torchvision_ops

    torchvision_ops.ensure_importable()
    from torch_fidelity import feature_extractor_inceptionv3 as inceptionv3

    class Blank(inceptionv3.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            return None

    path = tmp_path / "weights.pth"
    torch.save({}, path)
    blank = Blank("blank", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(blank.state_dict(), path)
    network = feature_networks.inception(path)
    features = network.features(torch.rand(2, 3, 64, 64))
    assert features.shape == (2, 2048) and features.dtype == torch.float32 and torch.isfinite(features).all()
    assert network.input_size == 299 and "other weights" in network.name and len(network.digest) == 64
