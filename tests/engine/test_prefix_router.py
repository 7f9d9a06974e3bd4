"""Which engine gets which prompt."""

import random

import pytest

from distkv.engine import prefix_router
from distkv.engine.prefix_router import PrefixRouter, prefix_keys

IDLE = {"a": 0.0, "b": 0.0, "c": 0.0}


def prompt(seed: int, length: int = 64) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


def test_keys_stand_for_all_tokens_before_and_for_the_tenant() -> None:
    tokens = prompt(0, 65)
    keys = prefix_keys(tokens, 16, None)
    assert len(keys) == 4 and len(prefix_keys(tokens[:64], 16, None)) == 3, "the last token is computed in any case"
    assert prefix_keys([*tokens[:40], 5, *tokens[41:]], 16, None)[:2] == keys[:2]
    assert not set(prefix_keys([5, *tokens[1:]], 16, None)) & set(keys)
    assert not set(prefix_keys(tokens, 16, "salt")) & set(keys)


def test_new_beginnings_are_spread_and_known_ones_stay() -> None:
    router = PrefixRouter()
    beginnings = [prompt(seed, 160) for seed in range(9)]
    first = [router.choose(prefix_keys(one, 16, None), IDLE) for one in beginnings]
    assert sorted(first) == sorted("abc" * 3)
    order = random.Random(3).choices(range(9), k=100)
    for number, index in enumerate(order):
        keys = prefix_keys(beginnings[index] + prompt(100 + number, 20), 16, None)
        assert router.choose(keys, IDLE) == first[index]


def test_a_beginning_is_worth_as_much_as_free_slots() -> None:
    router = PrefixRouter()
    whole, half = prompt(1, 161), prompt(1, 81) + prompt(2, 80)
    assert router.choose(prefix_keys(whole, 16, None), IDLE) == "a"
    for load, stays in (0.9, True), (1.1, False):
        loads = {"a": load, "b": 0.0}
        assert (PrefixRouter.choose(known(router), prefix_keys(whole, 16, None), loads) == "a") == stays
    for load, stays in (0.4, True), (0.6, False):
        loads = {"a": load, "b": 0.0}
        assert (PrefixRouter.choose(known(router), prefix_keys(half, 16, None), loads) == "a") == stays


def known(router: PrefixRouter) -> PrefixRouter:
    """A copy, which learns nothing from being asked."""
    copy = PrefixRouter()
    copy._known.update({key: dict(engines) for key, engines in router._known.items()})
    copy._num_keys.update(router._num_keys)
    return copy


def test_an_engine_that_ended_knows_nothing() -> None:
    router = PrefixRouter()
    keys = prefix_keys(prompt(1), 16, None)
    assert router.choose(keys, {"b": 0.0}) == "b"
    assert router.choose(keys, IDLE) == "b"
    router.forget("b")
    router.forget("b")
    assert router.choose(keys, IDLE) == "a"
    assert router._num_keys == {"a": 3}


def test_short_prompts_go_where_there_is_room() -> None:
    router = PrefixRouter()
    assert router.choose([], {"a": 0.5, "b": 0.25}) == "b"


def test_the_oldest_is_forgotten_and_ends_before_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_router, "MOST_KEYS", 6)
    router = PrefixRouter()
    first, second = (prefix_keys(prompt(seed, 65), 16, None) for seed in (1, 2))
    assert (router.choose(first, IDLE), router.choose(second, {"b": 0.0})) == ("a", "b")
    assert set(router._known) == {*first[:2], *second}
    assert router._num_keys == {"a": 2, "b": 4}
