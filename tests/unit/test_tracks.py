"""The tracks of a camera: each only grows at its end, and few are needed."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from vigil_common.store.tracks import MOST, RECENT, Frame, Tracks, base_of, index_of, name_of

FRAME = Frame("f", "0", 1)


def test_names_and_indexes_belong_together() -> None:
    names = [name_of("cells/cam1", track) for track in range(MOST)]
    assert names[:3] == ["cells/cam1", "cells/cam1/2", "cells/cam1/3"]
    assert [index_of(name) for name in names] == list(range(MOST))
    assert {base_of(name) for name in names} == {"cells/cam1"}


@given(st.lists(st.lists(st.integers(1, 40), max_size=6), max_size=12))
def test_no_track_gets_anything_before_its_end_while_there_are_some_left(batches: list[list[int]]) -> None:
    tracks = Tracks()
    written: dict[str, list[int]] = {}
    for batch in batches:
        times = sorted(batch)
        for time_us, name in zip(times, tracks.assign("m/c", times), strict=True):
            tracks.written(name, time_us, FRAME)
            written.setdefault(name, []).append(time_us)
    for name, times in written.items():
        if index_of(name) < MOST - 1:
            assert all(before < after for before, after in pairwise(times)), name
    assert tracks.latest_us("m/c") == max((time_us for times in written.values() for time_us in times), default=0)


def test_frames_of_a_few_workers_need_a_few_tracks() -> None:
    rng = random.Random(0)
    tracks = Tracks()
    order = sorted(range(10_000), key=lambda number: number + rng.uniform(0, 200))
    for start in range(0, len(order), 60):
        times = sorted(order[start : start + 60])
        for time_us, name in zip(times, tracks.assign("m/c", times), strict=True):
            tracks.written(name, time_us + 1, FRAME)
    assert 2 <= len(tracks.names("m/c")) < MOST


def test_what_is_learnt_holds_until_forgotten() -> None:
    tracks = Tracks()
    latest = {"m/c": 50, "m/c/3": 10, "n/c": 99}
    tracks.learn("m", latest)
    assert tracks.knows("m/new")
    assert not tracks.knows("n/c")
    assert tracks.names("m/c") == ["m/c", "m/c/2", "m/c/3"]
    assert tracks.names("m/c", since_us=20) == ["m/c"]
    assert tracks.assign("m/c", [5, 20, 60]) == ["m/c/2", "m/c/3", "m/c"]
    tracks.forget("m")
    assert not tracks.knows("m/c")
    assert tracks.names("m/c") == []


def test_the_latest_records_are_remembered_and_no_others_are_answered_for() -> None:
    tracks = Tracks()
    tracks.learn("m", {"m/c": 50})
    assert not tracks.remembers("m/c", 50)
    for time_us in range(51, 51 + 2 * RECENT):
        tracks.written("m/c", time_us, Frame(f"f{time_us}", "0", 1))
    last = 50 + 2 * RECENT
    assert tracks.remembers("m/c", last)
    found = tracks.recent("m/c", last)
    assert found is not None
    assert found.frame_id == f"f{last}"
    remembered = [time_us for time_us in range(1, last + 1) if tracks.remembers("m/c", time_us)]
    assert RECENT // 2 <= len(remembered) <= RECENT
    assert all(tracks.recent("m/c", time_us) is not None for time_us in remembered)
    tracks.forget("m")
    tracks.learn("m", {"m/c": last})
    assert not tracks.remembers("m/c", last)
