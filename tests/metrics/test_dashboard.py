"""The dashboard asks for what is exported and for nothing else."""

import json
import re
from typing import Any

import pytest

from distkv.commands.main import main
from distkv.metrics.catalogue import CATALOGUE, PREFIX, Metric
from distkv.metrics.dashboard import dashboard

NAME = re.compile(rf"{PREFIX}(\w+)")


def exported() -> dict[str, Metric]:
    """Every metric under the names that its samples have."""
    found = {}
    for metric in CATALOGUE:
        if metric.kind == "histogram":
            found |= {f"{metric.name}_{ending}": metric for ending in ("bucket", "sum", "count")}
        else:
            found[metric.name + "_total" * (metric.kind == "counter")] = metric
    return found


def expressions(panels: list[dict[str, Any]]) -> list[str]:
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_every_expression_names_an_exported_metric() -> None:
    board, names = json.loads(dashboard()), exported()
    found = expressions(board["panels"])
    assert len(found) > 20
    for expression in found:
        used = NAME.findall(expression)
        assert used and set(used) <= names.keys(), expression
        labels = {"model_name", "le"}.union(*(names[one].labels for one in used))
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            assert set(grouped.split(", ")) <= labels, expression
        is_counted = {name for name in used if names[name].kind != "gauge"}
        assert bool(is_counted) == bool(re.search(r"\b(rate|increase)\(", expression)), expression
    for variable in board["templating"]["list"]:
        assert set(NAME.findall(str(variable))) <= names.keys()


def test_every_metric_has_a_place_in_it() -> None:
    used = {name for one in expressions(json.loads(dashboard())["panels"]) for name in NAME.findall(one)}
    names = exported()
    missing = {metric.name for metric in CATALOGUE} - {names[name].name for name in used}
    assert missing == {"kv_offload_total_time"}, "the routes have it"


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in json.loads(dashboard())["panels"]]
    cells = [(place["x"] + x, place["y"] + y) for place in places for x in range(place["w"]) for y in range(place["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_the_command_prints_it(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["distkv", "metrics", "dashboard"])
    main()
    assert json.loads(capfd.readouterr().out)["title"] == "distkv"
