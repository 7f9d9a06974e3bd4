"""Plans for engines on the CPU that tests run on."""

from pathlib import Path
from typing import Any

from distkv.planner.hardware import Hardware
from distkv.planner.model_shape import find_model
from distkv.planner.plan import Plan, make_plan
from distkv.planner.request import PlanRequest

CPU = Hardware("a CPU", "made up", 64 * 2**20, 1e10, 1e12, 1e10, 1e10, 1e9, is_cpu=True, is_measured=True)


def plan_on_cpu(folder: Path, **more: Any) -> Plan:
    """For a model folder; `more` are fields of `PlanRequest`."""
    return make_plan(PlanRequest(find_model(folder), CPU, **more))


def planned_bytes(plan: Plan) -> tuple[int, ...]:
    """Of the pages of each tier, as `EngineInfo.tier_bytes` has them."""
    return tuple(tier.num_bytes for tier in plan.fit.tiers)
