"""Releases are immutable, content-addressed and verified; aliases move and move back. Local disk and S3."""

import json
from pathlib import Path

import pytest

from latentray.checkpoint import store
from latentray.errors import ArtifactError, ConfigError, DigestMismatch, InputMissing
from latentray.registry import versions


@pytest.fixture
def registry(tmp_path):
    return str(tmp_path / "registry")


@pytest.fixture
def release(registry, make_model, make_report):
    def make(name="model", seed=0):
        uri, model = make_model(name, seed=seed)
        return versions.create(uri, make_report(model.digest), registry)

    return make


def flip_bit(path: Path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_release_holds_the_model_its_report_and_its_card(registry, make_model, make_report):
    uri, model = make_model()
    report = make_report(model.digest)
    release = versions.create(uri, report, registry)
    assert release == versions.release_id(model, report) and len(release) == 14
    found = versions.verify(registry, release)
    assert set(found.files) == set(model.files) | {"report.json", "README.md"}
    assert found.inputs == model.inputs | {"model": model.digest, "report": report.digest}
    assert all(found.files[name].sha256 == model.files[name].sha256 for name in model.files)
    assert versions.report_of(registry, release) == report


def test_the_same_twice_is_one_release(registry, make_model, make_report):
    uri, model = make_model()
    first = versions.create(uri, make_report(model.digest), registry)
    before = versions.verify(registry, first)
    assert versions.create(uri, make_report(model.digest), registry) == first
    assert versions.verify(registry, first) == before
    assert versions.create(uri, make_report(model.digest, seed=1), registry) != first


def test_a_cut_creation_is_completed(registry, make_model, make_report):
    uri, model = make_model()
    report = make_report(model.digest)
    partial = Path(versions.release_uri(registry, versions.release_id(model, report)))
    partial.mkdir(parents=True)
    (partial / "denoiser.safetensors").write_bytes(b"half")
    assert versions.listing(registry) == []
    versions.verify(registry, versions.create(uri, report, registry))


@pytest.mark.parametrize("name", ["denoiser.safetensors", "text_encoder/tokenizer.json", "report.json", "README.md"])
def test_a_flipped_bit_is_refused_by_name(registry, release, name):
    made = release()
    flip_bit(Path(versions.release_uri(registry, made)) / name)
    with pytest.raises(DigestMismatch) as error:
        versions.verify(registry, made)
    assert name in error.value.where


def test_a_flipped_bit_in_the_model_makes_no_release(registry, make_model, make_report):
    uri, model = make_model()
    flip_bit(Path(uri) / "denoiser.safetensors")
    with pytest.raises(DigestMismatch, match="differs"):
        versions.create(uri, make_report(model.digest), registry)
    assert store.list_files(registry) == []


@pytest.mark.parametrize(
    "name", ["weights.pt", "model.pkl", "pytorch_model.bin", "run.py", "model.safetensors.pt", "noname"]
)
def test_other_files_are_refused_by_name(registry, make_model, make_report, name):
    uri, model = make_model(extra={name: b"data"})
    with pytest.raises(ArtifactError) as error:
        versions.create(uri, make_report(model.digest), registry)
    assert name in str(error.value)
    assert store.list_files(registry) == []


def test_a_pickle_by_another_name_is_refused(registry, make_model, make_report):
    import pickle

    for name in ("extra.safetensors", "extra.json"):
        uri, model = make_model(name, extra={name: pickle.dumps({"a": 1})})
        with pytest.raises(ArtifactError, match="not what its name says"):
            versions.create(uri, make_report(model.digest), registry)


def test_allowed_files_are_carried(registry, make_model, make_report):
    uri, model = make_model(extra={"samples.png": b"png", "merges.txt": b"a b", "README.md": b"old"})
    release = versions.create(uri, make_report(model.digest), registry)
    found = versions.verify(registry, release)
    assert {"samples.png", "merges.txt"} <= set(found.files)
    assert store.read_bytes(store.join(versions.release_uri(registry, release), "README.md")) != b"old"


@pytest.mark.parametrize("name", ["../up.json", "/abs.json", "a/../../b.json", "..\\up.json"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ArtifactError, match="leaves the folder"):
        versions.refuse_unsafe(name, tmp_path / "x.json", where=name)


def test_a_report_of_another_model_is_refused(registry, make_model, make_report):
    with pytest.raises(ArtifactError, match="another model"):
        versions.create(make_model()[0], make_report("x" * 64), registry)


def test_aliases_move_and_move_back(registry, release):
    a, b, c = (release(f"m{i}", seed=i) for i in range(3))
    for one in (a, b, b, c):
        versions.move_alias(registry, "production", one)
    assert versions.read_alias(registry, "production").previous == (a, b)  # moving to where it is changes nothing
    assert versions.resolve(registry, "production") == (c, versions.release_uri(registry, c))
    assert versions.rollback(registry, "production") == b
    assert versions.rollback(registry, "production") == a
    with pytest.raises(InputMissing, match="no release to go back to"):
        versions.rollback(registry, "production")
    assert versions.resolve(registry, "production")[0] == a


def test_no_rollback_to_a_damaged_release(registry, release):
    a, b = release("m0", seed=0), release("m1", seed=1)
    versions.move_alias(registry, "production", a)
    versions.move_alias(registry, "production", b)
    flip_bit(Path(versions.release_uri(registry, a)) / "autoencoder.safetensors")
    with pytest.raises(DigestMismatch):
        versions.rollback(registry, "production")
    assert versions.resolve(registry, "production")[0] == b


def test_an_unknown_name_lists_the_aliases(registry, release):
    versions.move_alias(registry, "staging", release())
    with pytest.raises(InputMissing, match="staging"):
        versions.resolve(registry, "production")
    with pytest.raises(InputMissing):
        versions.move_alias(registry, "production", "r-000000000000")
    with pytest.raises(InputMissing, match="no alias"):
        versions.rollback(registry, "production")


@pytest.mark.parametrize("alias", ["", "../x", "a/b", "Production", "r-0123456789ab", ".hidden"])
def test_names_that_cannot_be_aliases(registry, release, alias):
    with pytest.raises(ConfigError, match="cannot be an alias"):
        versions.move_alias(registry, alias, release())


def test_a_damaged_alias_is_named(registry, release):
    versions.move_alias(registry, "production", release())
    Path(registry, "aliases", "production.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        versions.resolve(registry, "production")


def test_the_listing(registry, release):
    a, b = release("m0", seed=0), release("m1", seed=1)
    versions.move_alias(registry, "production", b)
    rows = {row.id: row for row in versions.listing(registry)}
    assert set(rows) == {a, b}
    assert rows[a].aliases == () and rows[b].aliases == ("production",)
    assert rows[a].metrics["fid"] == 10.0
    assert versions.listing(registry + "-empty") == []


def test_a_damaged_release_does_not_hide_the_others(registry, release):
    a, b = release("m0", seed=0), release("m1", seed=1)
    Path(versions.release_uri(registry, a), "report.json").write_text("{}")
    rows = {row.id: row for row in versions.listing(registry)}
    assert "differs" in rows[a].problem and rows[b].problem == "" and rows[b].metrics["fid"] == 10.0


def test_the_alias_file_is_plain_json(registry, release):
    made = release()
    versions.move_alias(registry, "production", made)
    raw = json.loads(Path(registry, "aliases", "production.json").read_text())
    assert raw["release"] == made and raw["previous"] == [] and raw["updated"].endswith("+00:00")


def test_a_registry_on_s3(moto_s3, make_model, make_report):
    import boto3

    registry = moto_s3.uri("registry")
    ids = []
    for i in range(2):
        uri, model = make_model(f"m{i}", seed=i)
        ids.append(versions.create(uri, make_report(model.digest), registry))
        versions.move_alias(registry, "production", ids[-1])
    assert versions.rollback(registry, "production") == ids[0]
    assert {row.id: row.aliases for row in versions.listing(registry)} == {ids[0]: ("production",), ids[1]: ()}
    client = boto3.client("s3", endpoint_url=moto_s3.endpoint)
    key = f"registry/releases/{ids[0]}/denoiser.safetensors"
    data = bytearray(client.get_object(Bucket=moto_s3.bucket, Key=key)["Body"].read())
    data[-1] ^= 1
    client.put_object(Bucket=moto_s3.bucket, Key=key, Body=bytes(data))
    store.delete(store.cache_dir())  # another node: it has no good copy from before
    with pytest.raises(DigestMismatch) as error:
        versions.verify(registry, "production")
    assert "denoiser.safetensors" in error.value.where
