"""Which address answers what.  The page itself is static; these are the few things it asks for.

    GET  /  /static/…  /charts/NAME.json  /vega.js           the page
    GET  /api/document  /api/events                         what there is, and when that changes
    GET  /api/tile  /api/palette  /api/picture  /api/fit    read or computed when a view asks
    POST /api/answer  /api/forced                           both models run
    GET  /api/forms   POST /api/command                     the forms of jobs and the commands they stand for
    GET  /api/jobs  /api/jobs/ID   POST /api/jobs  /api/jobs/ID/cancel

Errors are {"error": {"thing", "reason", "way_out"}}, as the command line prints them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from dither.dashboard.events import Hub
from dither.dashboard.jobs import Jobs
from dither.dashboard.results import Results
from dither.dashboard.watch import Watch
from dither.errors import DitherError, SourceError, UsageError
from dither.reporting.single_file import charts, library_path, vega
from dither.system import isolated

LOOK, TICK = 1.0, 0.5  # seconds between two looks at the folders, at the jobs
_NOT_KEPT = {"cache-control": "no-store"}
_ASK_AGAIN = {"cache-control": "no-cache"}  # kept, but asked about


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JobRequest(Body):
    kind: Annotated[str, Field(max_length=40)]
    fields: Annotated[dict[str, Any], Field(max_length=60)] = {}


class Ask(Body):
    run: Annotated[str, Field(max_length=200)]
    prompt: Annotated[str, Field(min_length=1, max_length=20_000)]
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 128


class Text(Body):
    run: Annotated[str, Field(max_length=200)]
    text: Annotated[str, Field(min_length=1, max_length=20_000)]


Name = Annotated[str, Query(max_length=500)]
Index = Annotated[int, Query(ge=0, le=2**40)]


def build(results: Results, jobs: Jobs, watch: Watch) -> FastAPI:
    """The application.  Watching and jobs move as long as it runs."""
    hub = Hub()
    library = threading.Thread(target=_make_library, daemon=True)
    jobs.told = partial(_tell_of_job, hub, results, watch)

    @contextlib.asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        hub.loop = asyncio.get_running_loop()
        library.start()
        tasks = [asyncio.create_task(_looking(watch, results, hub)), asyncio.create_task(_ticking(jobs))]
        try:
            yield
        finally:
            hub.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            results.close()

    app = FastAPI(title="Dither", docs_url=None, redoc_url=None, openapi_url=None, lifespan=running)
    app.state.hub = hub
    _add_errors(app)
    _add_page(app, library)
    _add_results(app, results, hub)
    _add_answers(app, results)
    _add_jobs(app, jobs)
    return app


def _tell_of_job(hub: Hub, results: Results, watch: Watch, job: dict[str, Any]) -> None:
    hub.publish({"type": "job", "job": job})
    if job["state"] == "done" and job["kind"] in ("quantize", "measure") and job["made"]:
        made = Path(job["folder"]) / job["made"]
        if not any(path.absolute() in (made, *made.parents) for path in results.paths):
            results.paths.append(made)  # it went elsewhere, and should be seen all the same
            watch.add(made)


async def _looking(watch: Watch, results: Results, hub: Hub) -> None:
    while True:
        await asyncio.sleep(LOOK)
        if await asyncio.to_thread(watch.changed):
            await asyncio.to_thread(results.renew)  # it waits for a look that is under way
            hub.publish({"type": "document"})


async def _ticking(jobs: Jobs) -> None:
    while True:
        await asyncio.to_thread(jobs.tick)
        await asyncio.sleep(TICK)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(DitherError)
    async def known(_: Request, error: DitherError) -> JSONResponse:
        status = 404 if isinstance(error, SourceError) else 400 if isinstance(error, UsageError) else 422
        return JSONResponse({"error": error.to_json()}, status)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part)[:60] for part in first["loc"][1:]) or "the request"
        return JSONResponse({"error": DitherError(field, first["msg"]).to_json()}, 400)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        said = DitherError(request.url.path[:200], str(error.detail)).to_json()
        return JSONResponse({"error": said}, error.status_code, error.headers)


def _make_library() -> None:
    """Seconds, the first time, in which the bundler lets no other thread run: so in its own process."""
    if not library_path().exists():
        command = isolated.command("dither.reporting.single_file", "vega")
        subprocess.run(command, check=False, capture_output=True)


def _add_page(app: FastAPI, library: threading.Thread) -> None:
    folder = Path(str(files("dither.reporting") / "page"))

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(folder / "index.html", headers=_NOT_KEPT)

    @app.get("/vega.js")
    def vega_library() -> Response:
        library.join()
        return Response(vega(), media_type="text/javascript", headers={"cache-control": "private, max-age=3600"})

    @app.get("/charts/{name}.json")
    def chart(name: str) -> JSONResponse:
        known = charts()
        if name not in known:
            raise SourceError(f"chart {name[:60]}", "is not known")
        return JSONResponse(known[name], headers=_ASK_AGAIN)

    app.mount("/static", _Static(directory=folder))


class _Static(StaticFiles):
    """Asked about each time, so that an upgrade is seen; unchanged files cost an empty answer."""

    def file_response(self, *given: Any, **options: Any) -> Response:
        answer = super().file_response(*given, **options)
        answer.headers.update(_ASK_AGAIN)
        return answer


def _add_results(app: FastAPI, results: Results, hub: Hub) -> None:
    @app.get("/api/document")
    def document() -> Response:
        return Response(results.text(), media_type="application/json", headers=_NOT_KEPT)

    @app.get("/api/events")
    async def events() -> StreamingResponse:
        return StreamingResponse(hub.listen(), media_type="text/event-stream", headers=_NOT_KEPT)

    @app.get("/api/tile")
    def tile(
        run: Name, tensor: Name, row: Index = 0, column: Index = 0, size: Annotated[int, Query(ge=1, le=256)] = 64
    ) -> dict[str, Any]:
        from dither.reporting.tiles import tile

        return tile(*results.models(run), tensor, row=row, column=column, size=size).to_json()

    @app.get("/api/palette")
    def palette(run: Name, tensor: Name, row: Index = 0, block: Index = 0) -> dict[str, Any]:
        from dither.reporting.palette import palette

        return palette(*results.models(run), tensor, row=row, block=block).to_json()

    @app.get("/api/picture")
    def picture(types: Name = "") -> dict[str, Any]:
        from dither.reporting.picture import picture

        kinds = [kind for kind in types.split(",") if kind][:20]
        return (picture(kinds) if kinds else picture()).to_json()

    @app.get("/api/fit")
    def fit(
        context: Annotated[int, Query(ge=1, le=2**28)] = 8192,
        kv: Name = "f16",
        slots: Annotated[int, Query(ge=1, le=4096)] = 1,
    ) -> dict[str, Any]:
        from dither.capacity.fit import fit

        return fit(results.original(), context=context, kv=kv, slots=slots).to_json()


def _add_answers(app: FastAPI, results: Results) -> None:
    busy = threading.Lock()  # both models take all the memory and cores there are: one at a time

    @app.post("/api/answer")
    def answer(ask: Ask) -> StreamingResponse:
        return StreamingResponse(_told(results, ask, busy), media_type="text/event-stream", headers=_NOT_KEPT)

    @app.post("/api/forced")
    def forced(given: Text) -> dict[str, Any]:
        from dither.reporting.answers import forced

        with _turn(busy):
            return forced(*results.paths_of(given.run), given.text).model_dump(mode="json")


def _told(results: Results, ask: Ask, busy: threading.Lock) -> Iterator[str]:
    """An answer's pieces as events; an error is the last of them, because the answer has begun."""
    try:
        with _turn(busy):
            for piece in results.answer(ask.run, ask.prompt, ask.max_tokens):
                yield f"data: {json.dumps(piece)}\n\n"
    except DitherError as error:
        yield f"data: {json.dumps({'error': error.to_json()})}\n\n"


@contextlib.contextmanager
def _turn(busy: threading.Lock) -> Iterator[None]:
    if not busy.acquire(timeout=1):
        raise UsageError("the models", "are answering something else", "Wait until they have ended.")
    try:
        yield
    finally:
        busy.release()


def _add_jobs(app: FastAPI, jobs: Jobs) -> None:
    app.get("/api/forms")(jobs.forms.to_json)
    app.get("/api/jobs")(jobs.all)
    app.get("/api/jobs/{job_id}")(jobs.get)
    app.post("/api/jobs/{job_id}/cancel")(jobs.cancel)

    @app.post("/api/command")
    def command(job: JobRequest) -> dict[str, Any]:
        return jobs.forms.command(job.kind, job.fields).to_json()

    @app.post("/api/jobs")
    def start(job: JobRequest) -> dict[str, Any]:
        return jobs.start(job.kind, job.fields)
