"""Tests that run lmms-eval itself: ``make test-eval``, in an environment of its own."""

import importlib.util

import pytest

MISSING = [name for name in ("lmms_eval", "decord") if importlib.util.find_spec(name) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if MISSING and "tests/harness" in item.path.as_posix():
            reason = f"{' and '.join(MISSING)} not installed; run make test-eval"
            item.add_marker(pytest.mark.skip(reason=reason))
