"""hive-vision data, as it is typed."""

import json
from pathlib import Path

import pytest

from hive_vision.cli import main
from tests.cli.helpers import failure
from tests.conftest import write_image_folder
from tests.training.conftest import write_conversations


@pytest.fixture
def overrides(backbone_folders: dict[str, Path], image_folder: Path, tmp_path: Path) -> list[str]:
    """The debug recipe on tiny models and images."""
    return [
        *("debug", "miniature=null", "data.validation=null", f"data.train={image_folder}"),
        f"model.vision={backbone_folders['siglip']}",
        f"model.language={backbone_folders['llama']}",
        f"output={tmp_path / 'run'}",
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["build", "verify", "show", "bench"]),
        (["--help"], ["build", "verify", "show"]),
        (["build"], ["SOURCE", "OUTPUT", "--resize", "--to", "tar", "parquet", "--caption_column"]),
        (["build", "--help"], ["--shard_size", "--workers", "--images", "--split"]),
        (["verify", "--help"], ["quarantine=FILE", "workers=", "debug", "data.quarantine"]),
        (["show", "debug", "--help"], ["samples=", "debug", "[brackets]"]),
        (["bench", "--help"], ["stage=", "seconds=", "device=", "debug"]),
    ],
)
def test_help(capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    main(["data", *argv])
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.startswith("usage: hive-vision data")
    assert [word for word in words if word not in output.out] == []


class TestBuild:
    def test_result_can_be_trained_on(
        self, capsys: pytest.CaptureFixture[str], image_folder: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "built"
        main(["data", "build", str(image_folder), str(output), "to=parquet", "workers=1"])
        text = capsys.readouterr().out
        assert "40 images, 40 captions in 1 shards" in text
        assert f"data.train={output}" in text
        assert json.loads((output / "manifest.json").read_text())["to"] == "parquet"

    def test_other_splits_are_named(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        for split in ("train", "validation"):
            photos = write_image_folder(tmp_path / split, 3)
            target = str(tmp_path / "set" / split)
            main(["data", "build", str(photos), target, "workers=1", "--quiet"])
        capsys.readouterr()
        main(["data", "build", str(tmp_path / "set"), str(tmp_path / "both"), "workers=1"])
        assert "not built: other splits (validation)" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["resize=0"], ["resize is 0"]),
            (["resizee=8"], ["'resizee'", "did you mean 'resize'"]),
            (["to=zip"], ["to", "zip"]),
            (["workers=many"], ["workers", "many"]),
            (["third"], ["SOURCE", "OUTPUT", "third"]),
            (["split=test"], ["no split 'test'"]),
            (["caption_column=text"], ["no column 'text'"]),
        ],
    )
    def test_one_line_for_a_mistake(
        self,
        capsys: pytest.CaptureFixture[str],
        image_folder: Path,
        tmp_path: Path,
        arguments: list[str],
        words: list[str],
    ) -> None:
        output = tmp_path / "built"
        line = failure(capsys, "data", "build", str(image_folder), str(output), *arguments)
        assert [word for word in words if word not in line] == []
        assert list(tmp_path.iterdir()) == []

    def test_output_inside_the_source(
        self, capsys: pytest.CaptureFixture[str], image_folder: Path
    ) -> None:
        inside = str(image_folder / "built")
        assert "inside SOURCE" in failure(capsys, "data", "build", str(image_folder), inside)

    def test_no_such_source(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        missing = str(tmp_path / "missing")
        assert "missing" in failure(capsys, "data", "build", missing, str(tmp_path / "out"))


class TestVerify:
    def test_good_data(
        self, capsys: pytest.CaptureFixture[str], overrides: list[str], tmp_path: Path
    ) -> None:
        main(["data", "verify", *overrides, "workers=1"])
        text = capsys.readouterr().out
        assert "everything can be used" in text
        assert "32 x 32" in text
        assert (tmp_path / "run.quarantine.jsonl").read_text().count("\n") == 1
        assert not (tmp_path / "run").exists()

    def test_bad_samples_are_no_failure(
        self, capsys: pytest.CaptureFixture[str], overrides: list[str], tmp_path: Path
    ) -> None:
        photos = write_image_folder(tmp_path / "photos", 20)
        (photos / "003.png").write_bytes(b"?")
        file = tmp_path / "list.jsonl"
        arguments = [*overrides, f"data.train={photos}", f"quarantine={file}", "workers=2"]
        main(["data", "verify", *arguments])
        text = capsys.readouterr().out
        assert "1 cannot be used:" in text
        assert "003.png: UnidentifiedImageError: cannot identify image" in text
        assert f"data.quarantine={file}" in text
        (line,) = file.read_text().splitlines()[1:]
        assert json.loads(line)["image"] == "003.png"

    @pytest.mark.parametrize("option", ["workers=0", "workers=two"])
    def test_wrong_number(
        self, capsys: pytest.CaptureFixture[str], overrides: list[str], option: str
    ) -> None:
        assert "whole number" in failure(capsys, "data", "verify", *overrides, option)

    def test_unknown_key(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "did you mean 'data.train'" in failure(
            capsys, "data", "verify", "debug", "data.trian=x"
        )


class TestShow:
    def test_learned_tokens_are_marked(
        self, capsys: pytest.CaptureFixture[str], overrides: list[str]
    ) -> None:
        main(["data", "show", *overrides, "samples=3", "method=sa"])
        text = capsys.readouterr().out
        assert text.count("32 x 32 pixels") == 3
        assert text.count("<s> <image> x16 [") == 3
        assert text.count("[</s>]") == 3
        assert "in [brackets]" in text
        assert "\x1b" not in text

    def test_conversations(
        self, capsys: pytest.CaptureFixture[str], backbone_folders: dict[str, Path], tmp_path: Path
    ) -> None:
        chat = write_conversations(tmp_path / "chat")
        models = [
            f"model.vision={backbone_folders['siglip']}",
            f"model.language={backbone_folders['llama']}",
            "model.chat_template=llava",
        ]
        data = [f"data.stage2.train={chat}", "data.stage2.holdout=0.2"]
        main(["data", "show", "vlm-paper", *models, *data, "stage=stage2", "samples=64"])
        text = " ".join(capsys.readouterr().out.split())  # paths of tests are long
        assert "no image" in text
        assert "20 x 16, 20 x 16 pixels" in text
        assert "<image> x16" in text

    def test_wrong_number(self, capsys: pytest.CaptureFixture[str], overrides: list[str]) -> None:
        assert "samples is '-1'" in failure(capsys, "data", "show", *overrides, "samples=-1")


class TestBench:
    def test_says_what_to_do(
        self, capsys: pytest.CaptureFixture[str], overrides: list[str], tmp_path: Path
    ) -> None:
        main(["data", "bench", *overrides, "device=H100", "seconds=1"])
        text = capsys.readouterr().out
        assert "0 (recipe)" in text
        assert "captions a second" in text
        assert "(plan for H100" in text
        assert "The loader is " in text.splitlines()[-1]
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            ("seconds=0", "seconds is '0'"),
            ("stage=stage4", "unknown stage 'stage4'"),
            ("device=H900", "H900"),
            ("method=base", "trains nothing"),
        ],
    )
    def test_one_line_for_a_mistake(
        self, capsys: pytest.CaptureFixture[str], overrides: list[str], option: str, words: str
    ) -> None:
        assert words in failure(capsys, "data", "bench", *overrides, option)


def test_unknown_action(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'verify'" in failure(capsys, "data", "verfy", "debug")
