"""The review page over plain HTTP: who gets in, what gets through, and what strangers can't do."""

from __future__ import annotations

import asyncio
import io
import re
import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from aiohttp import FormData
from PIL import Image
from vigil.inference.v1 import inference_pb2, inference_pb2_grpc
from vigil_cli.local.process import free_port
from vigil_common.config import SecuritySettings
from vigil_common.errors import InvalidInput
from vigil_common.grpc.server import create_server
from vigil_common.store.ports import ModelInfo
from vigil_common.streams.ports import Live
from vigil_inference.bootstrap import ACCESS
from vigil_review import bootstrap, charts, pictures
from vigil_review.config import Settings
from vigil_review.domain import BINS, Frame, cameras
from vigil_review.sessions import MOST

from tests.support.review import HEIGHT, T0, WIDTH, M, Site, form_of, image, labels, record, review_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiohttp.client import ClientResponse


async def test_nobody_gets_past_the_login_without_a_token_that_may_review(site: Site) -> None:
    stranger = await site.browser()
    for path in ("/", f"/m/{M}", f"/m/{M}/next", f"/m/{M}/f/line-1/f1", f"/m/{M}/f/line-1/f1/image"):
        answer = await stranger.get(path, allow_redirects=False)
        assert (answer.status, answer.headers["Location"]) == (303, "/login"), path
    for token, why in (("", "Bearer"), ("wrong", "nobody has this token"), (site.tokens["line-1"], "role")):
        answer = await stranger.post("/login", data={"name": "Ann", "token": token})
        assert answer.status == 403
        assert why in await answer.text()
    assert (await stranger.post("/login", data={"name": " ", "token": site.tokens["Ann"]})).status == 400
    client = await site.logged_in()
    assert "Nothing is published yet" in await (await client.get("/")).text()


async def test_a_token_never_comes_back_and_is_good_for_its_models_only(site: Site) -> None:
    await site.frames.write([record(1)])
    client = await site.logged_in("Eve")
    seen: list[ClientResponse] = [await client.get(path) for path in ("/", f"/m/{M}/next", f"/m/{M}/f/line-1/f1")]
    assert [answer.status for answer in seen] == [200, 403, 403]
    for answer in seen:
        assert site.tokens["Eve"] not in await answer.text() + str(answer.headers) + str(answer.cookies)


async def test_every_answer_keeps_strangers_scripts_and_frames_out(site: Site) -> None:
    client = await site.logged_in()
    for path in ("/", "/login", "/healthz", "/static/review.js", "/nothing", f"/m/{M}/f/line-1/none"):
        answer = await client.get(path)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy, path
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    login = await client.post("/login", data={"name": "Ann", "token": site.tokens["Ann"]}, allow_redirects=False)
    cookie = login.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie


async def test_a_form_counts_only_from_the_sessions_own_page(site: Site) -> None:
    await site.frames.write([record(1)])
    client, other = await site.logged_in(), await site.logged_in()
    place = f"/m/{M}/f/line-1/f1"
    stolen = await form_of(other, place)
    own = await form_of(client, place)
    for data, headers in (
        ({"label": "normal"}, {}),
        ({"label": "normal", **stolen}, {}),
        ({"label": "normal", **own}, {"Sec-Fetch-Site": "cross-site"}),
    ):
        assert (await client.post(place, data=data, headers=headers)).status == 403
    assert "human" not in await labels(site, "f1")
    answer = await client.post(place, data={"label": "normal", **own}, headers={"Sec-Fetch-Site": "same-origin"})
    assert answer.status == 200
    assert (await labels(site, "f1"))["human"] == "normal"


async def test_labels_work_without_the_script_and_notes_stay_text(site: Site) -> None:
    await site.frames.write([record(1), record(2)])
    client = await site.logged_in()
    first = await client.get(f"/m/{M}/next")
    assert re.fullmatch(rf"/m/{M}/f/line-1/f[12]", first.url.path)
    form = {"label": "unsure", "note": '<script>alert("x")</script>', **await form_of(client, first.url.path)}
    second = await client.post(first.url.path, data=form)
    assert second.url.path != first.url.path
    assert "unsure: kept" in await second.text()
    text = await (await client.get(first.url.path)).text()
    assert "&lt;script&gt;alert" in text
    assert "<script>alert" not in text
    # The same form again, as after a lost answer, says nothing twice.
    assert (await client.post(first.url.path, data=form)).status == 200
    assert (await (await client.get(first.url.path)).text()).count("&lt;script&gt;") == 1
    done = await (await client.get(f"/m/{M}/next")).text()
    assert "Nothing left to review" in done


