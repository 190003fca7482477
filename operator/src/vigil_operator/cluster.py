"""The Kubernetes API as the operator uses it: server-side apply, list, delete and events over one aiohttp session."""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import kopf
from vigil_common.errors import InvalidInput, NotFound, Unavailable

from vigil_operator.observed import QUOTA_EXCEEDED
from vigil_operator.render import MANAGER, Manifest
from vigil_operator.spec import GROUP, KIND, PLURAL, VERSION

if TYPE_CHECKING:
    from types import TracebackType

    from vigil_operator.actions import Emit
    from vigil_operator.observed import Resource
    from vigil_operator.status import Status

TIMEOUT_S = 10.0
# Calls at once; others wait their turn, and their time runs from then on. More only make a busy server answer all of
# them late, some too late, which are then made again.
AT_ONCE = 16
TOKEN_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
# A projected token is replaced long before it ends.
TOKEN_AGE_S = 60.0
MESSAGE_AT_MOST = 1000
_PLURALS = {"NetworkPolicy": "networkpolicies", KIND: PLURAL}
_REFUSALS = ("typed patch", "failed to convert")
# What a ResourceQuota says, in words alone: the rest of its answer is that of any other 403.
_QUOTA = "exceeded quota"
_MERGED = (200, 201, 202)


def path_of(api: str, kind: str, namespace: str | None, name: str = "") -> str:
    """The URL's path of an object, or of all of its kind; None: in every namespace."""
    root = f"/api/{api}" if "/" not in api else f"/apis/{api}"
    plural = _PLURALS.get(kind, f"{kind.lower()}s")
    where = f"/namespaces/{namespace}" if namespace else ""
    return f"{root}{where}/{plural}" + (f"/{name}" if name else "")


class Api:
    """One API server.

    Args:
        session: With credentials.
        server: Its URL.
    """

    def __init__(self, session: aiohttp.ClientSession, server: str) -> None:
        self.session = session
        self.server = server
        self._turns = asyncio.Semaphore(AT_ONCE)

    @classmethod
    def connect(cls, settings: kopf.OperatorSettings) -> Self:
        """By the pod's service account, or KUBECONFIG.

        Raises:
            InvalidInput: NO_CLUSTER.
        """
        inside = TOKEN_FILE.exists() and "KUBERNETES_SERVICE_HOST" in os.environ
        login = kopf.login_with_service_account if inside else kopf.login_with_kubeconfig
        info = login(settings=settings)
        if info is None:
            raise InvalidInput("NO_CLUSTER", "run in a cluster, or set KUBECONFIG")
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=info.as_ssl_context(), limit=0),
            headers={} if inside else info.as_http_headers(),
            middlewares=[_FreshToken()] if inside else [],
        )
        return cls(session, info.server)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.session.close()

    async def request(self, method: str, path: str, *, content_type: str = "", body: Any = None, **query: str) -> Any:
        """One call.

        Raises:
            Unavailable: CLUSTER_UNAVAILABLE: try again.
            NotFound: NOT_IN_CLUSTER.
            InvalidInput: CLUSTER_REFUSED: the same call will be refused again. QUOTA_EXCEEDED: until there is room.
        """
        headers = {"Content-Type": content_type} if content_type else {}
        data = json.dumps(body) if body is not None else None
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        try:
            async with (
                self._turns,
                self.session.request(
                    method, self.server + path, headers=headers, data=data, params=query, timeout=timeout
                ) as answer,
            ):
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable("CLUSTER_UNAVAILABLE", f"the API server does not answer: {error!r}") from error
        if answer.status in _MERGED:
            return json.loads(text) if text else {}
        message = _message(text) or f"HTTP {answer.status}"
        if answer.status == 404:  # noqa: PLR2004
            raise NotFound("NOT_IN_CLUSTER", message)
        # What the schema does not know, or can't read, comes back as 500 from server-side apply.
        broken = answer.status >= 500 and not any(text in message for text in _REFUSALS)  # noqa: PLR2004
        if broken or answer.status in (401, 409, 429):
            raise Unavailable("CLUSTER_UNAVAILABLE", f"the API server could not do it now: {message}")
        reason = QUOTA_EXCEEDED if answer.status == 403 and _QUOTA in message else "CLUSTER_REFUSED"  # noqa: PLR2004
        raise InvalidInput(reason, f"Kubernetes refuses {method} {path}: {message}")

    async def apply(self, manifest: Manifest, *, subresource: str = "") -> Manifest:
        """Server-side apply as the operator; what it no longer names, it gives up."""
        metadata = manifest["metadata"]
        path = path_of(manifest["apiVersion"], manifest["kind"], metadata["namespace"], metadata["name"])
        query = {"fieldManager": MANAGER, "force": "true"}
        end = f"/{subresource}" if subresource else ""
        made: Manifest = await self.request(
            "PATCH", path + end, content_type="application/apply-patch+yaml", body=manifest, **query
        )
        return made

    async def delete(self, api: str, kind: str, namespace: str, name: str) -> None:
        """Delete in the background; nothing where there is none."""
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        try:
            path = path_of(api, kind, namespace, name)
            await self.request("DELETE", path, content_type="application/json", body=options)
        except NotFound:
            return

    async def get(self, api: str, kind: str, namespace: str, name: str) -> Manifest:
        """One object.

        Raises:
            NotFound: NOT_IN_CLUSTER.
        """
        found: Manifest = await self.request("GET", path_of(api, kind, namespace, name))
        return found

    async def list(self, api: str, kind: str, namespace: str | None, selector: str = "") -> list[Manifest]:
        """All objects of a kind."""
        query = {"labelSelector": selector} if selector else {}
        found = await self.request("GET", path_of(api, kind, namespace), **query)
        return [{"apiVersion": api, "kind": kind, **item} for item in found["items"]]

    async def has(self, api: str) -> bool:
        """Whether the server knows an API group's version."""
        try:
            await self.request("GET", f"/apis/{api}")
        except NotFound:
            return False
        return True


