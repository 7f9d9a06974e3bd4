"""Each option is explained once, below its field, and `help()` shows it."""

import inspect
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
from support.processes import ROOT

from distkv import EngineConfig, SamplingParams
from distkv.option_help import explained, option_help


@pytest.mark.parametrize("options", [EngineConfig, SamplingParams])
def test_every_field_has_help_and_help_shows_it(options: type) -> None:
    names = list(inspect.signature(options).parameters)
    texts = option_help(options)
    assert list(texts) == names
    doc = " ".join((options.__doc__ or "").split())
    for name, text in texts.items():
        first, _, more = text.partition("\n")
        assert 10 < len(first) < 90 and first.endswith("."), "one line, for the command line"
        assert not more or more.startswith("\n"), f"{name}: an empty line follows the first"
        assert f" {name}: {' '.join(text.split())}" in doc


@explained
@dataclass
class Oven:
    """How a cake is baked."""

    degrees: int
    """Heat.

    In Celsius.
    """
    minutes: int = 30
    """Time."""
    unexplained: str = ""


def test_help_is_the_text_below_the_field() -> None:
    assert option_help(Oven) == {"degrees": "Heat.\n\nIn Celsius.", "minutes": "Time."}
    assert Oven.__doc__ == "How a cake is baked.\n\nAttributes:\n    degrees: Heat. In Celsius.\n    minutes: Time."
    assert [field.name for field in fields(Oven)] == ["degrees", "minutes", "unexplained"]


def test_a_class_without_source_has_no_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_source(module: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", no_source)
    assert option_help(Oven) == {}
    doc = Oven.__doc__
    assert explained(Oven).__doc__ == doc, "which it keeps"


def test_python_without_docstrings_has_the_help() -> None:
    """And not what msgspec says of its base class."""
    code = "import distkv; print(distkv.SamplingParams.__doc__); print(distkv.EngineConfig.__doc__)"
    ended = subprocess.run([sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == f"{SamplingParams.__doc__}\n{EngineConfig.__doc__}\n"
    assert ended.stdout.startswith("Sampling parameters of one request; ")
