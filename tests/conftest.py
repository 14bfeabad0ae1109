# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: poisoned memory, a fixed seed, three amounts of Hypothesis."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {
    "deadline": None,
    # The same examples on every run; HYPOTHESIS_PROFILE=explore looks for new ones.
    "derandomize": os.environ.get("HYPOTHESIS_PROFILE") != "explore",
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default", max_examples=60, **_COMMON)
settings.register_profile("heavy", max_examples=300, **_COMMON)
settings.register_profile("explore", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def poison():
    """Memory nobody has written reads as NaN, so a result that was forgotten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