class KubernetesNotes:
    """Status and Events of an AnomalyModel."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def write_status(self, resource: Resource, status: Status) -> None:
        """The whole status, by one writer."""
        body = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": KIND,
            "metadata": {"name": resource.name, "namespace": resource.namespace},
            "status": status.to_json(),
        }
        await self._api.apply(body, subresource="status")

    async def emit(self, resource: Resource, event: Emit) -> None:
        """One Event; they come at transitions only, so nothing needs to be counted together."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{resource.name}.{uuid.uuid4().hex[:16]}", "namespace": resource.namespace},
            "involvedObject": {
                "apiVersion": f"{GROUP}/{VERSION}",
                "kind": KIND,
                "name": resource.name,
                "namespace": resource.namespace,
                "uid": resource.uid,
            },
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason,
            "message": event.message[:MESSAGE_AT_MOST],
            "source": {"component": MANAGER},
            "reportingComponent": MANAGER,
            "reportingInstance": MANAGER,
            "action": event.reason,
            "eventTime": now,
            "firstTimestamp": now[:19] + "Z",
            "lastTimestamp": now[:19] + "Z",
            "count": 1,
        }
        path = path_of("v1", "Event", resource.namespace)
        await self._api.request("POST", path, content_type="application/json", body=body)


class _FreshToken:
    """Adds the pod's token to each call, read again every minute."""

    def __init__(self) -> None:
        self._token = ""
        self._read_s = -TOKEN_AGE_S

    async def __call__(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        if time.monotonic() - self._read_s >= TOKEN_AGE_S:
            self._token, self._read_s = TOKEN_FILE.read_text().strip(), time.monotonic()  # noqa: ASYNC240 - in memory
        request.headers["Authorization"] = f"Bearer {self._token}"
        return await handler(request)


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:MESSAGE_AT_MOST]
