"""The server: an OpenAI-compatible API whose answers can read a named memory, and the memories themselves.

Handlers are thin. Those that only look run in FastAPI's threads; the model and all writes run in the engine's one
thread; nothing of it blocks the event loop.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Header, Request, UploadFile
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import Counter, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longmem import __version__
from longmem.data.tokens import start_tokens, token_ids
from longmem.errors import LongMemError
from longmem.server import requests
from longmem.server.answers import Answer, Chat, Completion, ModelResponse, Service
from longmem.server.engine import RESPONSES
from longmem.server.requests import Refused, error, owner_of
from longmem.store import DocumentInfo, MemoryStore, Receipt

T = TypeVar("T")
PAGE = Path(__file__).parent / "page.html"
MOST_BYTES = 8 << 20
"""Of a request's body."""
LOOK = 0.2
"""Seconds between two looks whether a client is still there."""
COMPLETION_TOKENS = 16  # as in the OpenAI API
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "")
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'self'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'",
}


def create_app(
    model: Any,
    tokenizer: Any,
    store: MemoryStore,
    *,
    keys: dict[str, str] | None = None,
    name: str = "longmem",
    most_waiting: int = 256,
    rows: int = 16,
    seconds: float = 600.0,
) -> FastAPI:
    """The application.

    Args:
        model, tokenizer: any model of ours, in eval mode, and what its backbone reads with.
        store: a ``MemoryStore`` opened for writing with both; closed when the app shuts down.
        keys: see ``requests.owner_of``.
        name: by which the model is listed.
        most_waiting: requests that may wait for the model; one more gets 429.
        rows: answers that are generated together at most.
        seconds: after which a request is given up.
    """
    service = Service(model, tokenizer, store, keys or {}, name, seconds, most_waiting=most_waiting, rows=rows)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close)  # every accepted write is done
        store.close()

    async def failed(_: Request, problem: Exception) -> Response:
        return error(problem)

    app = FastAPI(title="LongMem", version=__version__, lifespan=lifespan, docs_url="/docs", redoc_url=None)
    app.state.service = service
    app.add_middleware(Limits, anybody=not keys, counts=service.requests)
    # starlette looks for the nearest class, and raises again what only ``Exception`` is for
    for kind in (HTTPException, RequestValidationError, LongMemError, TimeoutError, Exception):
        app.add_exception_handler(kind, failed)
    app.include_router(routes)
    return app


class Limits:
    """Around the application: what no handler sees, the headers of every answer, and a count of them.

    Args:
        anybody: no keys are asked for; then only names of this machine are answered, so that no page of another site
            can reach the server through a name of its own (DNS rebinding).
        counts: of answers, by path and status.
    """

    def __init__(self, app: ASGIApp, *, anybody: bool, counts: Counter) -> None:
        self.app, self.anybody, self.counts = app, anybody, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.counts.labels(route, message["status"]).inc()
                if not scope["path"].startswith("/docs"):
                    MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        refused = self._refused(Headers(scope=scope)) if scope["type"] == "http" else None
        await (self.app if refused is None else error(refused))(scope, receive, answer)

    def _refused(self, headers: Headers) -> Refused | None:
        host = headers.get("host", "")
        if "transfer-encoding" in headers or int(headers.get("content-length", "0")) > MOST_BYTES:
            return Refused(413, f"the body must say its length, and be of at most {MOST_BYTES:,} bytes")
        name = host[: host.index("]") + 1] if "]" in host else host.partition(":")[0].lower()
        if self.anybody and name not in LOOPBACK:
            return Refused(403, "without keys this server answers to localhost alone; make keys to serve other names")
        return None


routes = APIRouter()

# who asks, and for what


class Caller(NamedTuple):
    """A request, the service that it came to, and whose key it carries."""

    request: Request
    service: Service
    owner: str


async def caller(request: Request, authorization: Annotated[str | None, Header()] = None) -> Caller:
    service: Service = request.app.state.service
    return Caller(request, service, owner_of(service.keys, authorization))


Who = Annotated[Caller, Depends(caller)]


def own_memory(who: Who, memory: str) -> str:
    """The namespace of the memory in the path."""
    return who.service.memories.own(who.owner, memory)


Mine = Annotated[str, Depends(own_memory)]
MemoryHeader = Annotated[str | None, Header(alias="X-Memory-Id", pattern=f"^{requests.NAME}$")]
ResponseId = Annotated[str, PathParameter(pattern=requests.RESPONSE)]


async def named_memory(who: Caller, body: requests.GenerationRequest, header: str | None) -> str | None:
    """The namespace of the memory that a request names; without a name it has none, never a shared one."""
    named = body.memory_id or header
    if named is not None:
        return await asyncio.to_thread(own_memory, who, named)
    if body.remember:
        raise Refused(400, "remember needs memory_id: what is kept must have a place", param="memory_id")
    return None


# answers


