"""AnomalyModels on one machine: a file each, as the API server keeps them elsewhere.

FOLDER/resources/NAME.json is a resource as commands write it, NAME.status.json what the operator says of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from vigil_common.errors import InvalidInput, NotFound
from vigil_operator.spec import GROUP, KIND, NAME_AT_MOST, NAME_PATTERN, VERSION, Spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pydantic_core import ErrorDetails

NAMESPACE = "local"
# What was last applied, by which the next time knows what is no longer asked for; kubectl keeps the same.
_APPLIED = f"{GROUP}/last-applied"


class ResourceFiles:
    """Resources in a folder; each change replaces a file, so a reader never sees half of one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._folder = folder / "resources"

    def looked_after(self) -> bool:
        """Whether a platform runs in the folder: it holds the lock, see `LocalStack`."""
        try:
            with (self.folder / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def names(self) -> list[str]:
        """Every resource."""
        files = self._folder.glob("*.json")
        return sorted(path.stem for path in files if not path.name.endswith(".status.json"))

    def get(self, name: str) -> dict[str, Any]:
        """A resource with its status.

        Raises:
            NotFound: UNKNOWN_RESOURCE.
        """
        body = self._read(f"{name}.json")
        if body is None:
            raise NotFound("UNKNOWN_RESOURCE", f"there is no AnomalyModel {name} in {self._folder}")
        return {**body, "status": self._read(f"{name}.status.json") or {}}

    def apply(self, text: str) -> dict[str, str]:
        """Take the AnomalyModels of a YAML text in, as `kubectl apply` does: what it never said stays as it is.

        Returns:
            Name to "created", "configured" or "unchanged".

        Raises:
            InvalidInput: RESOURCE_INVALID.
        """
        applied = {}
        try:
            documents = list(yaml.safe_load_all(text))
        except yaml.YAMLError as error:
            raise InvalidInput("RESOURCE_INVALID", f"not YAML: {' '.join(str(error).split())}") from error
        documents = [document for document in documents if document is not None]
        if not documents:
            raise InvalidInput("RESOURCE_INVALID", "there is no AnomalyModel in it")
        for document in documents:
            name, asked = _checked(document)
            old = self._read(f"{name}.json")
            spec = asked
            body = old or {
                "metadata": {
                    "name": name,
                    "namespace": NAMESPACE,
                    "uid": str(uuid.uuid4()),
                    "creationTimestamp": datetime.now(UTC).isoformat(),
                    "annotations": {},
                    "generation": 0,
                }
            }
            annotations = body["metadata"]["annotations"]
            if old is not None:
                before = json.loads(annotations.get(_APPLIED, json.dumps(old["spec"])))
                spec = _merge(old["spec"], _with_removals(before, asked))
                _checked({**document, "spec": spec})
            applied[name] = "created" if old is None else "unchanged"
            if body.get("spec") != spec:
                if old is not None and old["spec"]["source"]["model"] != spec["source"]["model"]:
                    raise InvalidInput("RESOURCE_INVALID", "source.model can't be changed; make another AnomalyModel")
                body["metadata"]["generation"] += 1
                applied[name] = "created" if old is None else "configured"
            annotations[_APPLIED] = json.dumps(asked)
            self._write(f"{name}.json", {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, **body, "spec": spec})
        return applied

    def patch(self, name: str, patch: dict[str, Any]) -> None:
        """Merge a patch into a resource, as `kubectl patch --type=merge` does."""
        body = self.get(name)
        del body["status"]
        merged = _merge(body, patch)
        _checked(merged)
        if merged["spec"] != body["spec"]:
            merged["metadata"]["generation"] += 1
        self._write(f"{name}.json", merged)

    def delete(self, name: str) -> None:
        """Remove a resource; its workers end."""
        self.get(name)
        (self._folder / f"{name}.json").unlink()
        self.drop_status(name)

    def write_status(self, name: str, status: Mapping[str, Any]) -> None:
        """What the operator says."""
        self._write(f"{name}.status.json", status)

    def drop_status(self, name: str) -> None:
        """A new resource of that name begins afresh."""
        (self._folder / f"{name}.status.json").unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self._folder / name).read_text())
        except FileNotFoundError:
            return None
        return found

    def _write(self, name: str, body: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f".{name}.{os.getpid()}"
        part.write_text(json.dumps(body, indent=1))
        part.replace(self._folder / name)


def _checked(document: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(document, dict):
        raise InvalidInput("RESOURCE_INVALID", f"not a resource: {document!r} stands where apiVersion, kind … should")
    try:
        if (document["apiVersion"], document["kind"]) != (f"{GROUP}/{VERSION}", KIND):
            raise InvalidInput("RESOURCE_INVALID", f"only {GROUP}/{VERSION} {KIND} can be applied here")
        for part in ("metadata", "spec"):
            if not isinstance(document[part], dict):
                raise InvalidInput("RESOURCE_INVALID", f"{part} must hold fields, not {document[part]!r}")
        Spec.model_validate(document["spec"])
        name = document["metadata"]["name"]
        if not isinstance(name, str) or len(name) > NAME_AT_MOST or not re.fullmatch(NAME_PATTERN, name):
            raise InvalidInput(
                "RESOURCE_INVALID",
                f"metadata.name {name!r}: up to {NAME_AT_MOST} lower-case letters, digits and dashes",
            )
        return name, dict(document["spec"])
    except ValidationError as error:
        said = "; ".join(f"spec.{'.'.join(map(str, e['loc']))}: {_said(e)}" for e in error.errors())
        raise InvalidInput("RESOURCE_INVALID", said) from error
    except KeyError as error:
        raise InvalidInput("RESOURCE_INVALID", f"not a resource: {error} is missing") from error


def _said(error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such field"
    number = error["type"] == "string_type" and isinstance(error["input"], int)
    return f"{error['msg']}, so put it in quotes" if number else error["msg"]


def _with_removals(before: Any, asked: Any) -> Any:
    """The patch that brings what is asked for, and takes away what was asked for before and is no longer."""
    if not (isinstance(before, dict) and isinstance(asked, dict)):
        return asked
    gone = dict.fromkeys(before.keys() - asked.keys())
    return {**gone, **{key: _with_removals(before.get(key), value) for key, value in asked.items()}}


def _merge(old: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    base = old if isinstance(old, dict) else {}
    kept = {key: value for key, value in base.items() if not (key in patch and patch[key] is None)}
    return {**kept, **{key: _merge(base.get(key), value) for key, value in patch.items() if value is not None}}
