"""The codebook of a VQ autoencoder in training: its averages, its restarts, and the same numbers in every world."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from latentray import build
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.cluster import ClusterConfig
from latentray.config.train import CodebookConfig, StageConfig, Train
from latentray.errors import ArtifactError, ConfigError
from latentray.models.quantizer import Quantizer, perplexity
from latentray.records import SampleId
from latentray.training import partitions
from latentray.training.codebook import Codebook
from latentray.training.partitions import Pieces

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("codebook_worlds.py")
WORLDS = ("1", "2")
KINDS = ("0-fp32", "1-bf16", "2-fp32", "3-fp32", "3-bf16")
CODES, WIDTH, BATCH = 6, 2, 4


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def codebook(codes: int = CODES, **settings) -> Codebook:
    config = Train(
        stage=StageConfig(name="autoencoder", codebook=CodebookConfig(**settings)),
        autoencoder=AutoencoderConfig(kind="vq", codebook_size=codes, latent_channels=WIDTH, channels=[32]),
        global_batch_size=BATCH,
        total_samples=400,
        ema_half_life_samples=8,
        cluster=ClusterConfig(kind="none"),
    )
    return Codebook(build.seeded(lambda: Quantizer(codes, WIDTH), 0), config)


def ids(step: int) -> list[SampleId]:
    return [SampleId(epoch=0, dataset=0, index=BATCH * step + i) for i in range(BATCH)]


def pixels(step: int, side: int = 4) -> Tensor:
    return torch.randn(BATCH, WIDTH, side, side, generator=torch.Generator().manual_seed(step))


def observe(book: Codebook, z: Tensor, step: int, weight: Tensor | None = None) -> Tensor:
    codes = book.quantizer.nearest(z)
    book.observe(z, codes, ids(step), torch.ones(len(z)) if weight is None else weight)
    return codes


def vectors_of(z: Tensor) -> set[tuple[float, ...]]:
    return {tuple(v) for v in z.movedim(1, -1).reshape(-1, WIDTH).tolist()}


def test_the_first_step_sets_every_vector_to_an_output_of_the_encoder(group):
    book, z = codebook(), pixels(0)
    observe(book, z, 0)
    book.update()
    found = vectors_of(book.quantizer.codebook_KD.T[None, :, :, None])
    assert len(found) == CODES and found <= vectors_of(z)
    assert torch.equal(book.average_KD, book.quantizer.codebook_KD)
    assert float(book.usage) == 1.0


def test_later_steps_are_the_papers_moving_averages(group):
    """van den Oord et al. 2017, equations 6 to 8, by another way: lists of what fell to each vector."""
    book = codebook(decay=0.9, restart_below=1e-9)
    observe(book, pixels(0), 0)
    book.update()
    counts, sums = book.counts_K.clone(), book.sums_KD.clone()
    for step in range(1, 12):
        z = pixels(step)
        codes = observe(book, z, step)
        book.update()
        decay = min(0.9, (2 + step) / (11 + step))
        for k in range(CODES):
            own = z.movedim(1, -1)[codes[:, 0] == k].double()
            counts[k] = decay * counts[k] + (1 - decay) * len(own)
            sums[k] = decay * sums[k] + (1 - decay) * own.sum(0)
        torch.testing.assert_close(book.counts_K, counts)
        torch.testing.assert_close(book.quantizer.codebook_KD, (sums / counts[:, None]).float())


def test_vectors_settle_at_the_means_of_clusters(group):
    """As k-means would have it: four clusters of pixels, six vectors; none is left without pixels."""
    book = codebook(decay=0.8)
    centres = torch.tensor([[3.0, 3.0], [-3.0, 3.0], [3.0, -3.0], [-3.0, -3.0]])
    for step in range(60):
        z = (centres.T[None, :, :, None] + 0.05 * pixels(step)[:, :, :4]).contiguous()
        observe(book, z, step)
        book.update()
    distances = torch.cdist(centres, book.quantizer.codebook_KD)
    assert float(distances.amin(1).max()) < 0.1
    assert float(distances.amin(0).max()) < 0.5
    assert 3.5 < float(book.perplexity) <= CODES


def test_a_vector_that_nothing_falls_to_starts_anew(group):
    book = codebook(decay=0.5, restart_below=0.1)
    observe(book, pixels(0), 0)
    book.update()
    book.quantizer.codebook_KD[2] = 100.0  # nothing is near
    book.counts_K[2] = 0.0
    assert book.unused_K.tolist() == [k == 2 for k in range(CODES)]
    assert float(book.usage) == pytest.approx(1 - 1 / CODES)
    z = pixels(1)
    observe(book, z, 1)
    book.update()
    assert tuple(book.quantizer.codebook_KD[2].tolist()) in vectors_of(z)
    assert torch.equal(book.average_KD[2], book.quantizer.codebook_KD[2])
    observe(book, z, 1)
    book.update()
    assert not book.unused_K[2]  # its own pixel fell to it


def test_more_vectors_than_pixels_start_one_step_after_another(group):
    book = codebook(codes=40)
    for step in range(3):  # 16 pixels each
        observe(book, pixels(step, side=2), step)
        book.update()
    assert vectors_of(book.quantizer.codebook_KD.T[None, :, :, None]) & vectors_of(pixels(2, side=2))


def test_damaged_samples_count_nowhere(group):
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
    found = []
    for other in (0.0, 50.0):
        book = codebook()
        for step in range(3):
            z = pixels(step)
            z[weight == 0] = other
            observe(book, z, step, weight)
            book.update()
        found.append(book)
    assert torch.equal(found[0].quantizer.codebook_KD, found[1].quantizer.codebook_KD)
    assert torch.equal(found[0].counts_K, found[1].counts_K)


def test_how_a_batch_is_cut_changes_nothing(group):
    whole, cut = codebook(restart_below=0.5), codebook(restart_below=0.5)
    for step in range(4):
        z = pixels(step)
        observe(whole, z, step)
        whole.update()
        codes = cut.quantizer.nearest(z)
        for i in range(BATCH):
            cut.observe(z[i : i + 1], codes[i : i + 1], ids(step)[i : i + 1], torch.ones(1))
        cut.update()
        torch.testing.assert_close(cut.quantizer.codebook_KD, whole.quantizer.codebook_KD, rtol=1e-6, atol=1e-7)
        assert torch.equal(cut.unused_K, whole.unused_K)


def test_perplexity_in_closed_form():
    assert float(perplexity(torch.ones(7))) == pytest.approx(7.0)
    assert float(perplexity(torch.tensor([5.0, 0.0, 0.0]))) == pytest.approx(1.0)
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert float(perplexity(40 * shares)) == pytest.approx(2**1.5)
    assert float(perplexity(torch.zeros(3))) == pytest.approx(1.0)


@pytest.mark.parametrize("key", ["decay", "restart_below", "commitment"])
def test_settings_out_of_range_are_refused(key):
    with pytest.raises(ConfigError) as caught:
        CodebookConfig(**{key: -0.5})
    assert caught.value.where == f"stage.codebook.{key}"


def test_a_checkpoint_without_a_codebook_is_refused(tmp_path, group):
    partitions.write(tmp_path / "rank_0.safetensors", partitions.take([], {}, {}))
    with pytest.raises(ArtifactError, match=r"no codebook of \(6, 2\) \(vectors\)"):
        codebook().restore(Pieces([tmp_path / "rank_0.safetensors"]))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codebooks")
    environ = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)], env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@dataclasses.dataclass
class Held:
    """What a world wrote: the codebook as each rank saw it, and whole weights."""

    books: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    saved: dict[str, Tensor]

    @classmethod
    def at(cls, folder: Path) -> Held:
        pieces = Pieces(sorted(folder.glob("*.safetensors")))
        books = [safetensors.torch.load_file(path) for path in sorted(folder.glob("seen_by_*"))]
        saved = {name: pieces.whole("codebook", name) for name in books[0]}
        states = {f"{state}/{name}": t for state in pieces.states for name, t in pieces.full(state).items()}
        return cls(books=books, weights=states, saved=saved)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_holds_the_codebook_that_is_saved(worlds, kind):
    for world in WORLDS:
        held = Held.at(worlds / f"{kind}-{world}")
        assert len(held.books) == int(world)
        assert all(equal(book, held.saved) for book in held.books)
        assert held.saved["vectors"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_at_the_same_bits(worlds, kind, world):
    end, resumed = Held.at(worlds / f"{kind}-{world}-end"), Held.at(worlds / f"{kind}-{world}-resumed")
    assert equal(end.saved, resumed.saved) and equal(end.weights, resumed.weights)
    assert not torch.equal(end.saved["vectors"], Held.at(worlds / f"{kind}-{world}").saved["vectors"])


@pytest.mark.slow
def test_the_number_of_workers_and_the_stage_change_rounding_alone(worlds):
    one = Held.at(worlds / "0-fp32-1-end").saved
    for kind in ("0-fp32", "2-fp32", "3-fp32"):
        for world in WORLDS:
            other = Held.at(worlds / f"{kind}-{world}-end").saved
            for name in one:
                torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-4)
    micro = [Held.at(worlds / f"accumulated-{world}").saved["vectors"] for world in WORLDS]
    torch.testing.assert_close(micro[0], micro[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(micro[0], Held.at(worlds / "2-fp32-1").saved["vectors"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_what_another_world_and_stage_saved_is_taken_over_to_the_bit(worlds, world):
    moved, origin = Held.at(worlds / f"moved-{world}"), Held.at(worlds / f"3-fp32-{3 - int(world)}")
    assert equal(moved.saved, origin.saved) and equal(moved.weights, origin.weights)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_a_step_that_is_not_taken_leaves_the_codebook_alone(worlds, world):
    dropped, without = Held.at(worlds / f"dropped-{world}"), Held.at(worlds / f"accumulated-{world}")
    assert equal(dropped.saved, without.saved) and equal(dropped.weights, without.weights)