@routes.post("/v1/chat/completions")
async def chat(body: requests.ChatRequest, who: Who, x_memory_id: MemoryHeader = None) -> Response:
    """Answer a conversation, reading the memory that ``memory_id`` or ``X-Memory-Id`` names."""
    memory = await named_memory(who, body, x_memory_id)
    messages = [message.plain for message in body.messages]
    prompt = await asyncio.to_thread(who.service.prompt, messages, memory, body.recall)
    made = who.service.answers(prompt.ids, body, body.max_completion_tokens or body.max_tokens, memory)
    return await answered(who.request, Chat(who.service, body, made, memory, messages, prompt.recalled))


@routes.post("/v1/completions")
async def complete(body: requests.CompletionRequest, who: Who, x_memory_id: MemoryHeader = None) -> Response:
    """Continue one prompt or several, reading the memory that ``memory_id`` or ``X-Memory-Id`` names."""
    memory = await named_memory(who, body, x_memory_id)
    most, made = body.max_tokens or COMPLETION_TOKENS, list[Answer]()
    tokenizer = who.service.tokenizer
    for prompt in body.prompt:
        ids = [*start_tokens(tokenizer), *token_ids(tokenizer, prompt)]
        made += who.service.answers(ids, body, most, memory, first=len(made), chat=False)
    messages = [{"role": "user", "content": body.prompt[0]}]
    return await answered(who.request, Completion(who.service, body, made, memory, messages))


@routes.post("/v1/responses")
async def respond(body: requests.ResponsesRequest, who: Who, x_memory_id: MemoryHeader = None) -> Response:
    """Answer, going on from ``previous_response_id``; what is said is a document of the memory."""
    memory = await named_memory(who, body, x_memory_id)
    place = memory or f"{who.owner}/{RESPONSES}"
    messages = [message.plain for message in body.messages]
    if body.previous_response_id is not None:
        earlier = await asyncio.to_thread(who.service.memories.document, place, body.previous_response_id)
        messages = [*earlier.metadata["messages"], *messages]
    told = [{"role": "system", "content": body.instructions}] if body.instructions else []
    prompt = await asyncio.to_thread(who.service.prompt, [*told, *messages], memory, body.recall)
    made = who.service.answers(prompt.ids, body, body.max_output_tokens, memory)
    return await answered(who.request, ModelResponse(who.service, body, made, place, messages, prompt.recalled))


@routes.get("/v1/responses/{response}")
def show_response(response: ResponseId, who: Who, x_memory_id: MemoryHeader = None) -> Any:
    """A stored response; of one that named a memory, with its ``X-Memory-Id``."""
    found = who.service.memories.document(f"{who.owner}/{x_memory_id or RESPONSES}", response)
    return found.metadata["response"]


@routes.delete("/v1/responses/{response}")
async def forget_response(response: ResponseId, who: Who, x_memory_id: MemoryHeader = None) -> Any:
    """Forget a stored response."""
    await forgotten(who.service, f"{who.owner}/{x_memory_id or RESPONSES}", response)
    return {"id": response, "object": "response", "deleted": True}


async def answered(request: Request, exchange: Chat | ModelResponse) -> Response:
    """The answers at once or as server-sent events; the first piece is waited for, so that errors have a status."""
    seconds = exchange.service.seconds

    async def whole() -> Response:
        async for _ in exchange.pieces():
            pass
        return JSONResponse(exchange.whole())

    async def sse(events: AsyncGenerator[str, None], first: str) -> AsyncIterator[str]:
        try:
            yield first
            async with aclosing(events), asyncio.timeout(seconds):
                async for event in events:
                    yield event
        except Exception as problem:
            yield f"data: {bytes(error(problem).body).decode()}\n\n"

    async with asyncio.timeout(seconds):
        if not exchange.body.stream:
            return await while_there(request, whole())
        events = exchange.events()
        first = await while_there(request, anext(events))
    return StreamingResponse(sse(events, first), media_type="text/event-stream")


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do something for a client; when it leaves first, the work is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=LOOK))[0]:
            if await request.is_disconnected():
                raise Refused(499, "the client has left")  # nobody reads this
        return task.result()
    finally:
        task.cancel()


# models


@routes.get("/v1/models")
async def list_models(who: Who) -> Any:
    """The one model that is served."""
    return {"object": "list", "data": [await one_model(who.service.name, who)]}


@routes.get("/v1/models/{model_id:path}")
async def one_model(model_id: str, who: Who) -> Any:
    """The model, by its name."""
    if model_id != who.service.name:
        said = f"there is no model {model_id[:100]!r} here; this is {who.service.name}"
        raise Refused(404, said, code="model_not_found")
    return {"id": model_id, "object": "model", "created": 0, "owned_by": "longmem"}


# memories


@routes.get("/v1/memories")
def list_memories(who: Who) -> Any:
    """Your memories with their sizes."""
    return {"object": "list", "data": who.service.memories.listed(who.owner)}


