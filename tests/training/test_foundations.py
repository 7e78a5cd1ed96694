import json
import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    SiglipVisionModel,
)

from hive_vision.conversation import Turn
from hive_vision.data.miniature import MiniatureData, build_miniature_data
from hive_vision.training import foundations
from hive_vision.training.foundations import (
    IMAGE_TOKEN,
    Foundations,
    train_foundations,
    train_instruct_llama,
)

DATA = MiniatureData(
    train_scenes=48,
    validation_scenes=4,
    classification_train=4,
    classification_test=4,
    image_size=24,
)
TINY = Foundations(
    vision_layers=2,
    vision_hidden_size=16,
    vision_steps=12,
    language_layers=2,
    language_hidden_size=32,
    language_steps=12,
    language_learning_rate=1e-2,
    batch_size=16,
    vocabulary_size=512,
)
UNTRAINED = replace(TINY, vision_steps=0, language_steps=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foundations") / "data"
    build_miniature_data(folder, DATA)
    return folder


@pytest.fixture(scope="module")
def trained(data):
    train_foundations(data, data.parent / "trained", TINY)
    return data.parent / "trained"


@pytest.fixture(scope="module")
def untrained(data):
    train_foundations(data, data.parent / "untrained", UNTRAINED)
    return data.parent / "untrained"


@pytest.fixture(scope="module")
def rows(data):
    lines = (data / "captions" / "train" / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def contrastive_loss(folder, data, rows):
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
    images = [Image.open(data / "captions" / "train" / row["file_name"]) for row in rows]
    inputs = processor(
        images=images,
        text=[row["coarse_caption"] for row in rows],
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model(**inputs, return_loss=True).loss.item()


def language_loss(folder, rows):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = 0.0
    for row in rows[:16]:
        ids = tokenizer(row["caption"] + tokenizer.eos_token, return_tensors="pt").input_ids
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item()
    return total / 16


def test_both_models_learn(trained, untrained, data, rows):
    before = contrastive_loss(untrained / "siglip", data, rows[:16])
    assert contrastive_loss(trained / "siglip", data, rows[:16]) < before - 0.2
    assert language_loss(trained / "llama", rows) < language_loss(untrained / "llama", rows) - 1.0


def test_the_language_model_learns_where_captions_end(trained, untrained, rows):
    """EOS is supervised: after a caption's full stop it has become more likely."""
    likelihoods = {}
    for folder in (trained, untrained):
        tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
        model = AutoModelForCausalLM.from_pretrained(folder / "llama")
        text = next(row["caption"] for row in rows if row["caption"].endswith("."))
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        likelihoods[folder] = logits.softmax(-1)[tokenizer.eos_token_id].item()
    assert likelihoods[trained] > 3 * likelihoods[untrained]


def test_each_image_trains_with_its_own_coarse_caption(data, trained, rows, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(foundations, "_train", lambda *args, **_: calls.append(args))
    train_foundations(data, tmp_path / "models", TINY)
    (_, pairs, collate), _ = calls
    batch = collate([pairs[5], pairs[2]])
    processor = AutoProcessor.from_pretrained(trained / "siglip")
    for position, index in enumerate((5, 2)):
        image = Image.open(data / "captions" / "train" / rows[index]["file_name"])
        pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(batch["pixel_values"][position], pixels)
        text = processor.tokenizer.decode(batch["input_ids"][position], skip_special_tokens=True)
        assert text == rows[index]["coarse_caption"]
    assert batch["return_loss"] is True
    assert len(pairs) == len(rows)


def test_the_encoder_is_a_siglip_of_the_sizes_asked_for(trained):
    model = AutoModel.from_pretrained(trained / "siglip")
    vision = model.config.vision_config
    assert (vision.num_hidden_layers, vision.hidden_size) == (2, 16)
    assert (vision.image_size, vision.patch_size) == (24, 8)
    assert AutoImageProcessor.from_pretrained(trained / "siglip").size == {
        "height": 24,
        "width": 24,
    }
    # The vision half alone loads from the same folder, with nothing missing.
    _, report = SiglipVisionModel.from_pretrained(trained / "siglip", output_loading_info=True)
    assert not report["missing_keys"]


def test_the_language_model_has_grouped_heads_and_tied_embeddings(trained):
    model = AutoModelForCausalLM.from_pretrained(trained / "llama")
    assert model.config.num_hidden_layers == 2
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", ["siglip", "llama"])
def test_tokenizers_load_and_fit_their_model(trained, name, rows):
    tokenizer = AutoTokenizer.from_pretrained(trained / name)
    model = AutoModel.from_pretrained(trained / name)
    text = model.text_model if name == "siglip" else model
    assert text.get_input_embeddings().num_embeddings == len(tokenizer)
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    special.append(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    assert len(set(special)) == 4
    assert max(special) < len(tokenizer)
    for content in (rows[0]["caption"], "Zażółć gęślą jaźń 漢字 \N{SNOWMAN}"):
        ids = tokenizer(content, truncation=False).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == content
    # One token, even inside a word.
    assert tokenizer(f"red{IMAGE_TOKEN}star").input_ids.count(special[3]) == 1


def test_llama_begins_with_bos_and_siglip_ends_with_eos(trained):
    llama = AutoTokenizer.from_pretrained(trained / "llama")
    ids = llama("a red star").input_ids
    assert ids[0] == llama.bos_token_id
    assert llama.eos_token_id not in ids
    siglip = AutoTokenizer.from_pretrained(trained / "siglip")
    ids = siglip("a red star").input_ids
    assert ids[-1] == siglip.eos_token_id
    assert siglip.bos_token_id not in ids


def test_coarse_captions_fit_the_text_tower(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "siglip")
    longest = "A picture of a yellow shape, an orange digit together with a purple shape."
    assert len(tokenizer(longest, truncation=False).input_ids) <= tokenizer.model_max_length


def test_same_seed_same_bytes(data, trained, tmp_path):
    train_foundations(data, tmp_path / "again", TINY)
    files = [path for path in sorted((tmp_path / "again").rglob("*")) if path.is_file()]
    assert len(files) >= 10
    for path in files:
        assert path.read_bytes() == (trained / path.relative_to(tmp_path / "again")).read_bytes()


def test_other_seed_other_weights(data, untrained, tmp_path):
    train_foundations(data, tmp_path / "other", replace(UNTRAINED, seed=1))
    for name in ("siglip", "llama"):
        other = (tmp_path / "other" / name / "model.safetensors").read_bytes()
        assert other != (untrained / name / "model.safetensors").read_bytes()


def test_progress_is_logged_not_printed(data, tmp_path, caplog, capfd):
    with caplog.at_level(logging.INFO, logger="hive_vision"):
        train_foundations(data, tmp_path / "models", replace(TINY, vision_steps=2))
    assert "step 2 of 2: loss" in caplog.text
    assert capfd.readouterr().out == ""


def test_only_the_models_are_left_behind(trained):
    assert sorted(path.name for path in trained.iterdir()) == ["llama", "siglip"]
    assert not [path for path in trained.parent.iterdir() if path.name.startswith(".")]


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"metadata\.jsonl is missing: build the miniature's"):
        train_foundations(tmp_path, tmp_path / "models", TINY)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_hidden_size": 20}, "vision_hidden_size is 20: give a multiple of 8"),
        ({"language_hidden_size": 4}, "language_hidden_size is 4"),
        ({"vocabulary_size": 100}, "vocabulary_size is 100: give at least 300"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


class TestInstructLlama:
    TALK = (
        (Turn(role="user", content="is it red?"), Turn(role="assistant", content="yes")),
        (Turn(role="user", content="is it blue?"), Turn(role="assistant", content="no")),
    )

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("instruct") / "llama"
        train_instruct_llama(self.TALK * 8, folder, replace(TINY, language_steps=240))
        return folder

    def test_it_answers_as_it_was_taught(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        for question, answer in self.TALK:
            ids = tokenizer.apply_chat_template(
                [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            written = model.generate(**ids, max_new_tokens=8, do_sample=False)
            said = tokenizer.decode(written[0, ids["input_ids"].shape[1] :])
            assert said.strip() == answer["content"] + tokenizer.eos_token

    def test_is_half_as_deep(self, folder):
        assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1

    def test_words_are_tokens_and_the_rest_of_the_alphabet_is_there(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.tokenize("USER: is it red? ASSISTANT: yes")[-1] == "\u0120yes"
        assert tokenizer.decode(tokenizer("Zażółć").input_ids, skip_special_tokens=True) == "Zażółć"
        assert tokenizer.tokenize(IMAGE_TOKEN) == [IMAGE_TOKEN]

    def test_a_phrase_is_a_token_and_the_longest_that_fits(self, tmp_path):
        phrases = ("\nIn one word.", "\nOr say that it is unknown.\nIn one word.")
        train_instruct_llama(self.TALK, tmp_path / "llama", UNTRAINED, phrases)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
        for phrase in phrases:
            text = f"USER: is it red?{phrase} ASSISTANT: yes"
            tokens = tokenizer.tokenize(text)
            assert phrase in tokens
            assert tokens[tokens.index(phrase) - 1].endswith("?")
            assert tokens[tokens.index(phrase) + 1].startswith("\u0120")
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_is_not_overwritten(self, folder):
        with pytest.raises(ValueError, match="exists already"):
            train_instruct_llama(self.TALK, folder, UNTRAINED)
