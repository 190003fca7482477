"""The pages: every one is made here, on the server; the script only draws the mask and knows the keys."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import grpc
from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined
from vigil_common.errors import InvalidInput
from vigil_common.logging import get_logger

from vigil_review import charts, metrics, pictures
from vigil_review.backend import VALUES, BackendError
from vigil_review.domain import cameras

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from vigil_review.backend import Backend
    from vigil_review.domain import Detail
    from vigil_review.sessions import Session, Sessions

COOKIE = "vigil_review"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A page that comes back from the browser's store would say the same thing twice.
    "Cache-Control": "no-store",
}
ASSETS = {"style.css": "text/css", "review.js": "text/javascript", "icon.svg": "image/svg+xml"}
QUEUE_SIZE = 10
SPANS_MIN = {5: "5 min", 60: "1 h", 24 * 60: "24 h"}
DEFAULT_SPAN_MIN = 60
# Grace for the form around the mask.
MAX_REQUEST_BYTES = pictures.MAX_MASK_BYTES + (1 << 20)
MAX_NAME, MAX_TOKEN = 64, 4_096
STATUSES = {
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 503,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 503,
}

NO_MODEL = "there is no model {}"
LOGGED_OUT = "you have been logged out: log in in another tab, then repeat"

log = get_logger()

BACKEND: web.AppKey[Backend] = web.AppKey("backend")
SESSIONS: web.AppKey[Sessions] = web.AppKey("sessions")
SECURE: web.AppKey[bool] = web.AppKey("secure", bool)
PAGES: web.AppKey[Environment] = web.AppKey("pages", Environment)
SESSION: web.RequestKey[Session] = web.RequestKey("session")


def create_app(backend: Backend, sessions: Sessions, *, secure: bool) -> web.Application:
    """The application.

    Args:
        backend: Storage and workers.
        sessions: Who is logged in.
        secure: Whether it is served over HTTPS, so that the cookie is never sent otherwise.
    """
    app = web.Application(middlewares=[_answered, _logged_in], client_max_size=MAX_REQUEST_BYTES)
    app[BACKEND], app[SESSIONS], app[SECURE] = backend, sessions, secure
    app[PAGES] = Environment(
        loader=PackageLoader("vigil_review"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    app[PAGES].filters["when"] = _when
    app.add_routes(
        [
            web.get("/healthz", _healthz),
            web.get("/static/{name}", _asset),
            web.get("/login", _login_page),
            web.post("/login", _login),
            web.post("/logout", _logout),
            web.get("/", _models),
            web.get("/m/{model}", _model),
            web.get("/m/{model}/next", _next),
            web.get("/m/{model}/f/{camera}/{frame_id}", _frame),
            web.post("/m/{model}/f/{camera}/{frame_id}", _annotate),
            web.get("/m/{model}/f/{camera}/{frame_id}/{picture:image|mask|ai-view|ai-mask}", _picture),
        ]
    )
    return app


def _when(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC")


def _see(location: str) -> web.Response:
    return web.Response(status=303, headers={"Location": location})


def _page(request: web.Request, template: str, *, status: int = 200, **values: Any) -> web.Response:
    session: Session | None = request.get(SESSION)
    notice, csrf, name = "", "", ""
    if session is not None:
        notice, session.notice = session.notice, ""
        csrf, name = session.csrf, session.name
    text = request.app[PAGES].get_template(template).render(notice=notice, csrf=csrf, name=name, **values)
    return web.Response(text=text, content_type="text/html", status=status)


@web.middleware
async def _answered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors become pages, and every answer gets the headers that keep strangers out of it."""
    result = "shown"
    try:
        response = await handler(request)
    except web.HTTPException as error:
        result = "refused"
        response = _page(request, "error.html", status=error.status, message=error.text or error.reason)
    except InvalidInput as error:
        result = "refused"
        response = _page(request, "error.html", status=400, message=error.message)
    except BackendError as error:
        if error.code is grpc.StatusCode.UNAUTHENTICATED:
            request.app[SESSIONS].end(request.cookies.get(COOKIE, ""))
            if request.method == "POST":  # what was painted stays on the page
                response = _page(request, "error.html", status=401, message=LOGGED_OUT)
            else:
                response = _see("/login")
        else:
            status = STATUSES.get(error.code, 502)
            log.warning("refused", code=error.code.name, message=str(error))
            result = "away" if status >= 500 else "refused"  # noqa: PLR2004
            response = _page(request, "error.html", status=status, message=str(error))
    metrics.PAGES.labels(result).inc()
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    log.info("request", method=request.method, path=request.path, status=response.status)
    return response


