"""The model that a benchmark measures. Oracles: transformers' own loader; the folder's being there or not."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from shapes import CONFIG, write_shape
from tiny_folders import write_t5
from transformers import AutoModelForCausalLM

import lownibble as ln
from lownibble.bench import subject as room
from lownibble.bench.subject import random_ids, subject
from lownibble.errors import ConfigError, ModelError


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_load_here_and_in_transformers(tmp_path, tied):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": tied}))
    with subject(str(tmp_path)) as found:
        assert (found.random, found.name) == (True, str(tmp_path))
        ours, tokenizer = ln.load(str(found.folder))
        theirs = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32)
        ids = random_ids(CONFIG["vocab_size"], 1, 2, 7)[0]
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
        assert tokenizer.pad_token_id == ours.config.pad_token_id == 2
        weights = theirs.state_dict()
        assert weights["model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.02)
        assert weights["model.norm.weight"].eq(1).all()
    assert not found.folder.exists()


def test_the_same_weights_each_time(tmp_path):
    shape, found = write_shape(tmp_path), []
    for _ in range(2):
        with subject(shape) as made:
            found.append((made.folder / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_they_are_removed_on_the_way_out(tmp_path, error):
    def measured():
        with subject(write_shape(tmp_path)) as found:
            kept.append(found.folder)
            raise error

    kept = []
    with pytest.raises(error):
        measured()
    assert kept
    assert not kept[0].exists()


def test_a_folder_with_weights_is_measured_as_it_is(tiny_model):
    with subject(str(tiny_model)) as found:
        assert found == (Path(tiny_model), str(tiny_model), False)
    assert (Path(tiny_model) / "model.safetensors").exists()


def test_a_folder_of_random_weights_keeps_the_name_of_its_shape(tmp_path):
    with subject(write_shape(tmp_path)) as found, subject(str(found.folder)) as again:
        assert again == (found.folder, str(tmp_path), True)


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(5_000_000_000))
    monkeypatch.setattr(room, "write_random", lambda *_: pytest.fail("nothing should be written"))
    with pytest.raises(ConfigError, match=r"'llama-3-8b' take 16\.1 GB, and .* has 5\.0 GB free"), subject("llama-3-8b"):
        pass


def test_memory_before_disk_and_no_more_than_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "IN_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10**12))
    assert room._place(10**6, "x") == tmp_path
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(10**5))
    assert room._place(10**6, "x") != tmp_path


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ModelError, match="Did you mean 'llama-3-8b'"), subject("llama-3-8"):
        pass
    folder = write_t5(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has an encoder"), subject(str(folder)):
        pass
