"""What a Serve config file may say, and what it is told where that cannot take effect."""

from pathlib import Path
from typing import Any

import pytest

from distkv import ConfigError
from distkv.ray_serve import build_openai_app
from distkv.ray_serve.options import ReplicaOptions


def arguments(model: Path, **changes: Any) -> dict[str, Any]:
    llm = {"model_loading_config": {"model_id": "tiny", "model_source": str(model)}}
    return {"llm_configs": [llm | {name: value for name, value in changes.items() if name != "top"}]} | changes.get(
        "top", {}
    )


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"accelerator_type": "H100"}, "llm_configs.0.accelerator_type would have no effect: ranks take any GPU"),
        ({"lora_config": {}}, "distkv has no adapters"),
        ({"nonsense": 1}, "distkv knows no such field; leave it out"),
        ({"engine_kwargs": {"max_num_seq": 3}}, "did you mean max_num_seqs?"),
        ({"engine_kwargs": {"page_size": 7}}, "page_size"),
        ({"engine_kwargs": {"tensor_parallel_size": 50}}, "tensor_parallel_size|ranks"),
        ({"engine_kwargs": {"ray_address": "auto"}}, "engines run on Serve's cluster"),
        ({"engine_kwargs": {"max_rank_failures": 3}}, "Serve replaces a replica"),
        ({"engine_kwargs": {"trace": "t.json"}}, "several engines would write it"),
        ({"deployment_config": {"ray_actor_options": {"num_gpus": 1}}}, "each rank takes one itself"),
        ({"deployment_config": {"request_router_config": {}}}, "distkv's own to give"),
        (
            {"deployment_config": {"num_replicas": 2, "autoscaling_config": {"max_replicas": 3}}},
            "leave one of them out",
        ),
        ({"top": {"server_kwargs": {"port": 1}}}, "HTTP is Serve's"),
        ({"top": {"server_kwargs": {"max_body": 1}}}, "did you mean max_body_bytes?"),
        ({"top": {"llm_configs": []}}, "llm_configs has 0 models, and an application serves one"),
        ({"top": {"ingress_cls_config": {}}}, "the ingress is distkv's server"),
    ],
)
def test_what_would_have_no_effect_is_refused(tiny_model: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_openai_app(arguments(tiny_model, **changes))


def test_a_model_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        build_openai_app(arguments(tmp_path / "none"))


def test_an_application_has_replicas_without_a_gpu_and_without_the_usual_throttle(tiny_model: Path) -> None:
    application = build_openai_app(
        arguments(tiny_model, engine_kwargs={"max_num_seqs": 8}, deployment_config={"num_replicas": 3})
    )
    ingress = application._bound_deployment
    engines = ingress.init_args[0]._bound_deployment
    assert engines.num_replicas == 3 and engines.max_ongoing_requests == 8 + 1024
    assert engines.ray_actor_options["num_cpus"] == 0 and not engines.ray_actor_options.get("num_gpus")
    assert ingress.max_ongoing_requests > 10_000


@pytest.mark.parametrize("how", [{"replicas": 0}, {"route_prefix": "/chat"}, {"replicas": 1, "route_prefix": "chat"}])
def test_options_of_replicas_are_checked(how: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ReplicaOptions(**how)
