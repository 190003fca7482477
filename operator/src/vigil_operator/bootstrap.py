"""Wires the operator: every client and clock enters here."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import kopf
from aiohttp import web
from vigil_common.errors import Unavailable
from vigil_common.grpc.security import connect
from vigil_common.logging import get_logger
from vigil_common.streams.redis import RedisStreams

from vigil_operator.cluster import Api, KubernetesNotes
from vigil_operator.config import names
from vigil_operator.handlers import Loops, register
from vigil_operator.leading import Leadership
from vigil_operator.reconcile import Reconciler
from vigil_operator.remote import GrpcRegistry, GrpcReports
from vigil_operator.spec import GROUP, KIND, VERSION
from vigil_operator.workers import KubernetesWorkers

if TYPE_CHECKING:
    from vigil_common.streams.ports import RoutingTable

    from vigil_operator.config import Settings

RETRY_S = 1.0

log = get_logger()


class _NoDiffs(kopf.DiffBaseStorage):
    """No handler asks what has changed: nothing is compared, and nothing kept for it on the resources."""

    def build(self, **_: Any) -> dict[str, Any]:  # type: ignore[override]
        """Nothing of a resource's state."""
        return {}

    def fetch(self, **_: Any) -> None:
        """No earlier state."""

    def store(self, **_: Any) -> None:
        """Nothing is kept."""


def kopf_settings() -> kopf.OperatorSettings:
    """Where kopf keeps its own state, and what it must not do."""
    settings = kopf.OperatorSettings()
    # Who leads is settled before kopf starts; see `leading`.
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.persistence.finalizer = f"operator.{GROUP}/finalizer"
    # The status is the operator's own, and its schema is closed.
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=f"operator.{GROUP}", v1=False)
    settings.persistence.diffbase_storage = _NoDiffs()
    settings.networking.error_backoffs = (0.2, 0.5, 1, 2)
    settings.networking.request_timeout = 30
    settings.queueing.error_delays = (0.2, 1, 2, 5, 10)
    settings.queueing.exit_timeout = 2
    settings.watching.server_timeout = 300
    settings.background.cancellation_polling = 1
    return settings


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Look after AnomalyModels until stopped. What was under way then, the next operator goes on with."""
    own = kopf_settings()
    streams = await RedisStreams.connect(settings.redis_url, security=settings)
    ready = asyncio.Event()
    async with (
        Api.connect(own) as api,
        # Kopf closes the session that it is given.
        Api.connect(own) as aside,
        connect(settings.storage_address, settings) as storage,
        connect(settings.shadow_address, settings) as shadow,
    ):
        web_server = await _probes(settings.http_bind_port, ready)
        leadership = Leadership(
            aside,
            namespace=settings.operator_namespace or "default",
            name=settings.operator_name,
            holder=settings.operator_pod or f"{socket.gethostname()}/{os.getpid()}",
            watched=names(settings.watch_namespaces),
        )
        try:
            if await leadership.take(stop):
                keeping = asyncio.create_task(leadership.keep(stop))
                try:
                    registry, reports = GrpcRegistry(storage), GrpcReports(shadow)
                    routing = streams.routing
                    await _lead(settings, own, api, registry, reports=reports, routing=routing, stop=stop, ready=ready)
                finally:
                    stop.set()
                    await keeping
        finally:
            await leadership.let_go()
            if web_server is not None:
                await web_server.cleanup()
            await streams.close()
    log.info("drained")


async def _lead(
    settings: Settings,
    own: kopf.OperatorSettings,
    api: Api,
    registry: GrpcRegistry,
    *,
    reports: GrpcReports,
    routing: RoutingTable,
    stop: asyncio.Event,
    ready: asyncio.Event,
) -> None:
    spaces = names(settings.watch_namespaces)
    workers = KubernetesWorkers(api, settings.workers(), settings)
    notes = KubernetesNotes(api)
    reconciler = Reconciler(
        workers=workers, notes=notes, registry=registry, routing=routing, reports=reports, namespaces=spaces
    )
    loops = Loops(reconciler, workers, notes, routing, lambda: datetime.now(UTC))
    # The registry wakes the loops, whose work asks it.
    registry.changed = loops.wake_models
    if not await _seen(api, workers, loops, spaces, stop):
        return
    following = asyncio.create_task(registry.follow(stop))
    try:
        await _run(register(loops, workers), own, api, spaces, stop=stop, ready=ready)
    finally:
        stop.set()
        await following


async def _seen(
    api: Api, workers: KubernetesWorkers, loops: Loops, spaces: tuple[str, ...], stop: asyncio.Event
) -> bool:
    """See everything once, so that nothing looks missing that was not seen yet; False where stopped before."""
    places: tuple[str | None, ...] = spaces or (None,)
    while not stop.is_set():
        try:
            await workers.load(places)
            for place in places:
                for body in await api.list(f"{GROUP}/{VERSION}", KIND, place):
                    loops.claim(body)
        except Unavailable as error:
            log.warning("cluster_away", detail=error.message)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), RETRY_S)
        else:
            return True
    return False


async def _run(
    handlers: kopf.OperatorRegistry,
    settings: kopf.OperatorSettings,
    api: Api,
    namespaces: tuple[str, ...],
    *,
    stop: asyncio.Event,
    ready: asyncio.Event,
) -> None:
    @kopf.on.login(registry=handlers)
    def login(**_: Any) -> kopf.AiohttpSession:
        return kopf.AiohttpSession(server=api.server, aiohttp_session=api.session)

    started = asyncio.Event()
    operator = asyncio.create_task(
        kopf.operator(
            registry=handlers,
            settings=settings,
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
            stop_flag=stop,
            ready_flag=started,
        )
    )
    starting = asyncio.create_task(started.wait())
    await asyncio.wait((operator, starting), return_when=asyncio.FIRST_COMPLETED)
    starting.cancel()
    # kopf has put its own handlers in place of ours.
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if not operator.done():
        ready.set()
        log.info("ready", namespaces=list(namespaces) or "all")
    await operator


async def _probes(port: int, ready: asyncio.Event) -> web.AppRunner | None:
    """/healthz while the loop turns, /readyz once everything was seen."""
    if not port:
        return None

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok" if ready.is_set() else "starting", status=200 if ready.is_set() else 503)

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", port).start()  # noqa: S104 - the kubelet comes from outside
    return runner
