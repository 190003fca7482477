"""What the operator asks of other services by gRPC: published versions, comparisons, workers' descriptions."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil.shadow.v1 import shadow_pb2, shadow_pb2_grpc
from vigil.storage.v1 import storage_pb2, storage_pb2_grpc
from vigil_common.errors import Unavailable
from vigil_common.evidence import ReportNumbers
from vigil_common.grpc.security import connect
from vigil_common.logging import get_logger

from vigil_operator.observed import Description, Published, Report, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from vigil_common.config import SecuritySettings

    from vigil_operator.spec import Source

CALL_S = 5.0
DESCRIBE_S = 2.0
# Between two looks at all that is published, and between two special looks for one model, seconds.
POLL_S, MISS_S = 5.0, 1.0

log = get_logger()


def _unavailable(part: str, error: grpc.aio.AioRpcError) -> Unavailable:
    detail = error.details() or error.code().name
    return Unavailable(f"{part.upper()}_UNAVAILABLE", f"{part} does not answer: {detail}", retry_after_s=1.0)


class GrpcRegistry:
    """Published versions, by one look at all of them every few seconds; they never change, so old looks still count.

    Args:
        channel: To storage.

    Attributes:
        changed: Told the models that have other versions than at the look before.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: storage_pb2_grpc.ModelServiceAsyncStub = storage_pb2_grpc.ModelServiceStub(channel)
        self.changed: Callable[[set[str]], None] = lambda _: None
        self._known: dict[str, tuple[Published, ...]] | None = None
        self._missed: dict[str, float] = {}

    async def versions(self, source: Source) -> tuple[Published, ...]:
        """Versions of a model; looked for again where what is asked for is not among them.

        Raises:
            Unavailable: STORAGE_UNAVAILABLE, where what is known does not answer it.
        """
        found = () if self._known is None else self._known.get(source.model, ())
        if resolve(source, found) is not None:
            return found
        now = time.monotonic()
        if self._known is None or now - self._missed.get(source.model, -MISS_S) >= MISS_S:
            self._missed[source.model] = now
            found = (await self._list(source.model)).get(source.model, ())
            if self._known is not None:
                self._known[source.model] = found
        return found

    async def follow(self, stop: asyncio.Event) -> None:
        """Look every few seconds until stopped."""
        while not stop.is_set():
            try:
                fresh = await self._list("")
            except Unavailable as error:
                log.warning("registry_away", detail=error.message)
            else:
                old = self._known or {}
                self._known = fresh
                changed = {model for model in {*old, *fresh} if old.get(model) != fresh.get(model)}
                if changed:
                    self.changed(changed)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), POLL_S)

    async def _list(self, name: str) -> dict[str, tuple[Published, ...]]:
        try:
            response = await self._stub.List(storage_pb2.ListRequest(name=name), timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return {}
            raise _unavailable("storage", error) from error
        found: dict[str, list[Published]] = {}
        for model in response.models:
            version = model.version
            found.setdefault(version.name, []).append(
                Published(version.version, version.digest, deprecated=bool(model.deprecated))
            )
        return {model: tuple(versions) for model, versions in found.items()}


class GrpcReports:
    """Comparisons, from the shadow service."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: shadow_pb2_grpc.ShadowServiceAsyncStub = shadow_pb2_grpc.ShadowServiceStub(channel)

    async def report(self, model: str) -> Report | None:
        """The comparison under way, or the last one.

        Raises:
            Unavailable: SHADOW_UNAVAILABLE.
        """
        try:
            response = await self._stub.GetReport(shadow_pb2.GetReportRequest(model=model), timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise _unavailable("shadow", error) from error
        return report_of(response.report)


def report_of(found: shadow_pb2.Report) -> Report:
    """What the gates need of a report."""
    measured = found.latency.HasField("ratio")
    defaults = ReportNumbers()
    numbers = ReportNumbers(
        frames=found.frames,
        live_anomalous=found.live_anomalous,
        new_alarms=found.new_alarms,
        new_misses=found.new_misses,
        candidate_failed=found.candidate_failed,
        latency_ratio=found.latency.ratio if measured else None,
        latency_ratio_low=found.latency.ratio_low if measured else defaults.latency_ratio_low,
        latency_ratio_high=found.latency.ratio_high if measured else defaults.latency_ratio_high,
        candidate_right=found.reviews.candidate_right,
        live_right=found.reviews.live_right,
    )
    elapsed_s = found.compared_for.ToTimedelta().total_seconds()
    return Report(found.run, numbers, elapsed_s)


async def describe(
    address: str, worker: str, security: SecuritySettings, server_name: str | None = None
) -> Description | None:
    """What a worker says of itself; None while it does not answer.

    Args:
        address: HOST:PORT.
        worker: Its name, for people.
        security: How to connect.
        server_name: What its certificate is issued for, where that is not the address' host.
    """
    async with connect(address, security, server_name=server_name) as channel:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            said = await stub.Describe(inference_pb2.DescribeRequest(), timeout=DESCRIBE_S)
        except grpc.aio.AioRpcError as error:
            log.warning("describe_failed", worker=worker, detail=error.details())
            return None
    return Description(worker, said.model.digest, sum(not sample.passed for sample in said.parity))
