import logging
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _leave_no_traces() -> Iterator[None]:
    """``main`` sets environment variables and log levels for the rest of its process."""
    environment, level = dict(os.environ), logging.getLogger("hive_vision").level
    yield
    os.environ.clear()
    os.environ.update(environment)
    logging.getLogger("hive_vision").setLevel(level)