@web.middleware
async def _logged_in(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Nobody gets past without a session; a form must come from one of its pages."""
    path = request.path
    if request.method == "POST" and request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        raise web.HTTPForbidden(text="this form comes from another site")
    if path in ("/healthz", "/login") or path.startswith("/static/"):
        return await handler(request)
    session = request.app[SESSIONS].get(request.cookies.get(COOKIE, ""))
    if session is None:
        if request.method == "POST":
            raise web.HTTPUnauthorized(text=LOGGED_OUT)
        return _see("/login")
    request[SESSION] = session
    if request.method == "POST":
        form = await request.post()
        csrf = form.get("csrf")
        if not isinstance(csrf, str) or not session.owns(csrf):
            raise web.HTTPForbidden(text="this form is stale: go back, load the page again, and repeat")
    return await handler(request)


async def _healthz(_request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


async def _asset(request: web.Request) -> web.Response:
    kind = ASSETS.get(request.match_info["name"])
    if kind is None:
        raise web.HTTPNotFound(text="there is no such file")
    body = files("vigil_review").joinpath("static", request.match_info["name"]).read_bytes()
    return web.Response(body=body, content_type=kind, charset="utf-8", headers={"Cache-Control": "no-cache"})


async def _login_page(request: web.Request) -> web.Response:
    return _page(request, "login.html", message="")


async def _login(request: web.Request) -> web.Response:
    form = await request.post()
    name, token = (str(form.get(field, "")).strip() for field in ("name", "token"))
    if not name or len(name) > MAX_NAME or not name.isprintable():
        return _page(request, "login.html", status=400, message=f"say who you are, in 1 to {MAX_NAME} characters")
    if len(token) > MAX_TOKEN or (not (token.isascii() and token.isprintable()) and token):
        return _page(request, "login.html", status=400, message="this is no token")
    try:
        await request.app[BACKEND].models(token)
    except BackendError as error:
        log.warning("login_refused", code=error.code.name, message=str(error))
        refused = error.code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
        return _page(request, "login.html", status=403 if refused else 503, message=str(error))
    response = _see("/")
    key = request.app[SESSIONS].begin(name, token)
    response.set_cookie(COOKIE, key, httponly=True, samesite="Strict", secure=request.app[SECURE], path="/")
    return response


async def _logout(request: web.Request) -> web.Response:
    request.app[SESSIONS].end(request.cookies.get(COOKIE, ""))
    response = _see("/login")
    response.del_cookie(COOKIE, path="/")
    return response


async def _models(request: web.Request) -> web.Response:
    models = await request.app[BACKEND].models(request[SESSION].token)
    return _page(request, "models.html", models=models)


async def _model(request: web.Request) -> web.Response:
    """Versions, rate and scores per camera."""
    name, session, backend = request.match_info["model"], request[SESSION], request.app[BACKEND]
    try:
        minutes = int(request.query.get("minutes", DEFAULT_SPAN_MIN))
    except ValueError as error:
        raise web.HTTPBadRequest(text="minutes is a number") from error
    if minutes not in SPANS_MIN:
        raise web.HTTPBadRequest(text=f"minutes is one of {', '.join(map(str, SPANS_MIN))}")
    versions, roles = await backend.models(session.token, name), await backend.roles(session.token, name)
    start = datetime.now(UTC) - timedelta(minutes=minutes)
    frames, complete = await backend.since(session.token, name, start)
    if not frames and name not in versions:
        raise web.HTTPNotFound(text=NO_MODEL.format(name))
    end = datetime.now(UTC) if complete or not frames else frames[-1].stored_at
    found = cameras(frames, (end - start).total_seconds())
    return _page(
        request,
        "model.html",
        model=name,
        versions=versions.get(name, []),
        roles=roles,
        cameras=[(camera, charts.histogram(camera)) for camera in found],
        frames=len(frames),
        complete=complete,
        minutes=minutes,
        spans=SPANS_MIN,
    )


def _place(model: str, camera: str, frame_id: str) -> str:
    return f"/m/{quote(model, safe='')}/f/{quote(camera, safe='')}/{quote(frame_id, safe='')}"


async def _next(request: web.Request) -> web.Response:
    """The next frame of this person's queue; more are asked for when it is empty."""
    model, session = request.match_info["model"], request[SESSION]
    again = "again" in request.query
    waiting = session.waiting.setdefault(model, deque())
    if not waiting or again:
        found = await request.app[BACKEND].queue(session.token, model, session.name, size=QUEUE_SIZE, again=again)
        waiting.clear()
        waiting.extend(found)
    if not waiting:
        backend = request.app[BACKEND]
        judged = await backend.has_judged(session.token, model)
        if not judged and not await backend.models(session.token, model):
            raise web.HTTPNotFound(text=NO_MODEL.format(model))
        return _page(request, "done.html", model=model, judged=judged)
    # It waits until its page has been made: whoever clicks twice would pass over one unseen.
    frame_id, camera, why = waiting[0]
    return _see(f"{_place(model, camera, frame_id)}?why={quote(why)}")


async def _detail(request: web.Request, *, reviewer: str = "") -> Detail:
    found: Mapping[str, str] = request.match_info
    return await request.app[BACKEND].frame(
        request[SESSION].token, found["model"], found["frame_id"], found["camera"], reviewer=reviewer
    )


async def _frame(request: web.Request) -> web.Response:
    """A frame to look at."""
    session, found = request[SESSION], request.match_info
    model = found["model"]
    waiting = session.waiting.get(model, deque())
    try:
        detail = await _detail(request, reviewer=session.name)
    finally:
        if waiting and waiting[0][:2] == (found["frame_id"], found["camera"]):
            waiting.popleft()
    return _page(
        request,
        "frame.html",
        model=model,
        frame=detail.frame,
        history=detail.history,
        masked=bool(detail.mask),
        place=_place(model, detail.frame.camera, detail.frame.frame_id),
        why=request.query.get("why", ""),
        waiting=len(waiting),
        has_workers=request.app[BACKEND].has_workers,
        annotation_id=f"a{uuid.uuid4().hex}",
    )


async def _picture(request: web.Request) -> web.Response:
    """The image, the mask that stands, or the live version's own view of it."""
    detail, kind = await _detail(request), request.match_info["picture"]
    body, content_type = detail.mask, "image/png"
    if kind == "image":
        body, content_type = await asyncio.to_thread(pictures.shown, detail.image, detail.frame.content_type)
    elif kind != "mask":
        if not request.app[BACKEND].has_workers:
            raise web.HTTPNotFound(text="no worker is known here: set VIGIL_INFERENCE_ADDRESS")
        token, model = request[SESSION].token, request.match_info["model"]
        view, mask = await request.app[BACKEND].pictures(token, model, detail)
        body = view if kind == "ai-view" else mask
    if not body:
        raise web.HTTPNotFound(text="there is no such picture of this frame")
    return web.Response(body=body, content_type=content_type)


async def _annotate(request: web.Request) -> web.Response:
    """Keep what the person says, and go on."""
    form, found, session = await request.post(), request.match_info, request[SESSION]
    label = str(form.get("label", ""))
    if label not in VALUES:
        raise web.HTTPBadRequest(text="say normal, anomalous or unsure")
    mask = b""
    upload = form.get("mask")
    if isinstance(upload, web.FileField) and label != "normal":
        mask = await asyncio.to_thread(pictures.drawn, upload.file.read())
    elif upload is None and label != "normal":  # without the script, who can't wipe the mask that stands keeps it
        mask = (await _detail(request)).mask
    applied = await request.app[BACKEND].annotate(
        session.token,
        found["model"],
        found["frame_id"],
        camera=found["camera"],
        label=label,
        author=session.name,
        note=str(form.get("note", "")),
        mask=mask,
        annotation_id=str(form.get("annotation_id", "")),
    )
    metrics.ANNOTATIONS.labels(label).inc()
    session.notice = f"{label}{' with a mask' if mask else ''}: kept"
    if not applied:
        session.notice += ", and will show on the frame once the store is back"
    return _see(f"/m/{quote(found['model'], safe='')}/next")