async def test_who_clicks_next_twice_passes_over_no_frame(site: Site) -> None:
    await site.frames.write([record(1), record(2)])
    client = await site.logged_in()
    first, again = [(await client.get(f"/m/{M}/next", allow_redirects=False)).headers["Location"] for _ in range(2)]
    assert first == again
    assert "1 more waiting" in await (await client.get(first)).text()
    second = await client.get(f"/m/{M}/next")
    assert second.url.path != first.partition("?")[0]
    assert "Nothing left to review" in await (await client.get(f"/m/{M}/next")).text()


async def test_what_waits_when_a_session_ends_is_given_by_the_next(site: Site) -> None:
    await site.frames.write([record(1), record(2)])
    first = await (await site.logged_in()).get(f"/m/{M}/next")
    client = await site.logged_in()
    second = await client.get(f"/m/{M}/next")
    assert {one.url.path.rpartition("/")[2] for one in (first, second)} == {"f1", "f2"}
    assert "Nothing left to review" in await (await client.get(f"/m/{M}/next")).text()


async def test_a_mask_of_another_size_is_refused_in_words_and_one_that_fits_comes_back(site: Site) -> None:
    await site.frames.write([record(1)])
    client = await site.logged_in()
    place = f"/m/{M}/f/line-1/f1"

    async def send(mask: bytes) -> ClientResponse:
        form = FormData({"label": "anomalous", **await form_of(client, place)})
        form.add_field("mask", mask, filename="mask.png", content_type="image/png")
        return await client.post(place, data=form)

    answer = await send(image(mode="RGBA", size=(8, 8), fill=(255, 0, 0, 255)))
    assert answer.status == 400
    assert "8 x 8" in await answer.text()
    assert (await send(b"rubbish")).status == 400
    assert "human" not in await labels(site, "f1")
    assert (await client.get(f"{place}/mask")).status == 404
    assert (await send(image(mode="RGBA", fill=(255, 0, 0, 255)))).status == 200
    with Image.open(io.BytesIO(await (await client.get(f"{place}/mask")).read())) as kept:
        assert (kept.mode, kept.size, kept.getextrema()) == ("L", (WIDTH, HEIGHT), (255, 255))


async def test_images_are_shown_as_they_are_and_tiff_as_png(site: Site) -> None:
    await site.frames.write([record(1), record(2, kind="TIFF")])
    client = await site.logged_in()
    answer = await client.get(f"/m/{M}/f/line-1/f1/image")
    assert (answer.content_type, await answer.read()) == ("image/png", record(1).body)
    answer = await client.get(f"/m/{M}/f/line-1/f2/image")
    assert answer.content_type == "image/png"
    with Image.open(io.BytesIO(await answer.read())) as shown:
        assert shown.getpixel((0, 0)) == (2, 2, 2)
    assert (await client.get(f"/m/{M}/f/line-1/f1/ai-view")).status == 404


class Worker(inference_pb2_grpc.InferenceServiceServicer):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[inference_pb2.PredictRequest] = []

    async def Predict(  # noqa: N802 - gRPC's name
        self, request: inference_pb2.PredictRequest, _context: Any
    ) -> inference_pb2.PredictResponse:
        self.asked.append(request)
        found = inference_pb2.PredictResponse()
        found.verdict.visualization.data = image()
        return found


