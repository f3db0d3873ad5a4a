"""LPIPS: a gradient for the reconstruction, none for itself, and a backbone whose origin is told."""

import os
from pathlib import Path

import pytest
import torch

from latentray.errors import ArtifactError, ConfigError, InputMissing
from latentray.models import perceptual


@pytest.fixture(scope="module")
def alex():
    return perceptual.load("alex", random_backbone=True)


def test_the_gradient_reaches_the_reconstruction(alex):
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    y = (x + 0.1 * torch.randn_like(x)).requires_grad_(True)
    distance = alex(y, x)
    assert distance.shape == (2,)
    assert (distance > 0).all()
    (gradient,) = torch.autograd.grad(distance.mean(), y)
    assert all(float(one.abs().max()) > 0 for one in gradient)
    assert torch.equal(alex(x, x), torch.zeros(2))


def test_it_is_frozen_and_never_trains(alex):
    assert not any(p.requires_grad for p in alex.parameters())
    assert not any(module.training for module in alex.train().modules())


def test_a_random_backbone_is_reported_and_the_same_everywhere(alex):
    assert alex.backbone.is_random
    assert (alex.backbone.net, alex.backbone.source) == ("alex", "random")
    before = torch.random.get_rng_state()
    again = perceptual.load("alex", random_backbone=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(alex.parameters(), again.parameters(), strict=True))
    other = perceptual.load("alex", random_backbone=True, seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(alex.parameters(), other.parameters(), strict=True))


def test_weights_load_from_a_local_file(alex, tmp_path):
    state = {f"features.{k.split('.', 1)[1]}": torch.full_like(v, 0.01) for k, v in alex.net.net.state_dict().items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(1)}, tmp_path / "alexnet.pth")
    loaded = perceptual.load("alex", weights=str(tmp_path / "alexnet.pth"))
    assert not loaded.backbone.is_random
    assert (loaded.backbone.source, loaded.backbone.detail) == ("file", str(tmp_path / "alexnet.pth"))
    assert all(bool((p == 0.01).all()) for p in loaded.net.net.parameters())


class Code:
    """What runs where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_file_that_holds_no_such_weights_is_refused_and_none_of_its_code_runs(tmp_path):
    path, mark = tmp_path / "alexnet.pth", tmp_path / "ran"
    for content in ({"features.0.weight": torch.zeros(1)}, {"other": torch.zeros(1)}, [1, 2], Code(mark)):
        torch.save(content, path)
        with pytest.raises(ArtifactError, match="no weights of torchvision's alex") as caught:
            perceptual.load("alex", weights=str(path))
        assert caught.value.where == str(path) and caught.value.mend
    for raw in (b"", b"no weights", path.read_bytes()[:-40]):
        path.write_bytes(raw)
        with pytest.raises(ArtifactError, match="no weights"):
            perceptual.load("alex", weights=str(path))
    assert not mark.exists()


def test_without_a_network_the_backbone_is_random_and_says_why(monkeypatch):
    import lpips

    real = lpips.LPIPS

    def offline(**kwargs):
        if not kwargs["pnet_rand"]:
            raise OSError("no route to host")
        return real(**kwargs)

    monkeypatch.setattr(lpips, "LPIPS", offline)
    found = perceptual.load("alex").backbone
    assert found.is_random
    assert "no route to host" in found.detail


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputMissing) as caught:
        perceptual.load("alex", weights=str(tmp_path / "none.pth"))
    assert caught.value.where.endswith("none.pth")
    with pytest.raises(ConfigError, match="resnet"):
        perceptual.load("resnet")
