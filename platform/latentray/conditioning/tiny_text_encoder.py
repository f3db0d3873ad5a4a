"""Make a small CLIP text model with a tokenizer of its own: for runs without downloads.

Its weights are random and stay frozen: a random transformer keeps apart every caption that differs, and the denoiser's
cross-attention learns to read it. It is no substitute for a trained encoder on real captions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from latentray.checkpoint import manifest, store
from latentray.config.text_encoder import TinyTextEncoderConfig
from latentray.models import torchvision_ops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EMBEDDING_STD = {"token_embedding": 1.0, "position_embedding": 0.5}
_START, _END = "<|startoftext|>", "<|endoftext|>"


def write(folder: Path, captions: Iterable[str], config: TinyTextEncoderConfig) -> None:
    """Train a BPE tokenizer on the captions, build the model, and save both as transformers saves them."""
    torchvision_ops.ensure_importable()
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()

    tokenizer = Tokenizer(models.BPE(unk_token=_END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[_START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(captions)), trainer)
    start, end = tokenizer.token_to_id(_START), tokenizer.token_to_id(_END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, start), (_END, end)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        unk_token=_END,
        model_max_length=config.max_tokens,
    )
    fast.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=fast.vocab_size,
                hidden_size=config.width,
                intermediate_size=2 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.max_tokens,
                projection_dim=config.width,
                bos_token_id=start,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
    _let_tokens_speak(model)
    model.save_pretrained(folder, safe_serialization=True)


@torch.no_grad()
def _let_tokens_speak(model: PreTrainedModel) -> None:
    """Scale the embeddings from CLIP's initial 0.02, meant for training, to the size of what random layers add to them.

    Left small, 80 % of the output is the same for every caption, and the denoiser takes twice as long to learn colours.
    """
    for name, weight in model.named_parameters():
        for embedding, std in _EMBEDDING_STD.items():
            if name.endswith(f"{embedding}.weight"):
                weight.mul_(std / weight.std())


def publish(uri: str, captions: Iterable[str], config: TinyTextEncoderConfig) -> manifest.Manifest:
    """Make the encoder and commit it as an artifact of kind `text_encoder`; an existing one is kept as it is."""
    found = manifest.find(uri)
    if found is not None:
        return found
    with store.staging() as folder:
        write(folder, captions, config)
        return manifest.publish(folder, uri, kind="text_encoder")
