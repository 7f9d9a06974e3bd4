"""A small model for batches."""

from pathlib import Path

import pytest
from support.servers import save_talker


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random model that has a tokenizer and a chat template."""
    return save_talker(tmp_path_factory.mktemp("talker"))
