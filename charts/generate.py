"""Makes each chart's values.schema.json and the table in its README.md from values.yaml; --check only compares."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

CHARTS = Path(__file__).parent
BEGIN, END = "<!-- values: begin -->", "<!-- values: end -->"
_KEY = re.compile(r"^( *)([A-Za-z][\w./-]*):(?: |$)")
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
# Kubernetes' quantities: a number, and what it is multiplied by. There is no volume of size 0.
_UNIT = "([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"
_QUANTITY = {"type": ["string", "number"], "pattern": rf"^\+?([0-9]+(\.[0-9]*)?|\.[0-9]+){_UNIT}", "minimum": 0}
_QUANTITIES = {"type": "object", "additionalProperties": _QUANTITY}
# What the API server refuses otherwise, by the name that a doc gives as its shape.
_SHAPES: dict[str, dict[str, Any]] = {
    "strings": {"additionalProperties": {"type": "string"}},
    "labels": {
        "additionalProperties": {
            "type": "string",
            "maxLength": 63,
            "pattern": "^([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?$",
        }
    },
    "size": {"pattern": rf"^\+?(0*[1-9][0-9]*(\.[0-9]*)?|0*\.[0-9]*[1-9][0-9]*){_UNIT}"},
    "resources": {
        "additionalProperties": False,
        "properties": {"requests": _QUANTITIES, "limits": _QUANTITIES, "claims": {"type": "array"}},
    },
}


def docs(text: str) -> dict[tuple[str, ...], str]:
    """The "# --" comment of each value, by its path."""
    found: dict[tuple[str, ...], str] = {}
    path: list[tuple[int, str]] = []
    pending = ""
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            pending = stripped[5:]
        elif match := _KEY.match(line):
            indent = len(match[1])
            path = [part for part in path if part[0] < indent] + [(indent, match[2])]
            if pending:
                found[tuple(name for _, name in path)] = pending
            pending = ""
    return found


def split(doc: str) -> tuple[str, dict[str, Any]]:
    """Its sentence, and what its schema says beyond the default's type."""
    start = doc.find(" {")
    if start < 0 or not doc.endswith("}"):
        return doc, {}
    extra = yaml.safe_load(doc[start:])
    shape = _SHAPES[extra.pop("shape")] if "shape" in extra else {}
    return doc[:start], {**shape, **extra}


def schema(value: Any, path: tuple[str, ...], documented: dict[tuple[str, ...], str]) -> dict[str, Any]:
    """A closed schema; a documented mapping is the user's own and stays open."""
    if isinstance(value, dict) and path not in documented:
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: schema(part, (*path, name), documented) for name, part in value.items()},
        }
    if path not in documented:
        raise SystemExit(f"{'.'.join(path)} has no doc")
    text, extra = split(documented[path])
    return {"description": text, "type": _TYPES[type(value)], **extra}


def rows(values: dict[str, Any], documented: dict[tuple[str, ...], str]) -> list[str]:
    """Lines of the table."""
    lines = ["| value | default | what |", "| --- | --- | --- |"]
    for path, doc in documented.items():
        value: Any = values
        for name in path:
            value = value[name]
        text = split(doc)[0].replace("|", "\\|")
        lines.append(f"| `{'.'.join(path)}` | `{json.dumps(value)}` | {text} |")
    return lines


def generate(chart: Path) -> dict[Path, str]:
    """Each generated file with its text."""
    text = (chart / "values.yaml").read_text()
    values, documented = yaml.safe_load(text), docs(text)
    closed = schema(values, (), documented)
    # Helm itself hands these to a chart used as a part of another.
    closed["properties"]["global"] = {"type": "object"}
    readme = (chart / "README.md").read_text()
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    table = "\n".join(rows(values, documented))
    return {
        chart / "values.schema.json": json.dumps(
            {"$schema": "https://json-schema.org/draft-07/schema#", **closed}, indent=2
        )
        + "\n",
        chart / "README.md": f"{before}{BEGIN}\n{table}\n{END}{after}",
    }


def main() -> None:
    """Write, or with --check fail where a file is not up to date."""
    stale = []
    for chart in sorted(path.parent for path in CHARTS.glob("*/Chart.yaml")):
        for path, text in generate(chart).items():
            if path.exists() and path.read_text() == text:
                continue
            stale.append(path)
            if "--check" not in sys.argv[1:]:
                path.write_text(text)
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"not up to date: {', '.join(map(str, stale))}; run python charts/generate.py")


if __name__ == "__main__":
    main()
