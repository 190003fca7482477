"""Wires the review page."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from aiohttp import web
from vigil_common.logging import get_logger

from vigil_review.app import create_app
from vigil_review.backend import Backend
from vigil_review.sessions import Sessions

if TYPE_CHECKING:
    import asyncio

    from vigil_review.config import Settings

DRAIN_S = 5.0

log = get_logger()


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
    return context


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until stopped."""
    backend = Backend(settings)
    tls = _tls(settings)
    app = create_app(backend, Sessions(settings.session_s), secure=tls is not None)
    # Its own access log would repeat ours.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=DRAIN_S)
    await runner.setup()
    host, _, port = settings.review_bind.rpartition(":")
    site = web.TCPSite(runner, host or None, int(port), ssl_context=tls)
    await site.start()
    log.info("ready", addresses=[f"{address[0]}:{address[1]}" for address in runner.addresses])
    await stop.wait()
    await runner.cleanup()
    await backend.close()
    log.info("drained")
