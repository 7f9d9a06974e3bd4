"""The body of `POST /plan`."""

from typing import Annotated

from pydantic import Field

from distkv.server.schemas.body import Body

Text = Annotated[str, Field(max_length=300)]
Amount = Annotated[int | Text, Field(union_mode="left_to_right")]
"""A whole number, or a text such as "128k" or "512GiB"."""


class PlanBody(Body):
    """A `PlanRequest` whose model and GPU are named, and whose node is told as `parse_node` takes it. All other fields
    mean the same there, which has the defaults."""

    model: Text
    gpu: Text
    disk_bandwidth: Amount | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    decode_context_parallel_size: int | None = None
    cpu_attention: float | Text | None = Field(None, union_mode="left_to_right")
    nodes: int | None = None
    node: Text | None = None
    dtype: Text | None = None
    kv_cache_dtype: Text | None = None
    attention_policy: Text | None = None
    context: Amount | None = None
    concurrency: int | None = None
    device_kv_bytes: Amount | None = None
    host_kv_bytes: Amount | None = None
    disk_kv_bytes: Amount | None = None
    page_size: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
