"""Wires the review page."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

from aiohttp import web
from vigil_common.logging import get_logger

from vigil_review.app import create_app
from vigil_review.backend import Backend
from vigil_review.sessions import Sessions

if TYPE_CHECKING:
    from vigil_review.config import Settings

DRAIN_S = 5.0
ROTATION_S = 5.0

log = get_logger()


class _Certificate:
    """The page's certificate, read again when it changes; None where it is served without."""

    def __init__(self, settings: Settings) -> None:
        self._files = (settings.tls_cert_file, settings.tls_key_file)
        self._changed_ns = 0
        self.context: ssl.SSLContext | None = None
        if None not in self._files:
            self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._load()

    def _load(self) -> None:
        cert, key = self._files
        if self.context is None or cert is None or key is None:
            return
        changed_ns = max(cert.stat().st_mtime_ns, key.stat().st_mtime_ns)
        if changed_ns != self._changed_ns:
            # Connections that begin from now on get it.
            self.context.load_cert_chain(cert, key)
            self._changed_ns = changed_ns
            log.info("certificate_loaded", file=str(cert))

    async def follow(self, stop: asyncio.Event) -> None:
        """Read it again when it changes, until stopped."""
        while not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), ROTATION_S)
            try:
                self._load()
            except OSError as error:  # in the middle of a rotation, or a key of another certificate: the last one stays
                log.warning("certificate_unreadable", detail=str(error))


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until stopped."""
    backend = Backend(settings)
    certificate = _Certificate(settings)
    app = create_app(backend, Sessions(settings.session_s), secure=certificate.context is not None)
    # Its own access log would repeat ours.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=DRAIN_S)
    await runner.setup()
    host, _, port = settings.review_bind.rpartition(":")
    site = web.TCPSite(runner, host or None, int(port), ssl_context=certificate.context)
    await site.start()
    log.info("ready", addresses=[f"{address[0]}:{address[1]}" for address in runner.addresses])
    await certificate.follow(stop)
    await runner.cleanup()
    await backend.close()
    log.info("drained")
