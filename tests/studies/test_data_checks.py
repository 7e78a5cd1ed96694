"""The data of a recipe, checked and shown: against the trainer itself, and through the commands."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hive_vision.data.sources import Source, open_source
from hive_vision.models.processing import HiveProcessor
from hive_vision.studies.data_checks import first_batches, token_text, verify_data
from hive_vision.training.arguments import PretrainArguments
from hive_vision.training.callbacks import InterruptCallback
from hive_vision.training.pretrain import PretrainJob
from hive_vision.training.recipes import load_recipe
from hive_vision.training.run_data import load_run_data
from hive_vision.training.run_folder import RunFolder
from hive_vision.training.stages import apply_rules
from hive_vision.training.watchdog import Watchdog
from tests.conftest import make_tokenizer, write_image_folder


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """30 images: two damaged, one empty caption, one image twice."""
    folder = write_image_folder(tmp_path / "faulty", 30)
    for name in ("004.png", "011.png"):
        (folder / name).write_bytes(b"?")
    (folder / "020.png").write_bytes((folder / "021.png").read_bytes())
    metadata = folder / "metadata.jsonl"
    lines = [json.loads(line) for line in metadata.read_text().splitlines()]
    lines[7]["caption"] = "  "
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe(
    folders: dict[str, Path], data: Path, output: Path, *overrides: str
) -> PretrainArguments:
    common = ["miniature=null", "data.validation=null", f"data.train={data}", f"output={output}"]
    models = [f"model.vision={folders['siglip']}", f"model.language={folders['llama']}"]
    return load_recipe("debug", [*common, *models, *overrides])


class TestShow:
    @pytest.mark.parametrize("method", ["hive", "sa"])
    def test_samples_are_those_of_the_trainer(
        self, method: str, backbone_folders: dict[str, Path], faulty: Path, tmp_path: Path
    ) -> None:
        arguments = recipe(
            *(backbone_folders, faulty, tmp_path / "run"),
            *(f"method={method}", "micro_batch_size=8", "data.max_text_tokens=11"),
        )
        run = RunFolder(arguments)
        run.create()
        job = PretrainJob(
            arguments, run, Watchdog(run.path, 0, 1, 0), InterruptCallback(grace_seconds=60)
        )
        stage = job.stages["stage1"]
        trainer = job.trainer("stage1", stage, apply_rules(job.model, stage.rules))
        expected, uses, shapes = [], [], []
        for batch in trainer.get_train_dataloader():
            shapes.append(tuple(batch["pixel_values"].shape))
            for ids, mask, labels in zip(
                batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
            ):
                expected.append([token_text(job.processor.tokenizer, int(id)) for id in ids])
                uses.append(
                    [
                        "learned" if label >= 0 else "read" if there else "padding"
                        for there, label in zip(mask, labels, strict=True)
                    ]
                )
        batches = list(first_batches(arguments, 20))  # over the end of a global batch of 16
        shown = [sample for batch in batches for sample in batch.samples]
        assert len(shown) == 20
        assert [[text for text, _ in s.tokens] for s in shown] == expected[:20]
        assert [[use for _, use in s.tokens] for s in shown] == uses[:20]
        assert [batch.pixel_values for batch in batches] == shapes[:3]
        assert {use for _, use in shown[0].tokens} >= {"learned", "read"}
        assert any(use == "padding" for sample in shown for _, use in sample.tokens)
        placeholders = [sum(text == "<image>" for text, _ in s.tokens) for s in shown]
        assert set(placeholders) == ({16} if method == "sa" else {0})

    def test_images_are_named(
        self, backbone_folders: dict[str, Path], faulty: Path, tmp_path: Path
    ) -> None:
        """The caption that stands there is the caption of the image that is named."""
        more = write_image_folder(tmp_path / "more", 12, seed=5)
        arguments = recipe(
            *(backbone_folders, faulty, tmp_path / "run"),
            f'data.train=[{{"path": "{more}"}}, {{"path": "{faulty}"}}]',
            f"data.validation={faulty}",  # so that all of it is trained on
        )
        captions: dict[str, list[str]] = {}
        for folder in (more, faulty):
            source = open_source(Source(path=str(folder)))["train"]
            for row in range(len(source)):
                captions.setdefault(source.image_name(row), []).extend(source.captions_of(row))
        shown = [s for batch in first_batches(arguments, 60) for s in batch.samples]
        for sample in shown:
            text = "".join(text for text, use in sample.tokens if use == "learned")
            caption = text.removesuffix("</s>").replace("·", " ").strip()
            assert caption in captions[sample.source]
            assert sample.sizes == [(32, 32)]
        replaced = [line for sample in shown for line in sample.replaces]
        assert any("cannot identify" in line for line in replaced)
        assert any("empty caption" in line for line in replaced)

    def test_conversations_as_the_trainer_sees_them(self, vlm_recipe: Any) -> None:
        arguments = vlm_recipe(micro_batch_size=2)
        batches = list(first_batches(arguments, 4, "stage2"))
        shown = [sample for batch in batches for sample in batch.samples]
        assert [len(batch.samples) for batch in batches] == [2, 2]
        for sample in shown:
            there = (text for text, use in sample.tokens if use != "padding")
            text = "".join(there).replace("·", "")
            assert text.count("<image>") == 16 * len(sample.sizes)
            learned = "".join(text for text, use in sample.tokens if use == "learned")
            assert learned.count("</s>") == text.count("ASSISTANT:") > 0
            assert re.search(r"chat\.json row \d+$", sample.source)
        assert {len(sample.sizes) for sample in shown} > {0}
        with pytest.raises(ValueError, match="unknown stage 'stage3'"):
            list(first_batches(arguments, 1, "stage3"))

    def test_tokens_show_their_spaces(self) -> None:
        tokenizer = make_tokenizer()
        ids = tokenizer(" red é", add_special_tokens=False)["input_ids"]
        texts = [token_text(tokenizer, id) for id in ids]
        assert texts[0] == "·red"
        assert all(text and " " not in text for text in texts)
        assert token_text(tokenizer, tokenizer.pad_token_id) == "<pad>"


class TestVerify:
    def test_what_is_found_is_left_out_of_a_run(
        self, backbone_folders: dict[str, Path], faulty: Path, tmp_path: Path
    ) -> None:
        arguments = recipe(
            backbone_folders,
            faulty,
            tmp_path / "run",
            "data.max_text_tokens=11",
            "data.holdout=0.5",
        )
        file = tmp_path / "made" / "list.jsonl"
        found = verify_data(arguments, file, workers=1)
        assert {problem["image"] for problem in found["problems"]} == {
            *("004.png", "007.png", "011.png")
        }
        summary = json.loads((tmp_path / "made" / "list.json").read_text())
        assert summary == {key: value for key, value in found.items() if key != "problems"}
        parts = [summary["train"], summary["held_out"]]
        assert sum(part["images"] for part in parts) == 30
        assert sum(part["usable_captions"] for part in parts) == 27
        assert sum(part["unusable_images"] for part in parts) == 2
        assert sum(part["empty_captions"] for part in parts) == 1
        texts = [json.loads(line)["caption"] for line in (faulty / "metadata.jsonl").open()]
        tokens = make_tokenizer()(texts, add_special_tokens=False)["input_ids"]
        lengths = [2 + len(ids) for ids in tokens]
        assert max(part["caption_tokens"]["longest"] for part in parts) == max(lengths) > 11
        cut = sum(length > 11 for length in lengths)
        assert sum(part["cut_captions"] for part in parts) == cut > 0
        repeated = sum(part["duplicate_images"] for part in parts)
        assert repeated + summary["held_out_images_in_train"] == 1

        arguments = recipe(
            *(backbone_folders, faulty, tmp_path / "run"),
            *("data.max_text_tokens=11", "data.holdout=0.5", f"data.quarantine={file}"),
        )
        processor = HiveProcessor.from_backbones(arguments.model.vision, arguments.model.language)
        data = load_run_data(arguments.data, processor)
        assert len(data.train) + len(data.held_out) == 27
        every = [
            d[row]["bad_samples"] for d in (data.train, data.held_out) for row in range(len(d))
        ]
        assert every == [[]] * 27
