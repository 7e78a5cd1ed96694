"""The one line that names the nearest valid name."""

from hive_vision.naming import unknown_name


def test_nearest() -> None:
    text = unknown_name("recipe key", "sead", ["output", "seed"])
    assert text == "unknown recipe key 'sead'; did you mean 'seed'?"


def test_all_in_order_when_none_is_near() -> None:
    text = unknown_name("command", "xyz", iter(["pretrain", "demo"]))
    assert text == "unknown command 'xyz'; allowed are demo, pretrain"
