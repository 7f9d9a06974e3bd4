"""All ways to lay a model over the GPUs of some nodes, the fastest first."""

from collections.abc import Iterator
from dataclasses import replace

from distkv.errors import ConfigError
from distkv.planner.plan import Plan, make_plan
from distkv.planner.request import PlanRequest


def find_layouts(request: PlanRequest, nodes: int) -> list[Plan]:
    """Plans for each split of all GPUs of so many of the request's nodes into stages, tensor-parallel ranks and context
    groups that the model and the nodes allow: those first in which most requests run, and of these those of the
    shortest steps; of equal ones those of the fewest stages and the smallest groups. The request itself is of one rank.
    """
    plans = [make_plan(one) for one in _layouts(request, nodes)]

    def place(plan: Plan) -> tuple[float, ...]:
        seconds = float("inf") if plan.decode is None else plan.decode.seconds
        layout = plan.request.layout
        return -plan.fit.running, seconds, layout.pipeline_parallel_size, layout.decode_context_parallel_size

    return sorted(plans, key=place)


def _layouts(request: PlanRequest, nodes: int) -> Iterator[PlanRequest]:
    size = nodes * request.node.gpus
    for stages in _divisors(size):
        for group in _divisors(size // stages):
            try:
                yield replace(
                    request,
                    nodes=nodes,
                    tensor_parallel_size=size // stages,
                    pipeline_parallel_size=stages,
                    decode_context_parallel_size=group,
                )
            except ConfigError:  # that the model cannot be cut into, or the nodes
                continue


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
