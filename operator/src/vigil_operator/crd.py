"""The CustomResourceDefinition, made of the typed spec and status: `python -m vigil_operator.crd [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from vigil_operator.spec import GROUP, KIND, NAME_AT_MOST, NAME_PATTERN, PLURAL, VERSION, Spec
from vigil_operator.status import Status

FILE = Path(__file__).with_name("crd.yaml")
HEADER = "# Made by `python -m vigil_operator.crd` of spec.py and status.py: change those.\n"
# An object's schema that any object fits.
_OPEN = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_RULES = "x-kubernetes-validations"
_DROPPED = ("title", "additionalProperties", "$defs")


def structural(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema as Kubernetes takes it: no references, no titles, nothing that may be null."""
    node = _resolved(schema, definitions)
    if node.get("x-kubernetes-preserve-unknown-fields"):
        return {**_OPEN, **{key: value for key, value in node.items() if key in ("description", "default")}}
    for bound, exclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in node:
            node |= {exclusive: node[bound], bound: True}
    if "const" in node:
        node["enum"] = [node.pop("const")]
    values = node.get("additionalProperties")
    node = {key: value for key, value in node.items() if key not in _DROPPED}
    if isinstance(values, dict):
        node["additionalProperties"] = structural(values, definitions)
    if "properties" in node:
        node["properties"] = {name: structural(part, definitions) for name, part in node["properties"].items()}
        # Defaults make required what the API server fills in; nothing else is asked for.
        required = [name for name in node.pop("required", ()) if "default" not in node["properties"][name]]
        node |= {"required": required} if required else {}
        if "default" in node:
            # The API server fills in the defaults of what is inside.
            node["default"] = {}
    if "items" in node:
        node["items"] = structural(node["items"], definitions)
    if node.get("type") == "integer":
        node["format"] = "int64"
    return node


def _resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Without references and choices between something and nothing; absent says nothing."""
    node = dict(schema)
    if "$ref" in node:
        node = {**definitions[node.pop("$ref").rpartition("/")[2]], **node}
    if "anyOf" in node:
        (kept,) = [option for option in node.pop("anyOf") if option.get("type") != "null"]
        kept = _resolved(kept, definitions)
        rules = [*kept.get(_RULES, ()), *node.get(_RULES, ())]
        node = {**kept, **node, **({_RULES: rules} if rules else {})}
    if "default" in node and node["default"] is None:
        del node["default"]
    return node


def build_crd() -> dict[str, Any]:
    """The whole definition."""
    spec = Spec.model_json_schema(by_alias=True)
    status = Status.model_json_schema(by_alias=True, mode="serialization")
    schemas = {
        "spec": structural(spec, spec.get("$defs", {})),
        "status": structural(status, status.get("$defs", {})),
    }
    # Everything in the status is written by the operator, which knows what it writes.
    _optional(schemas["status"])
    columns = [
        ("Phase", "string", ".status.phase", "Where the rollout is"),
        ("Live", "integer", ".status.live.version", "The version whose verdicts count"),
        ("Candidate", "integer", ".status.candidate.version", "The version that may become live"),
        ("Compared", "integer", ".status.shadow.frames", "Frames that both judged"),
        ("Flips", "integer", ".status.shadow.flips", "Frames with another label"),
        ("Ready", "string", '.status.conditions[?(@.type=="Ready")].status', "Whether live serves"),
        ("Age", "date", ".metadata.creationTimestamp", "Since when the resource exists"),
    ]
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {
            "openAPIV3Schema": {
                "type": "object",
                "description": "A model in the cluster: which published version is asked for, and how it becomes live.",
                "required": ["spec"],
                "properties": {
                    "apiVersion": {"type": "string"},
                    "kind": {"type": "string"},
                    "metadata": {
                        "type": "object",
                        "properties": {"name": {"type": "string", "maxLength": NAME_AT_MOST, "pattern": NAME_PATTERN}},
                    },
                    **schemas,
                },
            }
        },
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path, "description": text} for name, kind, path, text in columns
        ],
        "selectableFields": [{"jsonPath": ".spec.source.model"}],
    }
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": KIND.lower(),
        "shortNames": ["am"],
        "categories": ["vigil"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def _optional(node: dict[str, Any]) -> None:
    node.pop("required", None)
    node.pop("default", None)
    for part in node.get("properties", {}).values():
        _optional(part)
    if isinstance(node.get("items"), dict):
        items = node["items"]
        _optional(items)
        # A list map's key must be there.
        if keys := node.get("x-kubernetes-list-map-keys"):
            items["required"] = keys


def render() -> str:
    """The YAML text."""
    return HEADER + yaml.safe_dump(build_crd(), sort_keys=False, width=120)


def main() -> None:
    """Write the file, or with --check fail where it is not up to date."""
    if "--check" in sys.argv[1:]:
        if not FILE.exists() or FILE.read_text() != render():
            sys.exit(f"{FILE} is not up to date: run `python -m vigil_operator.crd`")
        return
    FILE.write_text(render())


if __name__ == "__main__":
    main()