@routes.post("/v1/memories", status_code=201)
def create_memory(body: requests.NewMemory, who: Who) -> Any:
    """Make an empty memory of your own."""
    return who.service.memories.shown(who.service.memories.create(who.owner, body.id))


@routes.get("/v1/memories/{memory}")
def show_memory(memory: Mine, who: Who) -> Any:
    """A memory and its documents."""
    documents = [document_card(info) for info in who.service.memories.store.documents(memory)]
    return {**who.service.memories.shown(memory), "data": documents}


@routes.delete("/v1/memories/{memory}")
async def forget_memory(memory: Mine, who: Who) -> Any:
    """Forget all of a memory."""
    gone = await forgotten(who.service, memory)
    return {"id": memory.partition("/")[2], "object": "memory", "deleted": True, "documents": len(gone)}


@routes.post("/v1/memories/{memory}/documents", status_code=201)
async def add_document(memory: Mine, body: requests.NewText, who: Who) -> Any:
    """Add a text; when this is answered it is on the disk."""
    receipt = await who.service.add(memory, body.model_dump(exclude_defaults=True))
    return receipt_card(receipt)


@routes.post("/v1/memories/{memory}/files", status_code=201)
async def add_file(memory: Mine, file: UploadFile, who: Who) -> Any:
    """Add the texts of a file: .txt, .md, .rst, .tex, .py, or .jsonl with a field text."""
    receipts = list[Receipt]()
    for name, text in await asyncio.to_thread(requests.texts_of, file.filename or "", await file.read()):
        # what was begun is not refused halfway because the queue is full
        receipts.append(await who.service.add(memory, {"name": name, "text": text}, follows=bool(receipts)))
    return {"object": "list", "data": [receipt_card(receipt) for receipt in receipts]}


@routes.get("/v1/memories/{memory}/documents/{document:path}")
def show_document(memory: Mine, document: str, who: Who) -> Any:
    """A document with its text."""
    store = who.service.memories.store
    with store.catalog.read():  # of one moment: it may be forgotten meanwhile
        info = who.service.memories.document(memory, document)
        return {**document_card(info), "text": store.text(memory, info.name)}


@routes.delete("/v1/memories/{memory}/documents/{document:path}")
async def forget_document(memory: Mine, document: str, who: Who) -> Any:
    """Forget a document: no search and no answer finds it any more."""
    (gone,) = await forgotten(who.service, memory, document)
    return {"name": gone.name, "object": "document", "deleted": True}


@routes.post("/v1/memories/{memory}/search")
def search(memory: Mine, body: requests.SearchRequest, who: Who) -> Any:
    """Passages that share words with a query, best first."""
    found = who.service.memories.recall(memory).search(body.query, body.top)
    return {"object": "list", "data": [vars(passage) for passage in found]}


@routes.get("/v1/memories/{memory}/export")
def export(memory: Mine, who: Who) -> Response:
    """All documents with their texts, as JSON lines that ``longmem memory add`` reads."""
    tokenizer, lines = who.service.tokenizer, ""
    with who.service.memories.store.catalog.apart() as moment:
        for info in moment.documents(memory):
            text = moment.whole(info).spelled(tokenizer)
            lines += json.dumps({"id": info.name, "text": text, "metadata": info.metadata}, ensure_ascii=False) + "\n"
    return PlainTextResponse(lines, media_type="application/x-ndjson")


async def forgotten(service: Service, memory: str, document: str | None = None) -> list[DocumentInfo]:
    """Forget a document, or all of a memory; returns what is gone."""
    return await service.engine.call(partial(service.memories.forget, memory, document))


def receipt_card(receipt: Receipt) -> dict[str, Any]:
    """What became of a document that was added."""
    return {"object": "document", "name": receipt.name, "status": receipt.status, "tokens": receipt.tokens}


def document_card(info: DocumentInfo) -> dict[str, Any]:
    """A document without its text; the metadata of a stored response is its own record."""
    about = {key: getattr(info, key) for key in ("name", "tokens", "chunks", "added", "revision")}
    metadata = {} if re.fullmatch(requests.RESPONSE, info.name) else info.metadata
    return {"object": "document", **about, "metadata": metadata}


# the server itself


@routes.head("/health", include_in_schema=False)
@routes.get("/health")
async def health(request: Request) -> Any:
    """Whether it answers."""
    service: Service = request.app.state.service
    return {"status": "ok", "model": service.name, "waiting": service.engine.waiting}


@routes.get("/metrics", response_class=PlainTextResponse)
async def metrics(who: Who) -> Any:
    """Counters in Prometheus' format."""
    return PlainTextResponse(generate_latest(who.service.registry).decode())


@routes.head("/", include_in_schema=False)
@routes.get("/", include_in_schema=False)
async def page() -> Response:
    """The page for people."""
    return FileResponse(PAGE, media_type="text/html")
