"""The ids of frames that are sent once more."""

from __future__ import annotations

from vigil_cli.replay import repeat_id


def test_a_repeat_is_named_after_its_frame_and_two_frames_never_share_a_name() -> None:
    assert repeat_id("f-1", 2) == "f-1.r2"
    long = [f"{'x' * 61}{number:03}" for number in range(3)]
    ids = {repeat_id(frame_id, attempt) for frame_id in long for attempt in (1, 12)}
    assert len(ids) == 6
    assert max(map(len, ids)) == 64
    assert repeat_id(long[0], 1) == repeat_id(long[0], 1)