async def test_a_heat_map_says_what_was_said_of_the_frame_though_another_threshold_decides_now(tmp_path: Path) -> None:
    worker = Worker()  # type: ignore[abstract]
    handle = create_server("127.0.0.1:0", access=ACCESS, security=SecuritySettings())
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(worker, handle.server)
    await handle.start()
    async with review_site(tmp_path, inference_address=f"127.0.0.1:{handle.port}") as site:
        await site.frames.write([record(1)])
        client = await site.logged_in()
        for version in (1, 2):  # the one that judged the frame, then another
            digest = f"sha256:{version:064}"
            await site.streams.routing.promote(M, version=version, digest=digest, threshold=0.25)
            assert (await client.get(f"/m/{M}/f/line-1/f1/ai-view")).status == 200
    await handle.drain(0)
    assert [one.HasField("threshold") and one.threshold for one in worker.asked] == [0.5, False]


async def test_the_workers_of_an_anomalymodel_are_asked_wherever_it_is_and_whatever_its_name(tmp_path: Path) -> None:
    handle = create_server("127.0.0.1:0", access=ACCESS, security=SecuritySettings())
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Worker(), handle.server)  # type: ignore[abstract]
    await handle.start()
    (tmp_path / "line-1").mkdir()
    (tmp_path / "line-1" / "solar").write_text(f"127.0.0.1:{handle.port}")
    async with review_site(tmp_path, inference_address=f"file:{tmp_path}/{{namespace}}/{{resource}}") as site:
        await site.frames.write([record(1)])
        client = await site.logged_in()
        answer = await client.get(f"/m/{M}/f/line-1/f1/ai-view")
        assert (answer.status, "no worker of cells" in await answer.text()) == (503, True)
        await site.streams.routing.write(M, live=Live(1, "sha256:1", None), managed_by="line-1/solar")
        assert (await client.get(f"/m/{M}/f/line-1/f1/ai-view")).status == 200
    await handle.drain(0)


async def test_sessions_end_by_themselves_and_are_bounded(site: Site) -> None:
    client = await site.logged_in()
    site.clock[0] += 59
    assert (await client.get("/", allow_redirects=False)).status == 200
    site.clock[0] += 61
    assert (await client.get("/", allow_redirects=False)).status == 303
    client = await site.logged_in()
    for number in range(MOST):
        site.sessions.begin(f"p{number}", "")
    assert (await client.get("/", allow_redirects=False)).status == 303


async def test_where_storage_is_away_the_page_says_so(site: Site) -> None:
    client = await site.logged_in()
    await site.storage.drain(0)
    answer = await client.get("/")
    assert answer.status == 503
    assert "That did not work" in await answer.text()


async def test_a_new_certificate_is_served_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "ROTATION_S", 0.05)
    cert, key, port = tmp_path / "tls.crt", tmp_path / "tls.key", free_port()

    def issue() -> str:
        issued = trustme.CA().issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(key)
        issued.cert_chain_pems[0].write_to_path(cert)
        return issued.cert_chain_pems[0].bytes().decode()

    async def served() -> str:
        return await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))

    async def until(expected: str) -> None:
        async with asyncio.timeout(20):
            while True:
                with suppress(OSError):
                    if (await served()).split() == expected.split():
                        return
                await asyncio.sleep(0.05)

    first = issue()
    stop = asyncio.Event()
    settings = Settings(review_bind=f"127.0.0.1:{port}", tls_cert_file=cert, tls_key_file=key)
    serving = asyncio.create_task(bootstrap.serve(settings, stop))
    await until(first)
    key.write_text("in the middle of a rotation")
    await until(first)
    await until(issue())
    stop.set()
    await serving


@pytest.mark.parametrize("data", [b"", b"\x89PNG", image()[:40]])
def test_a_canvas_that_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput, match="drawn mask"):
        pictures.drawn(data)


def test_sixteen_bits_are_shown_at_their_brightness() -> None:
    file = io.BytesIO()
    Image.new("I;16", (4, 4), 0x8000).save(file, "TIFF")
    data, content_type = pictures.shown(file.getvalue(), "image/tiff")
    with Image.open(io.BytesIO(data)) as shown:
        assert (content_type, shown.getpixel((0, 0))) == ("image/png", 128)


def test_a_turned_webp_is_shown_turned_since_browsers_leave_it() -> None:
    exif = Image.Exif()
    plain, turned = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (6, 4)).save(plain, "WEBP")
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(turned, "WEBP", exif=exif)
    assert pictures.shown(plain.getvalue(), "image/webp") == (plain.getvalue(), "image/webp")
    data, content_type = pictures.shown(turned.getvalue(), "image/webp")
    with Image.open(io.BytesIO(data)) as shown:
        assert (content_type, shown.size) == ("image/png", (4, 6))


