"""`distkv bench stages` on a real cluster: answers are the same, and what stages have waited for is counted."""

import json
from pathlib import Path

import pytest
from support.checkpoints import save_llama
from support.ray_cluster import Cluster
from typer.testing import CliRunner

from distkv.commands.main import app

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_figures_of_two_stages(cluster: Cluster, tmp_path: Path) -> None:
    folder, _ = save_llama(tmp_path / "model", max_position_embeddings=1024)
    figures = tmp_path / "figures.json"
    sizes = ["--requests", "2", "--prompt-tokens", "600", "--new-tokens", "4", "--repeats", "1"]
    where = ["--model", str(folder), "--ray-address", cluster.address, "--json", str(figures)]
    result = CliRunner().invoke(app, ["bench", "stages", *sizes, *where])
    assert result.exit_code == 0, result.exception or result.output
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["stages"], row["work"]) for row in rows] == [
        (stages, work) for stages in (1, 2) for work in ("prompts", "answers")
    ]
    for row in rows[2:]:
        count = row["micro_batches"]["median"]
        assert 0 < row["busy_percent"]["median"] < 100
        assert row["most_percent"]["median"] == pytest.approx(100 * count / (count + 1))
    assert rows[2]["micro_batches"]["median"] > 1
