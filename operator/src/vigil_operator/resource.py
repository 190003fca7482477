"""An AnomalyModel as Kubernetes or a file has it, read into what the plan takes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from vigil_common.logging import get_logger

from vigil_operator.observed import Request, Resource
from vigil_operator.spec import Spec
from vigil_operator.status import Status

if TYPE_CHECKING:
    from collections.abc import Mapping

# What a failed version is not tried again for: it can't have failed by it.
_HARMLESS = {"threshold", "replicas", "autoscaling", "retention", "suspend"}

log = get_logger()


def resource_of(body: Mapping[str, Any]) -> Resource:
    """A resource as the plan takes it.

    Raises:
        ValidationError: The spec makes no sense.
    """
    metadata, spec = body["metadata"], body["spec"]
    tried = {key: value for key, value in spec.items() if key not in _HARMLESS}
    return Resource(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        spec=Spec.model_validate(_without_nulls(spec)),
        request=Request.parse(metadata.get("annotations", {})),
        attempt=hashlib.sha256(json.dumps(tried, sort_keys=True, default=dict).encode()).hexdigest()[:16],
    )


def _without_nulls(spec: Mapping[str, Any]) -> dict[str, Any]:
    """As Kubernetes keeps it: null is as good as absent, and has the default."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in spec.items()
        if value is not None
    }


def status_of(body: Mapping[str, Any]) -> Status:
    """What is remembered; nothing where it can't be read, since the world can be read again."""
    try:
        return Status.model_validate(json.loads(json.dumps(body.get("status") or {}, default=dict)))
    except ValidationError as error:
        log.warning("status_unreadable", resource=body["metadata"]["name"], problems=error.error_count())
        return Status()
