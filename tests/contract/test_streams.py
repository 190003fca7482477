"""What the backbone promises, of the memory fake and of a real Valkey alike."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from redis.crc import key_slot
from redis.exceptions import ClusterError, ReadOnlyError, ResponseError
from vigil_common.config import SecuritySettings
from vigil_common.errors import InvalidInput, Unavailable
from vigil_common.streams import memory, redis_connection, redis_frames
from vigil_common.streams.memory import MemoryStreams
from vigil_common.streams.ports import Admission, Admitted, Candidate, Emission, Live
from vigil_common.streams.redis import RedisStreams
from vigil_common.streams.redis_connection import away, fields_of

from tests.support.link import Link
from tests.support.valkey import ValkeyCluster, ValkeyProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vigil_common.streams.ports import FrameSource

BUDGET = 10_000
IMAGE = b"x" * 1000
M = "cells"
Streams = MemoryStreams | RedisStreams


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    server = ValkeyProcess(tmp_path_factory.mktemp("valkey")).start()
    yield server
    server.stop()


async def admit(streams: Streams, frame_id: str, *, image: bytes = IMAGE, sha: bytes = b"s", to: str = "") -> Admitted:
    return await streams.queue.admit(M, frame_id=frame_id, sha256=sha, header=b"h", image=image, reply_to=to)


def emission(entry_id: str, frame_id: str, outcome: bytes = b"verdict", reply: bytes = b"verdict") -> Emission:
    return Emission(entry_id, frame_id, outcome, reply)


async def judge(streams: Streams, frame_id: str) -> FrameSource:
    """Admit a frame and emit its verdict; answers with the source that it was read from."""
    await admit(streams, frame_id)
    source = streams.source(M, "a")
    (frame,) = await source.read(count=1, block_ms=100)
    await source.emit([emission(frame.entry_id, frame_id)])
    return source


async def test_a_frame_reaches_one_worker_with_its_bytes_untouched(streams: Streams) -> None:
    await admit(streams, "f1", image=bytes(range(256)))
    first, second = streams.source(M, "a"), streams.source(M, "b")
    (frame,) = await first.read(count=10, block_ms=100)
    assert (frame.header, frame.image, frame.deliveries) == (b"h", bytes(range(256)), 1)
    assert await second.read(count=10, block_ms=10) == []


async def test_what_part_of_the_normal_frames_is_kept_goes_with_the_route_and_changes_no_generation(
    streams: Streams,
) -> None:
    assert await streams.routing.kept_fraction(M) is None
    route = await streams.routing.write(M, live=Live(1, "sha256:a"))
    await streams.routing.keep_fraction(M, 0.05)
    assert await streams.routing.kept_fraction(M) == 0.05
    assert await streams.routing.get(M) == route
    await streams.routing.keep_fraction(M, None)
    assert await streams.routing.kept_fraction(M) is None
    await streams.routing.keep_fraction(M, 0.0)
    await streams.routing.remove(M)
    assert await streams.routing.kept_fraction(M) is None


async def test_one_of_two_holders_emits_and_the_other_is_told(streams: Streams) -> None:
    await admit(streams, "f1", to="replica")
    first, second = streams.source(M, "a"), streams.source(M, "b")
    (frame,) = await first.read(count=1, block_ms=100)
    (claimed,) = await second.claim(min_idle_ms=0, count=10)
    assert (claimed.entry_id, claimed.deliveries) == (frame.entry_id, 2)
    assert await second.emit([emission(frame.entry_id, "f1")]) == [True]
    assert await first.emit([emission(frame.entry_id, "f1")]) == [False]
    after, replies = await streams.queue.read_replies(M, "replica", "0", block_ms=100)
    assert replies == [b"verdict"]
    assert await streams.queue.read_replies(M, "replica", after, block_ms=10) == (after, [])
    outcomes = streams.outcomes(M, "s")
    assert len(await outcomes.read(count=10, block_ms=100)) == 1


async def test_what_a_consumer_holds_it_does_not_take_from_itself(streams: Streams) -> None:
    for frame_id in ("f1", "f2", "f3"):
        await admit(streams, frame_id, to="replica")
    first, second = streams.source(M, "a"), streams.source(M, "b")
    frames = await first.read(count=3, block_ms=100)
    held = [frame.entry_id for frame in frames[:2]]
    (lost,) = await first.claim(min_idle_ms=0, count=10, held=held)
    assert (lost.entry_id, lost.deliveries) == (frames[2].entry_id, 2)
    claimed = await second.claim(min_idle_ms=0, count=2)
    assert [(one.entry_id, one.deliveries) for one in claimed] == [(entry_id, 2) for entry_id in held]


async def test_a_consumer_that_is_gone_loses_its_name_and_one_that_holds_a_frame_does_not(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(streams, MemoryStreams):
        pytest.skip("it has no names")
    command = streams.queue._connection.command

    async def names() -> set[bytes]:
        return {fields_of(one)[b"name"] for one in await command("XINFO", "CONSUMERS", f"vigil:{{{M}}}:frames", "live")}

    await judge(streams, "f1")
    await admit(streams, "f2")
    await streams.source(M, "died").read(count=1, block_ms=100)
    await streams.source(M, "b").claim(min_idle_ms=60_000, count=9)
    assert await names() == {b"a", b"died"}
    monkeypatch.setattr(redis_frames, "GONE_MS", -1)
    (left,) = await streams.source(M, "c").claim(min_idle_ms=0, count=9)
    assert (left.deliveries, await names()) == (2, {b"c", b"died"})


async def test_replies_go_on_where_the_server_began_them_anew_at_an_earlier_time(streams: Streams) -> None:
    if isinstance(streams, MemoryStreams):
        pytest.skip("its places are no times")
    assert await streams.queue.read_replies(M, "replica", "99999999999999-0", block_ms=10) == ("0", [])


async def test_the_same_frame_again_is_pending_then_judged_and_another_image_is_refused(streams: Streams) -> None:
    assert (await admit(streams, "f1", to="old")).state is Admission.ADMITTED
    assert (await admit(streams, "f1", sha=b"other")).state is Admission.REUSED
    assert (await admit(streams, "f1", to="new")).state is Admission.PENDING
    source = streams.source(M, "a")
    (frame,) = await source.read(count=10, block_ms=100)
    await source.emit([emission(frame.entry_id, "f1")])
    assert (await streams.queue.read_replies(M, "new", "0", block_ms=100))[1] == [b"verdict"]
    assert await admit(streams, "f1") == Admitted(Admission.JUDGED, b"verdict")


async def test_a_reply_with_pictures_is_not_kept_and_the_frame_is_judged_again(streams: Streams) -> None:
    await admit(streams, "f1")
    source = streams.source(M, "a")
    (frame,) = await source.read(count=1, block_ms=100)
    await source.emit([emission(frame.entry_id, "f1", reply=b"verdict with pictures")])
    assert (await admit(streams, "f1")).state is Admission.ADMITTED


async def reply(streams: Streams, frame_id: str, outcome: bytes, reply: bytes) -> None:
    """A frame of the replica `me` is judged."""
    await admit(streams, frame_id, image=b"x", to="me")
    source = streams.source(M, "a")
    (frame,) = await source.read(count=1, block_ms=100)
    await source.emit([emission(frame.entry_id, frame_id, outcome, reply)])


async def test_a_reply_with_pictures_is_there_until_the_next_is_asked_for_and_no_longer(streams: Streams) -> None:
    one, two, three = (name * 200_000 for name in (b"1", b"2", b"3"))
    await reply(streams, "f1", b"verdict", one)
    await reply(streams, "f2", b"verdict", two)
    after, replies = await streams.queue.read_replies(M, "me", "0", block_ms=100)
    assert replies == [one, two]
    # The answer was lost on its way.
    assert await streams.queue.read_replies(M, "me", "0", block_ms=100) == (after, replies)
    assert await streams.queue.read_replies(M, "me", after, block_ms=10) == (after, [])
    assert await streams.queue.read_replies(M, "me", "0", block_ms=10) == ("0", [])
    await reply(streams, "f3", b"verdict", three)
    assert (await streams.queue.read_replies(M, "me", after, block_ms=100))[1] == [three]


async def test_pictures_that_nobody_fetches_are_bounded_by_their_bytes(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (memory, redis_frames):
        monkeypatch.setattr(module, "REPLIES_BYTES_AT_MOST", 100_000)
    for number in range(12):
        await reply(streams, f"f{number}", b"verdict", bytes([number]) * 20_000)
    _, replies = await streams.queue.read_replies(M, "me", "0", block_ms=100)
    assert 3 <= len(replies) <= 5
    assert replies[-1] == bytes([11]) * 20_000
    await reply(streams, "large", b"verdict", b"x" * 200_000)
    assert (await streams.queue.read_replies(M, "me", "0", block_ms=100))[1] == [b"x" * 200_000]


async def test_replies_to_a_replica_that_is_gone_outlive_its_clients_patience_by_little(tmp_path: Path) -> None:
    server = ValkeyProcess(tmp_path / "valkey").start()
    streams = await RedisStreams.connect(server.url)
    await reply(streams, "f1", b"verdict", b"verdict")
    assert 30 < int(server.ask("TTL", f"vigil:{{{M}}}:replies:me").removeprefix(":")) <= 60
    await streams.close()
    server.stop()


async def test_the_budget_refuses_and_room_comes_back_only_when_storage_is_done(streams: Streams) -> None:
    states = [(await admit(streams, f"f{index}")).state for index in range(8)]
    assert states == [Admission.ADMITTED] * 6 + [Admission.FULL] * 2
    source, outcomes = streams.source(M, "a"), streams.outcomes(M, "s")
    frames = await source.read(count=10, block_ms=100)
    await source.emit([emission(frame.entry_id, f"f{index}") for index, frame in enumerate(frames)])
    found = await outcomes.read(count=10, block_ms=100)
    assert await outcomes.trim() == 0
    assert (await admit(streams, "f8")).state is Admission.FULL
    # Frames leave from the head only: the second and third wait for the first.
    await outcomes.done(found[1:3])
    assert await outcomes.trim() == 0
    await outcomes.done(found[:1])
    assert await outcomes.trim() == 3
    depth = await streams.queue.depth(M)
    assert (depth.frames, depth.unstored, depth.unjudged) == (3, 3, 0)
    assert depth.image_bytes == 3 * 1513
    assert [(await admit(streams, f"g{index}")).state for index in range(4)] == [Admission.ADMITTED] * 3 + [
        Admission.FULL
    ]


async def test_a_frame_that_somebody_took_out_of_the_queue_keeps_no_others_in_it(valkey: ValkeyProcess) -> None:
    streams = await RedisStreams.connect(valkey.url, budget_bytes=BUDGET)
    await streams.queue._connection.command("FLUSHALL")
    await judge(streams, "f1")
    valkey.ask("XTRIM", f"vigil:{{{M}}}:frames", "MAXLEN", "0")
    await judge(streams, "f2")
    outcomes = streams.outcomes(M, "s")
    gone, found = await outcomes.read(count=10, block_ms=100)
    assert gone.frame is None
    await outcomes.done([gone, found])
    assert await outcomes.trim() == 1
    depth = await streams.queue.depth(M)
    assert (depth.frames, depth.image_bytes, depth.unstored) == (0, 0, 0)
    await streams.close()


async def test_a_frame_not_yet_judged_is_never_trimmed(streams: Streams) -> None:
    await admit(streams, "f1")
    await admit(streams, "f2")
    source, outcomes = streams.source(M, "a"), streams.outcomes(M, "s")
    (frame,) = await source.read(count=1, block_ms=100)
    await source.emit([emission(frame.entry_id, "f1")])
    await outcomes.done(await outcomes.read(count=1, block_ms=100))
    assert await outcomes.trim() == 1
    (rest,) = await source.read(count=1, block_ms=100)
    await outcomes.trim()
    assert await source.emit([emission(rest.entry_id, "f2")]) == [True]
    (outcome,) = await outcomes.read(count=1, block_ms=100)
    assert outcome.frame is not None
    assert outcome.frame.image == IMAGE


async def test_an_owner_that_comes_back_finds_what_it_had_not_finished(streams: Streams) -> None:
    await admit(streams, "f1")
    await admit(streams, "f2")
    source = streams.source(M, "a")
    frames = await source.read(count=2, block_ms=100)
    await source.emit([emission(frame.entry_id, f"f{index}") for index, frame in enumerate(frames, 1)])
    crashed = streams.outcomes(M, "s1")
    assert await crashed.own(ttl_ms=10_000)
    taken = await crashed.read(count=2, block_ms=100)
    await crashed.done(taken[:1])
    heir = streams.outcomes(M, "s2")
    assert not await heir.own(ttl_ms=10_000)
    await crashed.close()
    assert await heir.own(ttl_ms=10_000)
    (left,) = await heir.read(count=10, block_ms=0, pending=True)
    assert left.entry_id == taken[1].entry_id
    assert await heir.read(count=10, block_ms=0, pending=True) == []


async def test_a_dead_frame_is_counted_and_still_goes_to_storage(streams: Streams) -> None:
    await admit(streams, "f1")
    source = streams.source(M, "a")
    (frame,) = await source.read(count=1, block_ms=100)
    await source.emit([Emission(frame.entry_id, "f1", b"failure", b"failure", "IMAGE_TRUNCATED")])
    assert (await streams.queue.depth(M)).dead == 1
    (outcome,) = await streams.outcomes(M, "s").read(count=1, block_ms=100)
    assert outcome.outcome == b"failure"


async def test_a_promotion_is_seen_by_who_waits(streams: Streams) -> None:
    assert await streams.routing.get(M) is None
    first = await streams.routing.promote(M, version=1, digest="sha256:1", threshold=None)
    assert await streams.routing.models() == [M]
    assert await streams.routing.wait(M, first.generation, block_ms=10) == first
    second = await streams.routing.promote(M, version=2, digest="sha256:2", threshold=0.25)
    assert await streams.routing.wait(M, first.generation, block_ms=1000) == second
    assert second.live.threshold == 0.25


async def test_a_route_comes_back_as_it_was_written_with_its_candidate(streams: Streams) -> None:
    candidate = Candidate(2, "sha256:2", 0.25, 0.1)
    written = await streams.routing.write(M, live=Live(1, "sha256:1", 0.5), candidate=candidate)
    assert await streams.routing.get(M) == written
    assert written.candidate == candidate
    assert written.comparison == written.generation
    managed = await streams.routing.write(M, live=written.live, candidate=candidate, managed_by="here/cells")
    assert await streams.routing.get(M) == managed
    assert (managed.comparison, managed.managed_by) == (written.comparison, "here/cells")
    ended = await streams.routing.write(M, live=Live(1, "sha256:1"))
    assert await streams.routing.get(M) == ended
    assert (ended.candidate, ended.comparison, ended.live.threshold) == (None, 0, None)


async def test_the_same_pair_goes_on_in_its_comparison_and_another_begins_a_new_one(streams: Streams) -> None:
    live, candidate = Live(1, "sha256:1"), Candidate(2, "sha256:2")
    first = await streams.routing.write(M, live=live, candidate=candidate)
    again = await streams.routing.write(M, live=live, candidate=replace(candidate, sample_fraction=0.5))
    assert again.generation > again.comparison == first.comparison
    threshold = await streams.routing.write(M, live=live, candidate=replace(candidate, threshold=0.3))
    replaced = await streams.routing.write(M, live=live, candidate=Candidate(3, "sha256:3"))
    other_live = await streams.routing.write(M, live=Live(4, "sha256:4"), candidate=Candidate(3, "sha256:3"))
    await streams.routing.write(M, live=live)
    restarted = await streams.routing.write(M, live=live, candidate=candidate)
    numbers = [route.comparison for route in (first, threshold, replaced, other_live, restarted)]
    assert numbers == sorted(set(numbers))


async def test_a_promotion_ends_the_comparison(streams: Streams) -> None:
    await streams.routing.write(M, live=Live(1, "sha256:1"), candidate=Candidate(2, "sha256:2"))
    promoted = await streams.routing.promote(M, version=2, digest="sha256:2", threshold=None)
    assert (await streams.routing.get(M)) == promoted
    assert promoted.candidate is None


async def test_a_change_decided_by_an_earlier_route_changes_nothing(streams: Streams) -> None:
    first = await streams.routing.promote(M, version=1, digest="sha256:1", threshold=None, after=0)
    second = await streams.routing.promote(M, version=2, digest="sha256:2", threshold=None, after=first.generation)
    for after in (0, first.generation):
        with pytest.raises(Unavailable, match="somebody else changed"):
            await streams.routing.write(M, live=first.live, candidate=Candidate(3, "sha256:3"), after=after)
    assert await streams.routing.get(M) == second
    await streams.routing.remove(M)
    with pytest.raises(Unavailable, match="somebody else changed"):
        await streams.routing.write(M, live=second.live, after=second.generation)
    assert await streams.routing.get(M) is None
    assert (await streams.routing.write(M, live=first.live, after=0)).generation > second.generation


async def test_a_version_is_not_compared_with_itself_and_samples_are_fractions(streams: Streams) -> None:
    with pytest.raises(InvalidInput, match="version 1 is the live one"):
        await streams.routing.write(M, live=Live(1, "sha256:1"), candidate=Candidate(1, "sha256:1"))
    assert await streams.routing.get(M) is None
    for fraction in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(InvalidInput, match="over 0 and at most 1"):
            Candidate(2, "sha256:2", sample_fraction=fraction)


async def test_a_removed_route_is_gone_and_a_later_one_counts_on(streams: Streams) -> None:
    first = await streams.routing.write(M, live=Live(1, "sha256:1"), candidate=Candidate(2, "sha256:2"))
    await streams.routing.remove(M)
    assert await streams.routing.get(M) is None
    assert await streams.routing.models() == []
    assert await streams.routing.wait(M, first.generation, block_ms=10) is None
    await streams.routing.remove(M)
    later = await streams.routing.write(M, live=Live(1, "sha256:1"), candidate=Candidate(2, "sha256:2"))
    assert later.comparison > first.comparison
    assert await streams.routing.wait(M, first.generation, block_ms=1000) == later


async def test_a_removed_model_stays_listed_while_it_has_frames(streams: Streams) -> None:
    await streams.routing.write(M, live=Live(1, "sha256:1"))
    await admit(streams, "f1")
    await streams.routing.remove(M)
    assert await streams.routing.models() == [M]


async def test_a_removed_model_is_listed_while_what_people_say_of_it_waits(streams: Streams) -> None:
    await streams.routing.write(M, live=Live(1, "sha256:1"))
    await streams.reviews.put(M, "a1", b"waits", b"")
    await streams.routing.remove(M)
    assert await streams.routing.models() == [M]
    await streams.reviews.done(M, await streams.reviews.read(M, "0", count=1, block_ms=0))
    await streams.routing.remove(M)
    assert await streams.routing.models() == []
    await streams.reviews.put(M, "a2", b"said later", b"")
    assert await streams.routing.models() == [M]


async def test_frames_that_come_together_are_each_answered_in_their_order(streams: Streams) -> None:
    source = await judge(streams, "old")
    small = b"x" * 10
    asked = [admit(streams, f"f{index}", image=small) for index in range(12)]
    asked += [admit(streams, "f3", image=small, to="me"), admit(streams, "f3", sha=b"other"), admit(streams, "old")]
    asked += [admit(streams, "large", image=b"x" * 5000), admit(streams, "last", image=small)]
    states = [found.state for found in await asyncio.gather(*asked)]
    assert states == [
        *[Admission.ADMITTED] * 12,
        *(Admission.PENDING, Admission.REUSED, Admission.JUDGED),
        *(Admission.FULL, Admission.ADMITTED),
    ]
    frames = await source.read(count=100, block_ms=100)
    assert [(frame.image, frame.header) for frame in frames] == [(small, b"h")] * 13
    assert (await streams.queue.depth(M)).image_bytes == 1513 + 13 * 523
    await source.emit([emission(frame.entry_id, f"f{index}") for index, frame in enumerate(frames[:12])])
    assert (await streams.queue.read_replies(M, "me", "0", block_ms=100))[1] == [b"verdict"]


async def test_one_run_of_the_script_takes_several_small_frames_and_few_large_ones(tmp_path: Path) -> None:
    server = ValkeyProcess(tmp_path / "valkey").start()
    streams = await RedisStreams.connect(server.url)
    await admit(streams, "first")

    async def runs(images: list[bytes]) -> int:
        server.ask("CONFIG", "RESETSTAT")
        await asyncio.gather(*(admit(streams, f"{len(image)}-{at}", image=image) for at, image in enumerate(images)))
        return int(server.ask("INFO", "commandstats").partition("cmdstat_evalsha:calls=")[2].partition(",")[0])

    assert await runs([b"x" * 1000] * 40) == 3
    assert await runs([b"x" * 400_000] * 5) == 3
    assert (await streams.queue.depth(M)).frames == 46
    await streams.close()
    server.stop()


async def test_over_the_servers_memory_nothing_is_written_and_what_is_known_is_still_said(tmp_path: Path) -> None:
    server = ValkeyProcess(tmp_path / "valkey").start()
    streams = await RedisStreams.connect(server.url)
    await judge(streams, "judged")
    await admit(streams, "pending")

    async def states() -> list[Admission]:
        asked = (admit(streams, "pending", to="me"), admit(streams, "judged"), admit(streams, "new"))
        return [found.state for found in await asyncio.gather(*asked)]

    server.ask("CONFIG", "SET", "maxmemory", "1")
    assert await states() == [Admission.FULL, Admission.JUDGED, Admission.FULL]
    assert (await streams.queue.depth(M)).frames == 2
    # Of one that starts now, too: it can't make sure of the groups.
    await streams.close()
    streams = await RedisStreams.connect(server.url)
    assert await states() == [Admission.FULL, Admission.JUDGED, Admission.FULL]
    server.ask("CONFIG", "SET", "maxmemory", "0")
    assert await states() == [Admission.PENDING, Admission.JUDGED, Admission.ADMITTED]
    await streams.close()
    server.stop()


@pytest.mark.parametrize("user", ["", "camera"])
async def test_a_rotated_password_is_taken_at_the_next_connection(tmp_path: Path, user: str) -> None:
    rights = ("~*", "&*", "+@all")
    server = ValkeyProcess(tmp_path / "valkey", "--user", "admin", "on", "nopass", *rights).start()
    file = tmp_path / "password"
    url = server.url.replace("//", f"//{user}@") if user else server.url
    admin = await RedisStreams.connect(server.url.replace("//", "//admin@"))
    streams = await RedisStreams.connect(url, security=SecuritySettings(redis_password_file=file))
    for password in ("first", "second"):
        file.write_text(f"{password}\n")
        # A reset ends the user's connections.
        rules = ("reset", "on", f">{password}", *rights)
        await admin.queue._connection.command("ACL", "SETUSER", user or "default", *rules)
        async with asyncio.timeout(5):
            while True:
                with suppress(Unavailable):
                    await streams.ping()
                    break
    for one in (streams, admin):
        await one.close()
    server.stop()


async def test_without_a_password_in_its_folder_there_is_none_and_without_the_folder_an_error(tmp_path: Path) -> None:
    server = ValkeyProcess(tmp_path / "valkey").start()
    file = tmp_path / "password"
    for _ in range(2):
        streams = await RedisStreams.connect(server.url, security=SecuritySettings(redis_password_file=file))
        await streams.ping()
        await streams.close()
        file.write_text("\n")
    server.stop()
    with pytest.raises(InvalidInput, match="VIGIL_REDIS_PASSWORD_FILE"):
        await RedisStreams.connect(server.url, security=SecuritySettings(redis_password_file=file / "no" / "password"))


@pytest.mark.parametrize("name", ["valkey", "cluster", "redis"])
async def test_over_the_servers_memory_a_known_model_still_gets_another_route(
    name: str, backbones: Callable[[str], str]
) -> None:
    streams = await RedisStreams.connect(backbones(name))
    connection = streams.queue._connection
    await connection.command("FLUSHALL")
    live, candidate = Live(1, "sha256:1"), Candidate(2, "sha256:2", 0.4)
    await streams.routing.write(M, live=live)
    everywhere = {"target_nodes": "all"} if connection.clustered else {}
    await connection.client.config_set("maxmemory", 1, **everywhere)
    try:
        await streams.routing.keep_fraction(M, 0.5)
        route = await streams.routing.write(M, live=live, candidate=candidate)
        assert (await streams.routing.get(M), await streams.routing.kept_fraction(M)) == (route, 0.5)
        with pytest.raises(Unavailable, match="over its memory"):
            await streams.routing.write("another", live=live)
        # What is remembered for a reviewer's comfort is refused in the same words.
        with pytest.raises(Unavailable, match="over its memory"):
            await streams.reviews.give(M, "anna", ["f1"])
        await streams.routing.remove(M)
        assert await streams.routing.models() == []
    finally:
        await connection.client.config_set("maxmemory", 0, **everywhere)
        await streams.close()


async def test_a_route_makes_the_groups_that_nothing_goes_on_without(valkey: ValkeyProcess) -> None:
    streams = await RedisStreams.connect(valkey.url)
    await streams.queue._connection.command("FLUSHALL")
    await streams.routing.write(M, live=Live(1, "sha256:1"))
    for stream, group in (("frames", "live"), ("verdicts", "storage"), ("comparisons", "storage")):
        assert group in valkey.ask("XINFO", "GROUPS", f"vigil:{{{M}}}:{stream}")
    await streams.close()


async def test_valkey_killed_keeps_every_admitted_frame_and_works_on(tmp_path: Path) -> None:
    server = ValkeyProcess(tmp_path / "valkey").start()
    streams = await RedisStreams.connect(server.url)
    states = [(await admit(streams, f"f{index}")).state for index in range(50)]
    server.kill()
    server.start()
    assert states == [Admission.ADMITTED] * 50
    with pytest.raises(Unavailable):  # the broken connection: in doubt, so the caller must ask again
        await admit(streams, "f7")
    assert (await admit(streams, "f7")).state is Admission.PENDING
    assert len(await streams.source(M, "a").read(count=100, block_ms=100)) == 50
    await streams.close()
    server.stop()


async def test_a_connection_that_the_server_closed_while_nobody_used_it_is_replaced(tmp_path: Path) -> None:
    server = ValkeyProcess(tmp_path / "valkey").start()
    streams = await RedisStreams.connect(server.url)
    await admit(streams, "f1")
    (line,) = streams.queue._connection._idle
    server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    async with asyncio.timeout(5):
        while not line._reader.at_eof():
            await asyncio.sleep(0.01)
    assert (await admit(streams, "f2")).state is Admission.ADMITTED
    await streams.close()
    server.stop()


async def test_the_answer_to_a_read_that_was_given_up_is_not_taken_for_the_next_ones(tmp_path: Path) -> None:
    server = ValkeyProcess(tmp_path / "valkey").start()
    streams = await RedisStreams.connect(server.url)
    await streams.routing.write(M, live=Live(1, "sha256:1"))
    waiting = asyncio.create_task(streams.routing.wait(M, 1, block_ms=300))
    while "blocked_clients:1" not in server.ask("INFO", "clients"):
        await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait([waiting])
    await asyncio.sleep(0.5)  # past the block: its answer would be there
    for name in ("f1", "f2"):
        assert (await admit(streams, name)).state is Admission.ADMITTED
    await streams.close()
    server.stop()


@pytest.mark.parametrize("kind", ["node", "cluster"])
async def test_a_slow_line_carries_a_large_image_to_worker_and_storage_and_then_fewer_at_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_connection, "SOCKET_TIMEOUT_S", 0.2)
    image = b"x" * 500_000
    servers = ValkeyCluster(tmp_path / kind).start() if kind == "cluster" else ValkeyProcess(tmp_path / kind).start()
    server = servers if isinstance(servers, ValkeyProcess) else servers.nodes[key_slot(M.encode()) >= 8192]
    near = await RedisStreams.connect(servers.url)
    for name in ("f1", "f2", "f3", "f4"):
        await admit(near, name, image=image)
    async with Link(server.port, pause_s=0.05) as link:
        if isinstance(servers, ValkeyCluster):
            server.ask("CONFIG", "SET", "cluster-announce-port", str(link.port))
            while not all(str(link.port) in node.ask("CLUSTER", "SLOTS") for node in servers.nodes):
                await asyncio.sleep(0.01)
        far = await RedisStreams.connect(f"{servers.url.rpartition(':')[0]}:{link.port}")
        source = far.source(M, "far")
        frames = [*await source.read(count=2, block_ms=100), *await source.read(count=2, block_ms=100)]
        assert len(frames) == 3
        await near.source(M, "died").read(count=1, block_ms=100)
        frames += await source.claim(min_idle_ms=0, count=4, held=[frame.entry_id for frame in frames])
        await source.emit([emission(frame.entry_id, "f") for frame in frames])
        stored = [outcome.frame for outcome in await far.outcomes(M, "s").read(count=4, block_ms=100)]
        assert [frame and frame.image for frame in [*frames, *stored]] == [image] * 8
        await far.close()
    await near.close()
    servers.stop()


async def test_a_slow_line_carries_a_large_image_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some megabytes of it leave at once, into the system's buffers.
    monkeypatch.setattr(redis_connection, "SOCKET_TIMEOUT_S", 1.0)
    server, image = ValkeyProcess(tmp_path / "valkey").start(), bytes(range(256)) * 80_000
    async with Link(server.port, pause_s=0.005) as link:
        far, near = [await RedisStreams.connect(f"redis://127.0.0.1:{port}") for port in (link.port, server.port)]
        assert (await admit(far, "f1", image=image)).state is Admission.ADMITTED
        (frame,) = await near.source(M, "a").read(count=1, block_ms=100)
        assert frame.image == image
        for streams in (far, near):
            await streams.close()
    server.stop()


async def test_a_line_on_which_nothing_more_comes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_connection, "SOCKET_TIMEOUT_S", 0.2)
    server = ValkeyProcess(tmp_path / "valkey").start()
    streams = await RedisStreams.connect(server.url)
    await streams.ping()
    server.freeze()
    with pytest.raises(Unavailable, match="Timeout"):
        await streams.ping()
    server.freeze(frozen=False)
    await streams.close()
    server.stop()


async def test_a_cluster_that_is_not_there_is_waited_for(tmp_path: Path) -> None:
    cluster = ValkeyCluster(tmp_path / "cluster")
    streams = await RedisStreams.connect(cluster.url)
    with pytest.raises(Unavailable):
        await streams.ping()
    cluster.start()
    await streams.ping()
    await admit(streams, "f1")
    cluster.stop()
    for _ in range(2):  # with the cluster as it was known, then without
        for call in (streams.ping(), admit(streams, "f2"), streams.queue.depth(M), streams.routing.get(M)):
            with pytest.raises(Unavailable):
                await call
    await streams.close()


async def test_a_cluster_whose_one_server_hangs_takes_the_frames_of_models_on_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_connection, "SOCKET_TIMEOUT_S", 1.5)
    cluster = ValkeyCluster(tmp_path / "cluster").start()
    streams = await RedisStreams.connect(cluster.url)

    async def admitted(model: str, frame_id: str) -> Admission:
        return (
            await streams.queue.admit(model, frame_id=frame_id, sha256=b"s", header=b"h", image=IMAGE, reply_to="")
        ).state

    on_first = {key_slot(f"{{{name}}}".encode()) < 8192: name for name in "abcdefgh"}
    await asyncio.gather(*(admitted(name, "f1") for name in on_first.values()))
    # As chance may have it: the one that hangs is asked first where the slots are.
    hung = cluster.nodes[1]
    monkeypatch.setattr(random, "shuffle", lambda nodes: nodes.sort(key=lambda node: node.port != hung.port))
    hung.freeze()
    try:
        for number in (2, 3):
            hangs = asyncio.create_task(admitted(on_first[False], "f2"))
            async with asyncio.timeout(1.0):  # less than the hanging one's time-out
                assert await admitted(on_first[True], f"f{number}") is Admission.ADMITTED
            with pytest.raises(Unavailable):
                await hangs
            async with asyncio.timeout(1.0):
                assert await admitted(on_first[True], f"g{number}") is Admission.ADMITTED
    finally:
        hung.freeze(frozen=False)
    assert await admitted(on_first[False], "f2") in {Admission.ADMITTED, Admission.PENDING}
    await streams.close()
    cluster.stop()


def test_what_says_that_redis_is_away_is_told_from_what_is_wrong() -> None:
    # uvloop's and redis-py's own words, as they came in runs with faults.
    closed = RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")
    gone = [
        closed,
        ConnectionResetError(),
        ResponseError("MISCONF Errors writing to the AOF file"),
        ReadOnlyError("You"),
        ClusterError("TTL exhausted."),
    ]
    assert all(map(away, gone))
    assert not any(map(away, [RuntimeError("dictionary changed"), ResponseError("WRONGTYPE Operation against a key")]))


async def test_a_server_that_became_a_replica_is_away_not_broken(tmp_path: Path) -> None:
    server = ValkeyProcess(tmp_path / "valkey").start()
    streams = await RedisStreams.connect(server.url)
    await admit(streams, "f1")
    source = streams.source(M, "a")
    (frame,) = await source.read(count=1, block_ms=100)
    waiting = asyncio.create_task(source.read(count=1, block_ms=4000))
    routed = asyncio.create_task(streams.routing.wait(M, 1, block_ms=4000))
    while "blocked_clients:2" not in server.ask("INFO", "clients"):
        await asyncio.sleep(0.01)
    server.ask("REPLICAOF", "127.0.0.1", "1")
    refused = (admit(streams, "f2"), source.emit([emission(frame.entry_id, "f1")]), waiting, routed)
    for call in refused:
        with pytest.raises(Unavailable):
            await call
    server.ask("REPLICAOF", "NO", "ONE")
    assert await source.emit([emission(frame.entry_id, "f1")]) == [True]
    await streams.close()
    server.stop()


async def test_a_server_that_is_busy_with_a_script_is_away_not_broken(tmp_path: Path) -> None:
    server = ValkeyProcess(tmp_path / "valkey", "--busy-reply-threshold", "1").start()
    streams = await RedisStreams.connect(server.url)
    await admit(streams, "f1")
    running = asyncio.create_task(asyncio.to_thread(server.ask, "EVAL", "while true do end", "0"))
    while not server.ask("PING").startswith("-BUSY"):
        await asyncio.sleep(0.01)
    try:
        for call in (admit(streams, "f2"), streams.source(M, "a").read(count=1, block_ms=100), streams.routing.get(M)):
            with pytest.raises(Unavailable):
                await call
    finally:
        server.ask("SCRIPT", "KILL")
    await running
    assert (await admit(streams, "f2")).state is Admission.ADMITTED
    await streams.close()
    server.stop()


async def test_after_a_failover_behind_one_address_no_connection_stays_with_the_old_primary(tmp_path: Path) -> None:
    old, new = (ValkeyProcess(tmp_path / name).start() for name in ("old", "new"))
    async with Link(old.port) as link:
        streams = await RedisStreams.connect(f"redis://127.0.0.1:{link.port}")
        await asyncio.gather(*(admit(streams, f"f{number}") for number in range(2)), streams.routing.get(M))
        old.ask("REPLICAOF", "127.0.0.1", "1")
        waiting = asyncio.create_task(streams.queue.read_replies(M, "me", "0", block_ms=500))
        while "blocked_clients:1" not in old.ask("INFO", "clients"):
            await asyncio.sleep(0.01)
        link.target = new.port
        with pytest.raises(Unavailable):
            await admit(streams, "f2")
        assert (await admit(streams, "f2")).state is Admission.ADMITTED
        assert await waiting == ("0", [])
        written = await streams.routing.write(M, live=Live(1, "sha256:1"))
        # On all the connections there are: a replica would answer what it once knew.
        assert await asyncio.gather(*(streams.routing.get(M) for _ in range(4))) == [written] * 4
        await streams.close()
    for server in (old, new):
        server.stop()


async def test_what_people_say_waits_in_order_until_it_is_done(streams: Streams) -> None:
    log = streams.reviews
    first = await log.put(M, "a1", b"one", b"\x00mask")
    second = await log.put(M, "a2", b"two", b"")
    third = await log.put(M, "a3", b"\xff\x00three", b"")
    assert await log.put(M, "a1", b"another", b"") == first
    assert await log.put(M, "a3", b"another", b"") == third
    found = await log.read(M, "0", count=10, block_ms=100)
    assert [(one.annotation_id, one.body, one.mask) for one in found] == [
        ("a1", b"one", b"\x00mask"),
        ("a2", b"two", b""),
        ("a3", b"\xff\x00three", b""),
    ]
    assert [(one.place, one.body) for one in found] == [first, second, third]
    assert await log.read(M, found[0].place, count=10, block_ms=10) == found[1:]
    await log.done(M, found[:1])
    assert await log.read(M, "0", count=10, block_ms=10) == found[1:]
    await log.done(M, found[1:])
    assert await log.read(M, "0", count=10, block_ms=10) == []
    assert await log.read(M, found[1].place, count=10, block_ms=10) == []


async def test_the_log_of_what_people_say_is_bounded(streams: Streams) -> None:
    log = streams.reviews
    put: list[tuple[str, bytes] | None] = []
    for start in range(0, log.LIMIT, 16):  # at once, so that some are of the same millisecond
        some = (log.put(M, f"a{n}", f"said {n}".encode(), b"") for n in range(start, start + 16))
        put += await asyncio.gather(*some)
    assert [one[1] for one in put if one] == [f"said {n}".encode() for n in range(log.LIMIT)]
    assert await log.put(M, "more", b"x", b"") is None
    assert [await log.put(M, f"a{n}", b"x", b"") for n in range(log.LIMIT)] == put
    await log.done(M, await log.read(M, "0", count=1, block_ms=10))
    assert await log.put(M, "more", b"x", b"")


async def test_each_reviewer_has_been_given_what_was_given(streams: Streams) -> None:
    log = streams.reviews
    await log.give(M, "Ann", ["f1", "f2"])
    await log.give(M, "Ann", ["f2", "f3"])
    await log.give(M, "Bob", ["f9"])
    await log.give(M, "Bob", [])
    assert sorted(await log.given(M, "Ann")) == ["f1", "f2", "f3"]
    assert await log.given(M, "Bob") == ["f9"]
    assert await log.given("other", "Ann") == []
