"""Encoders by path and name; a real Sentence-T5, small enough to be made here; the cache on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from eval.encoders import EMBEDDED_ENCODER, Encoder, EncoderSpec, _shared, _shared_log, find_encoder
from submission.backends import models
from submission.errors import UserError
from tests.threads import Threads

TEXTS = ["Rewrite this as a poem.", "Make it formal", "a", "Rewrite this as a poem.", "", "</s> lucrarea"]


@pytest.fixture(scope="session")
def sentence_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5 encoder, mean pooling, dense layer without bias, length 1: the architecture of sentence-t5-base."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("t5")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for text in TEXTS for word in set(text.split()))]
    pieces += [chr(code) for code in range(33, 127)]
    vocabulary = [(piece, -float(rank)) for rank, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    config = T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64, vocab_size=len(tokenizer))
    T5EncoderModel(config).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    transformer = Transformer(str(folder / "plain"), max_seq_length=256)
    modules = [transformer, Pooling(32, "mean"), Dense(32, 24, bias=False, activation_function=torch.nn.Identity()),
               Normalize()]  # fmt: skip
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "sentence-t5-tiny"))
    return folder / "sentence-t5-tiny"


def computed_here(folder: Path, texts: list[str]) -> list[np.ndarray]:
    """Embeddings as a worker would compute them, without its seven seconds of imports."""
    found = dict(EncoderSpec(folder).load().embed((str(number), text) for number, text in enumerate(texts)))
    return [found[str(number)] for number in range(len(texts))]


def test_without_a_name_the_embedded_encoder_is_found_and_named() -> None:
    encoder = find_encoder(cached=False)
    assert encoder.name == EMBEDDED_ENCODER
    assert not encoder.is_the_competitions
    assert "not the competition's metric" in encoder.metric
    vectors = encoder.embed(TEXTS)
    assert vectors.shape == (6, 384)
    assert (vectors[0] == vectors[3]).all()


def test_a_sentence_t5_gives_what_its_parts_give(sentence_t5: Path) -> None:
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer, T5EncoderModel

    vectors = computed_here(sentence_t5, TEXTS)
    tokenizer, model = AutoTokenizer.from_pretrained(sentence_t5), T5EncoderModel.from_pretrained(sentence_t5).eval()
    (dense,) = load_file(sentence_t5 / "2_Dense" / "model.safetensors").values()
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = dense @ hidden.mean(dim=0).numpy()
        assert vector == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)


def test_a_small_model_of_that_name_is_not_the_competitions(sentence_t5: Path, tmp_path: Path) -> None:
    shutil.copytree(sentence_t5, tmp_path / "sentence-t5-base")
    encoder = find_encoder(str(tmp_path / "sentence-t5-base"), cached=False)
    assert encoder.name == "sentence-t5-base"
    assert not encoder.is_the_competitions
    config = tmp_path / "sentence-t5-base" / "config.json"
    config.write_text(json.dumps({"model_type": "t5", "d_model": 768, "num_layers": 12}))
    assert find_encoder(str(tmp_path / "sentence-t5-base"), cached=False).is_the_competitions


@pytest.mark.parametrize("place", ["kaggle", "hub"])
def test_sentence_t5_is_taken_where_it_is_on_the_disk(
    place: str, sentence_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {
        "kaggle": tmp_path / "input" / "sentence-t5-base-hf" / "1",
        "hub": tmp_path / "hub" / "models--sentence-transformers--sentence-t5-base" / "snapshots" / "0a1b",
    }
    shutil.copytree(sentence_t5, folders[place])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(models, "_KAGGLE_INPUT", tmp_path / "input")
    for wanted in ("", "sentence-t5-base", "sentence-transformers/sentence-t5-base"):
        encoder = find_encoder(wanted, cached=False)
        assert (encoder.name, encoder.folder) == ("sentence-t5-base", folders[place])
    assert find_encoder("embedded", cached=False).name == EMBEDDED_ENCODER


@pytest.mark.parametrize("wanted", ["no-such-encoder", "./nowhere", "/"])
def test_an_unknown_encoder_is_refused_with_those_that_are_there(wanted: str) -> None:
    with pytest.raises(UserError, match=r"all-MiniLM-L6-v2|does not exist|modules\.json"):
        find_encoder(wanted)


def test_an_encoder_with_damaged_weights_is_an_error_not_a_number(sentence_t5: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(sentence_t5, tmp_path / "t5")
    weights = tmp_path / "t5" / "2_Dense" / "model.safetensors"
    save_file({name: np.full_like(value, np.nan) for name, value in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="not finite"):
        computed_here(tmp_path / "t5", ["a"])
    shutil.copytree(sentence_t5, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be loaded"):
        find_encoder(str(tmp_path / "other"), cached=False).embed(["a"])  # the worker's words


# -- log ----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and no handle of another test; workers are threads."""
    monkeypatch.setattr("submission.calls.ways.Processes", Threads)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _shared.cache_clear()
    _shared_log.cache_clear()
    yield tmp_path / "cache" / "prompt-recovery" / "embeddings" / "calls.jsonl"
    _shared.cache_clear()
    _shared_log.cache_clear()


def anew(folder: Path) -> Encoder:
    """An encoder as another process would see it."""
    _shared.cache_clear()
    _shared_log.cache_clear()
    return Encoder("tiny", folder)


def test_a_second_process_computes_nothing(sentence_t5: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = anew(sentence_t5).embed(TEXTS)
    assert own_cache.is_file()
    monkeypatch.setattr("submission.calls.models.Pool", None)
    assert (anew(sentence_t5).embed(TEXTS) == first).all()


def test_other_weights_are_another_encoder(sentence_t5: Path, own_cache: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    first = anew(sentence_t5).embed(TEXTS)
    shutil.copytree(sentence_t5, tmp_path / "t5")
    weights = tmp_path / "t5" / "2_Dense" / "model.safetensors"
    save_file({name: value[::-1].copy() for name, value in load_file(weights).items()}, weights)
    assert np.abs(anew(tmp_path / "t5").embed(TEXTS) - first).max() > 0.01


def test_a_damaged_log_is_computed_again(sentence_t5: Path, own_cache: Path) -> None:
    first = anew(sentence_t5).embed(TEXTS)
    own_cache.write_bytes(own_cache.read_bytes()[:-7])
    assert (anew(sentence_t5).embed(TEXTS) == first).all()


def test_a_cache_that_cannot_be_written_costs_time_only(
    sentence_t5: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert anew(sentence_t5).embed(TEXTS).shape == (6, 24)


def test_what_is_not_to_be_kept_is_not(sentence_t5: Path, own_cache: Path) -> None:
    anew(sentence_t5).embed(TEXTS, keep=False)
    assert not own_cache.exists()
