"""Makes the extract of KubeRay's schemas that `tests/jobs/kuberay_crds.json` is, which is too large to be kept whole.

    python tests/support/crd_schema.py KUBERAY_CHECKOUT VERSION > tests/jobs/kuberay_crds.json

What the manifests in docs/kubernetes use is kept in full; of all beside it, the names alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

MANIFESTS = Path(__file__).resolve().parents[2] / "docs" / "kubernetes"
KEPT = ("type", "required", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "anyOf")


def pruned(schema: dict[str, Any], used: list[Any]) -> dict[str, Any]:
    """A schema as JSON Schema has it, without descriptions, for values like those in `used`; of others any is valid."""
    kept = {name: schema[name] for name in KEPT if name in schema}
    if "properties" in schema:
        kept["additionalProperties"] = False
        kept["properties"] = {
            name: pruned(one, inner) if (inner := [value[name] for value in used if name in value]) else {}
            for name, one in schema["properties"].items()
        }
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = pruned(
            schema["additionalProperties"], [one for value in used for one in value.values()]
        )
    elif "items" in schema:
        kept["items"] = pruned(schema["items"], [one for value in used for one in value])
    return kept


def main(checkout: str, version: str) -> None:
    """Prints the extract."""
    schemas: dict[str, Any] = {
        "source": f"ray-project/kuberay {version}, helm-chart/kuberay-operator/crds, Apache-2.0; an extract"
    }
    for name in ("rayjob", "rayservice"):
        crd = yaml.safe_load(Path(checkout, f"helm-chart/kuberay-operator/crds/ray.io_{name}s.yaml").read_text())
        [schema] = [one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"] if one["name"] == "v1"]
        schema["properties"]["metadata"] = {"type": "object"}
        schemas[name] = pruned(schema, [yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text())])
    json.dump(schemas, sys.stdout, separators=(",", ":"))


if __name__ == "__main__":
    main(*sys.argv[1:])
