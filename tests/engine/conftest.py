"""What the test modules of the engine share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for 2048 tokens."""
    from support.checkpoints import save_llama

    return save_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)[0]
