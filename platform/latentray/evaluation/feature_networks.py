"""The networks whose features FID, KID and rFID compare, each with a name and the digest of its weights.

Inception where its weights file is at hand; otherwise a small classifier trained on the captions of the data set, or,
where captions are too many to be classes, that classifier with random weights. Nothing is ever downloaded here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.checkpoint import manifest, store, weights
from latentray.data import decode, members
from latentray.data.shards import IndexedShards
from latentray.errors import ArtifactError, ConfigError, InputMissing
from latentray.models import torchvision_ops
from latentray.models.classifier import INPUT_SIZE, PictureClassifier
from latentray.randomness import Purpose, keys_from_seeds, normal, uniform

MAX_CLASSES = 256
"""Most distinct captions that are taken as classes."""

_WEIGHTS = "classifier.safetensors"
_TRAINED_ON, _TRAINED_STEPS = 3060, 200

RESIZE = "bicubic, antialiased"
INCEPTION_SIZE = 299
_INCEPTION_DIGEST = "6726825d"  # torch-fidelity's own weights file carries the start of its sha256 in its name


class FeatureNetwork:
    """A frozen network in eval mode with all that a report must state about it.

    Args:
        name: what it is, and how it came by its weights.
        digest: sha256 of its weights.
        input_size: height and width in pixels that it takes.
        resize: how pictures of other sizes are brought there.
        extract: pictures (B, 3, input_size, input_size) in [0, 1] -> features (B, D).
        module: the network behind `extract`.
    """

    def __init__(
        self,
        *,
        name: str,
        digest: str,
        input_size: int,
        resize: str,
        extract: Callable[[Tensor], Tensor],
        module: nn.Module,
    ) -> None:
        self.name, self.digest, self.input_size, self.resize = name, digest, input_size, resize
        self.module = module.eval().requires_grad_(False)
        self._extract = extract

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D) in float32, on the pictures' device, of pictures (B, 3, H, W) in [0, 1]."""
        self.module.eval()
        device = next(self.module.parameters()).device
        return self._extract(resized(x_BCHW.to(device).float(), self.input_size)).float().to(x_BCHW.device)

    def features_of(self, pictures_NHWC: np.ndarray | Sequence[np.ndarray], *, batch_size: int = 64) -> Tensor:
        """Features (N, D) of uint8 pictures, batch by batch."""
        parts = []
        for start in range(0, len(pictures_NHWC), batch_size):
            chunk = np.stack(list(pictures_NHWC[start : start + batch_size]))
            parts.append(self.features(_unit_range(chunk)))
        return torch.cat(parts)

    def to(self, device: torch.device | str) -> FeatureNetwork:
        self.module.to(device)
        return self


