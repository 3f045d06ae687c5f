"""What the property tests share."""

from __future__ import annotations

import pytest


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    """Run a test with so few ``examples``, and once more, slowly, with many."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])
