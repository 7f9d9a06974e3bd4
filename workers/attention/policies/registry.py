"""The policies of attention by their names, and the text that users choose one with."""

import ast
from dataclasses import fields
from typing import Any

from distkv.workers.attention.policies.decay import Decay
from distkv.workers.attention.policies.policy import PagePolicy, name_of, snake_case
from distkv.workers.attention.policies.sink_window import SinkWindow
from distkv.workers.attention.policies.top_pages import TopPages
from distkv.workers.errors import ConfigError

FULL = "full"
POLICIES: dict[str, type[Any]] = {snake_case(kind.__name__): kind for kind in (SinkWindow, TopPages, Decay)}


def parse_policy(text: str) -> PagePolicy | None:
    """The policy of a text such as `top_pages(share=0.1)`; None for `full`. Raises ConfigError."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, AttributeError, TypeError, RecursionError, MemoryError):
        raise ConfigError(f"attention_policy is {text!r}; use one of {_known()}") from None
    called, given = (tree.func, tree.keywords) if isinstance(tree, ast.Call) else (tree, [])
    if not isinstance(called, ast.Name) or (called.id != FULL and called.id not in POLICIES):
        raise ConfigError(f"attention_policy is {text!r}, which is none of {_known()}; use one of them")
    if called.id == FULL:
        if called is not tree:
            raise ConfigError(f"attention_policy is {text!r}, and full has no options; use full")
        return None
    if isinstance(tree, ast.Call) and tree.args:
        raise ConfigError(f"attention_policy is {text!r}, with a value that has no name; use {_usage(called.id)}")
    options: dict[str, Any] = {}
    for one in given:
        if one.arg is None or one.arg not in {field.name for field in fields(POLICIES[called.id])}:
            name = one.arg or ast.unparse(one.value)
            raise ConfigError(f"attention_policy is {text!r}, and has no option {name}; use {_usage(called.id)}")
        if one.arg in options:
            raise ConfigError(f"attention_policy is {text!r}, which sets {one.arg} twice; leave one of them out")
        try:
            options[one.arg] = ast.literal_eval(one.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise ConfigError(f"attention_policy is {text!r}; {one.arg} must be a number") from None
    policy: PagePolicy = POLICIES[called.id](**options)
    return policy


def policy_name(text: str) -> str:
    """The one way to write what a text means. Raises ConfigError as `parse_policy` does."""
    policy = parse_policy(text)
    return FULL if policy is None else name_of(policy)


def _known() -> str:
    return ", ".join([FULL, *map(_usage, POLICIES)])


def _usage(name: str) -> str:
    """Its options with what they are unless they are given."""
    return f"{name}({', '.join(one.name for one in fields(POLICIES[name]))})"
