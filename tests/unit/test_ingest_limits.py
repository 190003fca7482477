"""What one client may ask for, and what the others notice of it."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import yaml
from google.rpc import error_details_pb2
from vigil.ingest.v1 import ingest_pb2
from vigil_common.config import SecuritySettings
from vigil_common.errors import QueueFull
from vigil_ingest import limits
from vigil_ingest.limits import ClientLimits, Clients

from tests.fuzz.seeds import images
from tests.support.ingest import serving

if TYPE_CHECKING:
    from pathlib import Path

ACCEPTED = ingest_pb2.WAIT_FOR_ACCEPTED


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def taken(clients: Clients, client: str, count: int, size: int = 10) -> int:
    found, refused = 0, set()
    for _ in range(count):
        try:
            with clients.frame(client, size):
                found += 1
        except QueueFull as error:
            refused.add((error.reason, bool(error.retry_after_s)))
    assert refused <= {("RATE_LIMITED", True)}
    return found


def test_a_client_gets_its_rate_with_a_burst_and_another_its_own() -> None:
    clock = Clock()
    clients = Clients(ClientLimits(frames_per_s=10), clock=clock)
    assert taken(clients, "a", 100) == 21
    assert taken(clients, "b", 5) == 5
    clock.now += 1.0
    assert taken(clients, "a", 100) == 10


def test_bytes_are_limited_like_frames() -> None:
    clock = Clock()
    clients = Clients(ClientLimits(bytes_per_s=1000), clock=clock)
    assert taken(clients, "a", 100, 500) == 5
    clock.now += 10.0
    assert taken(clients, "a", 1, 10_000) == 1  # larger than a burst passes once, and is made up for
    assert taken(clients, "a", 1, 1) == 0


def test_the_delay_that_is_told_is_the_one_after_which_it_passes() -> None:
    clock = Clock()
    clients = Clients(ClientLimits(frames_per_s=2), clock=clock)
    taken(clients, "a", 100)
    with pytest.raises(QueueFull) as caught, clients.frame("a", 1):
        pass
    clock.now += (caught.value.retry_after_s or 0) + 1e-6
    assert taken(clients, "a", 1) == 1


def test_images_on_their_way_are_bounded_over_all_clients() -> None:
    clients = Clients(ClientLimits(held_bytes=100))
    with clients.frame("a", 60), pytest.raises(QueueFull, match="too many images"), clients.frame("b", 60):
        pass
    with clients.frame("b", 60):
        pass


def test_bad_frames_are_answered_at_once_until_there_are_too_many_of_them() -> None:
    clock = Clock()
    assert Clients(ClientLimits(refused_per_s=0), clock=clock).refusal_delay_s("anybody") == 0.0
    clients = Clients(ClientLimits(refused_per_s=10), clock=clock)
    delays = [clients.refusal_delay_s("hostile") for _ in range(40)]
    assert delays[:20] == [0.0] * 20
    assert delays[-1] == pytest.approx(1.9)
    assert clients.refusal_delay_s("polite") == 0.0
    clock.now += 60
    assert clients.refusal_delay_s("hostile") == 0.0


def test_clients_that_were_quiet_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CLIENTS", 10)
    clock = Clock()
    clients = Clients(ClientLimits(frames_per_s=1), clock=clock)
    for number in range(100):
        taken(clients, f"c{number}", 1)
        clock.now += 0.5
    assert len(clients._spent) <= 11


def request(frame_id: str) -> ingest_pb2.StreamRequest:
    frame = ingest_pb2.Frame(frame_id=frame_id, model="cells", image=images()[1])
    return ingest_pb2.StreamRequest(frame=frame, wait_for=ACCEPTED)


async def test_more_streams_than_allowed_are_refused_and_room_comes_back() -> None:
    async with serving(clients=ClientLimits(calls=2)) as served:
        stub: Any = served.stub
        open_streams = []
        for number in range(2):
            call = stub.Stream()
            await call.write(request(f"f{number}"))
            assert (await call.read()).HasField("accepted")
            open_streams.append(call)
        assert await stub.Stream().code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        open_streams[0].cancel()
        deadline = asyncio.get_running_loop().time() + 5
        while asyncio.get_running_loop().time() < deadline:
            again = stub.Stream(iter([request("f3")]))
            try:
                assert [response.HasField("accepted") async for response in again] == [True]
                break
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)
        else:
            pytest.fail("no room came back")


async def test_a_limited_frame_is_told_when_to_come_again_and_its_stream_goes_on(tmp_path: Path) -> None:
    tokens = {name: name * 40 for name in "ab"}
    path = tmp_path / "tokens.yaml"
    entries = [
        {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), "roles": ["stream"]}
        for name, token in tokens.items()
    ]
    path.write_text(yaml.safe_dump({"tokens": entries}))
    async with serving(clients=ClientLimits(frames_per_s=0.5), security=SecuritySettings(tokens_file=path)) as served:
        stub: Any = served.stub
        for name, token in tokens.items():
            call = stub.Stream(
                iter([request(f"{name}{number}") for number in range(4)]),
                metadata=(("authorization", f"Bearer {token}"),),
            )
            answers = [response async for response in call]
            limited = [answer for answer in answers if answer.HasField("error")]
            assert (len(answers), len(limited)) == (4, 2)
            info, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            assert limited[0].error.details[0].Unpack(info)
            assert limited[0].error.details[1].Unpack(delay)
            assert info.reason == "RATE_LIMITED"
            assert delay.retry_delay.ToMilliseconds() > 0
