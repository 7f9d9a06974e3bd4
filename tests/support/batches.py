"""Batch files, and `distkv batch` in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.processes import ROOT

FLAGS = ("--num-threads", "1", "--device-kv-bytes", "16MiB", "--page-size", "16")


def line(custom_id: str, url: str = "/v1/chat/completions", method: str = "POST", **body: Any) -> dict[str, Any]:
    """A line of an input; a chat unless it says what else to answer."""
    if url == "/v1/chat/completions" and "messages" not in body:
        body["messages"] = [{"role": "user", "content": f"Tell me about {custom_id}."}]
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def write_lines(path: Path, lines: list[Any]) -> Path:
    """An input file."""
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What an output or error file says; nothing where there is none."""
    return [json.loads(one) for one in path.read_bytes().splitlines()] if path.exists() else []


def answers(path: Path) -> dict[str, Any]:
    """What an output answers, by id, without what differs from run to run. Fails when a line is there twice."""
    found: dict[str, Any] = {}
    for one in read_lines(path):
        assert one["custom_id"] not in found
        assert one["error"] is None
        body = one["response"]["body"]
        found[one["custom_id"]] = body.get("choices") or [item["content"] for item in body["output"]]
    return found


def start_batch(model: Path, source: Path, output: Path, *flags: str) -> "subprocess.Popen[str]":
    """Starts the command; it tells on stderr how it goes."""
    command = [sys.executable, "-m", "distkv", "batch", "--model", str(model), "--input", str(source)]
    command += ["--output", str(output), *FLAGS, *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