def test_a_canvas_without_a_mark_is_no_mask() -> None:
    assert pictures.drawn(image(mode="RGBA", fill=(255, 0, 0, 100))) == b""


async def publish(site: Site, version: int, metrics: str = "{}") -> None:
    info = ModelInfo(
        name=M,
        version=version,
        digest=f"sha256:{version:064}",
        size_bytes=3,
        formats=("onnxruntime",),
        published_at_us=T0,
        manifest=f"name: {M}\nlineage: {{metrics: {metrics}}}\n",
        published_by="trainer",
    )
    await site.models.upload(M, info.digest, 3, one_chunk(b"tar"))
    await site.models.publish(info)


async def test_a_model_without_frames_is_told_from_one_that_is_not_there(site: Site) -> None:
    client = await site.logged_in()
    for path in (f"/m/{M}", f"/m/{M}/next"):
        answer = await client.get(path)
        assert answer.status == 404
        assert f"there is no model {M}" in await answer.text()
    await publish(site, 1)
    assert (await client.get(f"/m/{M}")).status == 200
    assert "No frame has been judged yet" in await (await client.get(f"/m/{M}/next")).text()


async def test_a_models_page_shows_its_versions_with_roles_and_metrics_and_why_one_is_deprecated(site: Site) -> None:
    await publish(site, 1, "{auroc: 0.9123, f1: 0.8}")
    await publish(site, 2)
    await site.models.deprecate(M, 1, "blind on <edges>")
    await site.streams.routing.promote(M, version=2, digest=f"sha256:{2:064}", threshold=None)
    client = await site.logged_in()
    assert f'href="/m/{M}/next"' in await (await client.get("/")).text()
    text = await (await client.get(f"/m/{M}")).text()
    assert "auroc 0.912, f1 0.800" in re.sub(r"\s+", " ", text)
    assert "deprecated: blind on &lt;edges&gt;" in text
    assert "<td>2 <b>live</b></td>" in text
    assert "<td>1</td>" in text
    assert "No frame was judged in this time" in text
    assert (await client.get(f"/m/{M}?minutes=7")).status == 400


async def one_chunk(data: bytes) -> AsyncIterator[bytes]:
    yield data


def test_cameras_show_rate_and_scores_on_one_scale() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def frame(camera: str, score: float | None, after_s: int = 0) -> Frame:
        label = "" if score is None else "anomalous" if score >= 0.5 else "normal"
        at = now + timedelta(seconds=after_s)
        return Frame("f", camera, at, at, "image/png", 1, 1, 1, score, 0.5 + after_s, label, "", "")

    first, second = cameras([frame("b", 0.0), frame("a", 1.0), frame("b", 3.0, 1), frame("b", None)], 60.0)
    assert (first.name, first.frames, first.anomalous, first.per_minute) == ("a", 1, 1, 1.0)
    assert (second.name, second.frames, second.anomalous, second.per_minute) == ("b", 2, 1, 2.0)
    assert (first.high, second.high, first.threshold, second.threshold) == (3.0, 3.0, 1.5, 1.5)
    assert {place: found for place, found in enumerate(second.bins) if any(found)} == {0: (1, 0), BINS - 1: (0, 1)}


def test_bars_have_the_colours_of_the_labels_that_frames_got_whatever_decides_now() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def frame(label: str, threshold: float, after_s: int) -> Frame:
        at = now + timedelta(seconds=after_s)
        return Frame("f", "a", at, at, "image/png", 1, 1, 1, 0.5, threshold, label, "", "")

    (found,) = cameras([frame("anomalous", 0.4, 0), frame("normal", 0.6, 1)], 60.0)
    chart = str(charts.histogram(found))
    assert re.findall(r'class="(\w+)".*?<title>(.*?)</title>', chart) == [
        ("under", "1 normal frames"),
        ("over", "1 anomalous frames"),
    ]
    assert f'<line x1="{0.6 * charts.WIDTH:.1f}"' in chart
