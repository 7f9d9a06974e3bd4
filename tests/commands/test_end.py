"""SIGTERM ends a process in good order."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.processes import ROOT
from support.servers import save_talker

from distkv import LLM, ConfigError, SamplingParams, exit_on_sigterm
from distkv.frontend.session import Session


def test_sigterm_leaves_with_blocks_and_comes_through_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    left = []
    with exit_on_sigterm():
        with pytest.raises(SystemExit) as end:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            finally:
                left.append(signal.getsignal(signal.SIGTERM))
        assert end.value.code == 143 and left == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_cannot_have_it() -> None:
    def enter() -> None:
        try:
            with exit_on_sigterm():
                pass
        except ConfigError as error:
            errors.append(str(error))

    errors: list[str] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "main one" in errors[0]


def test_a_chat_that_is_ended_goes_on_where_it_stood(tmp_path: Path) -> None:
    """Its pages were on the host alone."""
    model, cache = save_talker(tmp_path / "model"), tmp_path / "cache"
    sizes = dict.fromkeys(("device_kv_bytes", "host_kv_bytes", "disk_kv_bytes"), "8MiB")
    flags = [f"--{name.replace('_', '-')}={size}" for name, size in sizes.items()]
    flags += [f"--model={model}", f"--cache-dir={cache}", "--page-size=16", "--disk-write-policy=idle"]
    command = [sys.executable, "-m", "distkv", "chat", *flags, "--session=trip", "--max-tokens=1900", "--seed=6"]
    (tmp_path / "said").write_text("Let us plan a trip to Peru, and say nothing of the rain.\n")
    with (
        (tmp_path / "said").open() as stdin,
        subprocess.Popen(command, cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        process.stdout.read(100)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 143 and b"Traceback" not in said, said
    with Session(cache, "trip") as session:
        question, answer = session.messages
    assert len(answer["token_ids"]) > 48
    with LLM(model, page_size=16, cache_dir=cache, **sizes) as llm:  # type: ignore[arg-type]
        more = [{"role": "user", "content": "And if it rains?"}]
        [output] = llm.chat(more, SamplingParams(max_tokens=1), session="trip", use_tqdm=False)
        so_far = len(llm.tokenizer.encode_chat([question])) + len(answer["token_ids"])
        assert output.num_cached_tokens >= so_far - so_far % 16 > 64
