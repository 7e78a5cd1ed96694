import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_vision.folders import (
    BrokenFolderError,
    check_folder,
    check_keys,
    flatten,
    read_json,
    read_manifest,
    seal,
    write_json,
    written_aside,
)


@pytest.fixture
def sealed(tmp_path):
    with written_aside(tmp_path / "thing") as aside:
        (aside / "deep").mkdir()
        (aside / "weights").write_bytes(b"0123456789")
        (aside / "deep" / "more").write_bytes(b"abc")
        seal(aside, "model", method="hive")
    return tmp_path / "thing"


def test_written_aside_appears_whole(tmp_path):
    target = tmp_path / "deep" / "folder"
    with written_aside(target) as aside:
        (aside / "file").write_text("x")
        assert not target.exists()
        assert aside.parent == target.parent
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_what_failed_leaves_nothing_and_keeps_the_old_one(sealed):
    with pytest.raises(FileNotFoundError), written_aside(sealed, replace=True) as aside:
        (aside / "nowhere" / "weights").write_bytes(b"new")
    assert [path.name for path in sealed.parent.iterdir()] == ["thing"]
    assert check_folder(sealed, "model")["method"] == "hive"
    with pytest.raises(ValueError, match="exists already"), written_aside(sealed):
        pass


def test_whole_folder_is_accepted(sealed):
    manifest = check_folder(sealed, "model")
    assert set(manifest["files"]) == {"weights", "deep/more"}
    assert manifest["files"]["weights"]["bytes"] == 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "weights").write_bytes(b"0123"), "has 4 bytes; 10 were written"),
        (lambda folder: (folder / "weights").write_bytes(b"0123456780"), "other bytes"),
        (lambda folder: (folder / "deep" / "more").write_bytes(b"abd"), "other bytes"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"kind'), "cannot be read"),
    ],
)
def test_damage_is_found(sealed, damage, message):
    damage(sealed)
    with pytest.raises(BrokenFolderError, match=message):
        check_folder(sealed, "model")


def test_another_kind_is_refused(sealed):
    with pytest.raises(ValueError, match="is a model folder; expected a checkpoint folder"):
        read_manifest(sealed, "checkpoint")


def test_keys_are_compared_both_ways():
    check_keys(["a", "b"], ["b", "a"], "x")
    with pytest.raises(ValueError, match=r"1 expected keys are missing \(a\), 2 found keys") as e:
        check_keys(["a", "b"], ["b", "c", "d"], "x")
    assert "(c, d)" in str(e.value)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner)))
def test_json_comes_back(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "x.json"
    assert read_json(path) is None
    write_json(path, {"content": content})
    assert read_json(path) == {"content": content}
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}