def resized(x_BCHW: Tensor, size: int) -> Tensor:
    """Pictures at (size, size): bicubic, antialiased; without that shrinking aliases and the figures are wrong."""
    if x_BCHW.shape[-2:] == (size, size):
        return x_BCHW
    return F.interpolate(x_BCHW, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def inception(weights_path: str | Path) -> FeatureNetwork:
    """torch-fidelity's Inception V3 (2048 features) from a local weights file.

    Raises InputMissing without the file, ArtifactError where it holds other weights, or anything besides tensors.
    """
    path = Path(weights_path)
    if not path.is_file():
        raise InputMissing(
            "Inception's weights are not there.",
            where=str(path),
            mend="Give the path of weights-inception-2015-12-05-6726825d.pth of torch-fidelity, or none at all.",
        )
    torchvision_ops.ensure_importable()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        # torch-fidelity unpickles without limits; what passes here can hold no code.
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        net = FeatureExtractorInceptionV3("latentray", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # torch.load and load_state_dict raise half a dozen unrelated types
        raise ArtifactError(
            f"The file holds no weights of torch-fidelity's Inception, or more than tensors ({type(error).__name__}).",
            where=str(path),
            mend="Use weights-inception-2015-12-05-6726825d.pth as torch-fidelity publishes it.",
        ) from None
    digest = store.sha256_of(path)
    name = "inception-v3-2048" if digest.startswith(_INCEPTION_DIGEST) else "inception-v3-2048 (other weights)"

    def extract(x_BCHW: Tensor) -> Tensor:
        return net((x_BCHW * 255).round().clamp(0, 255).to(torch.uint8))[0]

    return FeatureNetwork(
        name=name, digest=digest, input_size=INCEPTION_SIZE, resize=RESIZE, extract=extract, module=net
    )


def classifier(
    pictures_NHWC: np.ndarray, captions: Sequence[str], *, seed: int = 0, steps: int = 300
) -> FeatureNetwork:
    """The classifier trained on a data set's own captions; its random sibling where they cannot be classes.

    Args:
        pictures_NHWC: uint8, all of one size.
        captions: one per picture.
    """
    labels_N = caption_labels(captions)
    if labels_N is None:
        return random_network(seed=seed)
    net = train_classifier(pictures_NHWC, labels_N, seed=seed, steps=steps)
    return _of_classifier(net, f"caption-classifier (classes={int(labels_N.max()) + 1}, steps={steps}, seed={seed})")


def random_network(*, seed: int = 0) -> FeatureNetwork:
    """The classifier with random weights: the same everywhere, but it knows colours and edges, not objects."""
    return _of_classifier(_initialised(1, seed), f"random-convolutions (seed={seed})")


def caption_labels(captions: Sequence[str]) -> np.ndarray | None:
    """Class ids (N,), one class per distinct caption in sorted order; None for fewer than 2 or over 256 classes."""
    distinct = {caption: i for i, caption in enumerate(sorted(set(captions)))}
    if not 2 <= len(distinct) <= MAX_CLASSES:
        return None
    return np.array([distinct[c] for c in captions], dtype=np.int64)


def train_classifier(
    pictures_NHWC: np.ndarray, labels_N: np.ndarray, *, seed: int, steps: int, batch_size: int = 64
) -> PictureClassifier:
    """Train on uint8 pictures and class ids (AdamW, cosine schedule); deterministic in the seed at one thread count.

    Raises ConfigError where there is nothing to train on.
    """
    if len(pictures_NHWC) != len(labels_N) or len(labels_N) == 0 or steps < 1:
        raise ConfigError(
            f"No feature network can be trained: {len(pictures_NHWC)} pictures, {len(labels_N)} labels, {steps} steps.",
            mend="Give as many labels as pictures, and at least one of each.",
        )
    chunks = [resized(_unit_range(pictures_NHWC[i : i + 256]), INPUT_SIZE) for i in range(0, len(pictures_NHWC), 256)]
    x_NCHW, y_N = torch.cat(chunks), torch.as_tensor(labels_N)
    net = _initialised(int(y_N.max()) + 1, seed).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = _batches(len(y_N), batch_size, steps, seed)
    with torch.enable_grad():
        for step in range(steps):
            loss = F.cross_entropy(net(x_NCHW[rows[step]]), y_N[rows[step]])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def _batches(n: int, batch_size: int, steps: int, seed: int) -> Tensor:
    """Rows of each step, (steps, batch): one permutation after the other."""
    batch = min(batch_size, n)
    epochs = math.ceil(steps * batch / n)
    keys = torch.cat([keys_from_seeds([seed], Purpose.ORDER, epoch) for epoch in range(epochs)])
    return uniform(keys, (n,)).argsort(dim=1, stable=True).flatten()[: steps * batch].reshape(steps, batch)


def _initialised(classes: int, seed: int) -> PictureClassifier:
    """He initialisation from counter-based draws, so that the same seed gives the same weights on any machine."""
    with torch.random.fork_rng(devices=[]):  # the constructors draw too; these draws are overwritten
        net = PictureClassifier(classes)
    with torch.no_grad():
        for i, (name, weight) in enumerate(sorted(net.named_parameters())):
            if name.endswith(".bias"):
                weight.zero_()
            elif weight.ndim > 1:
                std = (2 / weight[0].numel()) ** 0.5
                weight.copy_(std * normal(keys_from_seeds([seed], Purpose.WEIGHTS, i), weight.shape)[0])
    return net


def _of_classifier(net: PictureClassifier, name: str) -> FeatureNetwork:
    return FeatureNetwork(
        name=name, digest=weights_digest(net), input_size=INPUT_SIZE, resize=RESIZE, extract=net.features, module=net
    )


def weights_digest(net: nn.Module) -> str:
    """sha256 over the names, shapes and float32 bytes of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _unit_range(pictures_NHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures_NHWC)).permute(0, 3, 1, 2).float() / 255


def of_dataset(uri: str, training: IndexedShards, size: int, *, inception_weights: str | None = None) -> FeatureNetwork:
    """The feature network a data set's figures are measured with: Inception where its weights are given, else the
    classifier of the data set, trained once and kept as the artifact `uri`, so that every figure shares its digest.

    Args:
        uri: where the classifier is kept, `<data>/feature_network`.
        training: the pictures and captions it learns from.
    """
    if inception_weights is not None:
        return inception(inception_weights)
    found = manifest.find(uri)
    if found is not None:
        state = weights.read(manifest.fetch_file(uri, _WEIGHTS, found))
        net = PictureClassifier(int(found.meta["classes"]))
        weights.load_into(net, state, where=uri)
        return _of_classifier(net.eval().requires_grad_(False), found.meta["name"])
    rows = [i * training.count // _TRAINED_ON for i in range(min(training.count, _TRAINED_ON))]
    rows = rows if training.count > _TRAINED_ON else list(range(training.count))
    samples = [members.decode_sample(training.read(x)) for x in rows]
    pixels = np.stack([decode.to_square(members.picture_of(s), size) for s in samples])
    network = classifier(pixels, [members.captions_of(s)[0] for s in samples], steps=_TRAINED_STEPS)
    module = network.module
    assert isinstance(module, PictureClassifier)
    with store.staging() as folder:
        weights.save(folder / _WEIGHTS, module.state_dict())
        meta = {"name": network.name, "digest": network.digest, "classes": module.classes}
        manifest.publish(folder, uri, kind="feature_network", inputs={"dataset": training.manifest.digest}, meta=meta)
    return network
