"""The checkout in which commands are run."""

from __future__ import annotations

import pytest

from tests.support.command_checkout import CommandCheckout


@pytest.fixture
def bare(tmp_path, repository) -> CommandCheckout:
    """A fresh clone, more or less."""
    return CommandCheckout(tmp_path / "a checkout", repository)
