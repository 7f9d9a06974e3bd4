"""What must not happen is counted where it does: the harness itself, on an engine that is made to err."""

from pathlib import Path

import pytest
from reliability.bench import Setting
from reliability.counts import append, read, table
from reliability.driver_process import Hung
from reliability.faults import Fault
from reliability.runner import Runner
from reliability.trial import Trial

PRELUDE = """
import asyncio, subprocess
from distkv import AsyncLLM

generate = AsyncLLM.generate
subprocess.Popen(["sleep", "600"], start_new_session=True)

async def disturbed(self, prompt, params, *, cache_salt=None):
    count = 0
    async for output in generate(self, prompt, params, cache_salt=cache_salt):
        count += 1
        if count == 3 and cache_salt == "wrong":
            output.outputs[0].token_ids[0] += 1
        if count == 3 and cache_salt == "hang":
            await asyncio.sleep(600)
        if count == 3 and cache_salt == "fail":
            raise OSError("something else")
        yield output

AsyncLLM.generate = disturbed
"""


def disturb(trial: Trial) -> None:
    bench = trial.bench_of(Setting(answer_len=32))
    driver = bench.new_driver(prelude=PRELUDE)
    driver.start(bench.model, bench.options)
    bench.adopt(driver)
    greedy = [request for request in bench.requests if not request.params["temperature"]]
    for salt in (None, "wrong", "fail"):
        load = bench.driver.ask(greedy[:1], salt)
        trial.finish(bench, load)
    trial.compare(bench, load, explained="something else")
    load = bench.driver.ask(greedy[:2], "hang")
    driver.limit = 1.0
    with pytest.raises(Hung):
        driver.finish(load)
    driver.limit = 60.0


def test_what_must_not_happen_is_counted(tmp_path: Path) -> None:
    runner = Runner(limit=60.0, leave=2.0)
    record = runner.run(Fault("disturbed", "An engine that errs", 1, disturb), "1")
    [wrong] = record.wrong
    assert "answer 0: token 2 is" in wrong
    assert record.hung == [] and len(record.unexplained) == 1 and len(record.errors) == 1 and record.answers == 4
    [left] = record.leaked
    assert left.endswith("sleep 600")

    def hang(trial: Trial) -> None:
        raise Hung("nothing came")

    hung = runner.run(Fault("hung", "One that hangs", 1, hang), "1")
    assert not record.is_clean and not hung.is_clean
    for one in (record, hung):
        append(tmp_path / "tries", one)
    assert read([tmp_path / "tries", tmp_path / "no such file"]) == [record, hung]
    rows = table([record, hung], {"disturbed": "An engine that errs", "hung": "One that hangs"}).splitlines()
    assert [one.strip() for one in rows[2].split("|")[1:8]] == ["An engine that errs", "1", "4", "1", "1", "1", "0"]
    assert [one.strip() for one in rows[4].split("|")[7:9]] == ["1", "1"]
