"""The example of docs/ray_data.md, as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from support.processes import ROOT
from support.servers import save_talker

ROWS = 20
START = "import ray; ray.init(address='local', num_cpus=4, include_dashboard=False)\n"


@pytest.mark.slow
def test_the_example_answers_each_row_once(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ray_data.md").read_text(), re.DOTALL)
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers"
    questions.write_text("".join(json.dumps({"id": i, "prompt": f"number {i}"}) + "\n" for i in range(ROWS)))
    script = tmp_path / "answer.py"
    script.write_text(START + code)
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(save_talker(tmp_path / "model")), str(questions), str(answers)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    found = pandas.read_parquet(answers)
    assert sorted(found["id"]) == list(range(ROWS)) and found["answer"].map(len).all()
