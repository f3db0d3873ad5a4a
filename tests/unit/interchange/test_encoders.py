"""Text encoders as every version of transformers reads them, at full size by name, and their tokenizers."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models

from latentray.checkpoint import compvis
from latentray.conditioning.text import Reading
from latentray.errors import ArtifactError
from latentray.interchange import encoders, tokenizer_files
from latentray.interchange.encoders import Encoder
from latentray.models import torchvision_ops

torchvision_ops.ensure_importable()
import transformers  # noqa: E402  (it imports torchvision)

CLIP_L = dict(
    model_type="clip_text_model", hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    vocab_size=49408, max_position_embeddings=77, projection_dim=768,
)  # fmt: skip
BIG_G = CLIP_L | dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
    hidden_act="gelu",
)  # fmt: skip
H_23 = CLIP_L | dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
)
T5_XXL = dict(
    model_type="t5", d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128,
    feed_forward_proj="gated-gelu",
)  # fmt: skip
PUBLISHED = [
    ("clip", CLIP_L, 123_060_480), ("clip_projection", CLIP_L, 123_650_304), ("clip_projection", BIG_G, 694_659_840),
    ("clip", H_23, 340_387_840), ("t5", T5_XXL, 4_762_310_656),
]  # fmt: skip
SMALL = CLIP_L | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1, vocab_size=99)


def weights_of(kind, described):
    with torch.device("meta"):
        network = getattr(transformers, encoders.CLASSES[kind])
        return dict(network(network.config_class(**described)).state_dict())


def encoder(kind, described, state, tmp_path, layer=1):
    described, state = encoders.canonical(described, state, kind)
    reading = Reading(kind=kind, layer=layer)
    return Encoder(name="one", reading=reading, described=described, state=state, tokenizer=tmp_path)


@pytest.mark.parametrize(("kind", "described", "parameters"), PUBLISHED)
def test_published_encoders_have_every_name_once(kind, described, parameters, tmp_path):
    found = encoder(kind, described, weights_of(kind, described), tmp_path)
    encoders.require_fit(found, where="here")
    assert sum(value.numel() for value in found.state.values()) == parameters
    assert kind == "t5" or all(key.startswith(("text_model.", "text_projection.")) for key in found.state)
    if described.get("hidden_act") == "gelu":
        written = compvis.open_clip_from_clip(found.state)
        assert sum(value.numel() for value in written.values()) == parameters
        assert set(compvis.clip_from_open_clip(written)) == set(found.state)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_weights_of_any_version_become_the_same(prefix, tmp_path):
    state = weights_of("clip", SMALL)
    bare = {key.removeprefix("text_model."): value for key, value in state.items()}
    older = {f"{prefix}{key}": value for key, value in bare.items()} | {
        f"{prefix}embeddings.position_ids": torch.arange(77)
    }
    assert encoder("clip", SMALL, older, tmp_path).state.keys() == encoder("clip", SMALL, state, tmp_path).state.keys()


def test_of_a_whole_clip_or_t5_the_text_half_is_taken(tmp_path):
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in weights_of("clip", SMALL).items()}
    whole = state | {
        "vision_model.post_layernorm.bias": torch.ones(1),
        "visual_projection.weight": torch.ones(1),
        "text_projection.weight": torch.ones(64, 64, device="meta"),
        "logit_scale": torch.ones(()),
    }
    described = {"model_type": "clip", "projection_dim": 64, "text_config": SMALL, "vision_config": {}}
    alone = encoder("clip", described, whole, tmp_path)
    assert alone.state.keys() == state.keys()
    encoders.require_fit(alone, where="here")
    projected = encoder("clip_projection", described, whole, tmp_path)
    assert projected.state.keys() == state.keys() | {"text_projection.weight"}
    encoders.require_fit(projected, where="here")
    shared = {"shared.weight": torch.ones(2), "encoder.embed_tokens.weight": torch.ones(2), "decoder.x": torch.ones(1)}
    assert encoders.canonical({"model_type": "t5"}, shared, "t5")[1].keys() == {"shared.weight"}


@pytest.mark.parametrize(
    ("kind", "changes", "layer", "says"),
    [
        ("clip", {"num_hidden_layers": 3}, 1, r"layers.2.*missing, wanted .*; 15 more"),
        ("clip", {"hidden_size": 128, "num_attention_heads": 2}, 1, r"is \(99, 64\), wanted \(99, 128\)"),
        ("clip", {"model_type": "t5"}, 1, "is a t5 of"),
        ("clip", {}, 3, "of 2 layers"),
        ("clip_projection", {}, 1, "text_projection.weight is missing"),
    ],
)
def test_what_does_not_fit_its_configuration_is_refused_by_its_first_weight(kind, changes, layer, says, tmp_path):
    found = encoder(kind, SMALL | changes, weights_of("clip", SMALL), tmp_path, layer)
    with pytest.raises(ArtifactError, match=says):
        encoders.require_fit(found, where="here")


def bring_in(source, into, **settings):
    into.mkdir()
    tokenizer_files.bring_in(source, into, **({"max_tokens": 16, "embedded": 1000, "where": "here"} | settings))
    return json.loads((into / "tokenizer_config.json").read_text())


def test_a_tokenizer_of_vocabulary_and_merges_is_brought_in_and_handed_out_as_it_was(clip_tokenizer, tmp_path):
    told = bring_in(clip_tokenizer, tmp_path / "in", pad_token="!")
    assert (told["pad_token"], told["model_max_length"], told["tokenizer_class"]) == ("!", 16, "CLIPTokenizer")
    assert not {"is_local", "name_or_path", "local_files_only"} & set(told)
    assert tokenizer_files.hand_out(tmp_path / "in", tmp_path / "out", max_tokens=16) == "CLIPTokenizer"
    assert json.loads((tmp_path / "out" / "vocab.json").read_text()) == json.loads(
        (clip_tokenizer / "vocab.json").read_text()
    )
    assert (tmp_path / "out" / "merges.txt").read_text() == (clip_tokenizer / "merges.txt").read_text()
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())["pad_token"] == "!"


def test_special_tokens_as_older_files_say_them_are_understood(clip_tokenizer, tmp_path):
    source = shutil.copytree(clip_tokenizer, tmp_path / "older")
    token = dict(__type="AddedToken", lstrip=False, normalized=True, rstrip=False, single_word=False)
    settings = {
        name: token | {"content": text}
        for name, text in (("bos_token", "<|startoftext|>"), ("eos_token", "<|endoftext|>"))
    } | {"model_max_length": 77, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer", "name_or_path": "/x"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    bring_in(source, tmp_path / "in")
    tokenizer_files.hand_out(tmp_path / "in", tmp_path / "out", max_tokens=16)
    found = [transformers.CLIPTokenizer.from_pretrained(folder) for folder in (clip_tokenizer, tmp_path / "out")]
    ids = [one("a red circle", padding="max_length", max_length=12)["input_ids"] for one in found]
    assert ids[0] == ids[1]


def test_a_sentencepiece_model_is_carried_beside_its_tokenizer(tmp_path):
    source = tmp_path / "t5"
    source.mkdir()
    Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)).save(str(source / "tokenizer.json"))
    (source / "spiece.model").write_bytes(b"pieces")
    bring_in(source, tmp_path / "in", max_tokens=None)
    assert tokenizer_files.hand_out(tmp_path / "in", tmp_path / "out", max_tokens=None) == "PreTrainedTokenizerFast"
    settings = tmp_path / "in" / "tokenizer_config.json"
    settings.write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))  # its class rebuilds all but the vocabulary
    shutil.rmtree(tmp_path / "out")
    assert tokenizer_files.hand_out(tmp_path / "in", tmp_path / "out", max_tokens=None) == "T5TokenizerFast"
    assert (tmp_path / "out" / "spiece.model").read_bytes() == b"pieces"
    assert not (tmp_path / "out" / "merges.txt").exists()


@pytest.mark.parametrize("content", [None, "{}", "["])
def test_a_tokenizer_that_cannot_be_read_is_refused(content, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    if content is not None:
        (source / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match="tokenizer cannot be read"):
        bring_in(source, tmp_path / "in")


def test_a_tokenizer_that_knows_too_much_is_refused(clip_tokenizer, tmp_path):
    with pytest.raises(ArtifactError, match="knows 519 tokens, and the text encoder embeds 500"):
        bring_in(clip_tokenizer, tmp_path / "in", embedded=500)
