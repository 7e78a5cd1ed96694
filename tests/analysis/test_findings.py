"""What was found is a value: made once, read by figures, tables and sentences."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from tests.reporting.planted import findings


def test_findings_stay_as_they_are() -> None:
    found = findings()
    for part, name in ((found, "flows"), (found.shown[0], "seen"), (found.numbers["hive"], "mass")):
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, None)
    assert found.shown[0].gradients.keys() == found.flows.keys() == found.numbers.keys()
    assert np.array_equal(found.flows["hive"].norms, findings().flows["hive"].norms)
