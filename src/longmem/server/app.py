"""The server: an OpenAI-compatible API whose answers can read a named memory, and the memories themselves.

Handlers are thin. The model and all writes run in the engine's one thread; nothing of it blocks the event loop.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from longmem import __version__
from longmem.errors import LongMemError
from longmem.server import openai_api as shapes
from longmem.server.answering import Answering
from longmem.server.engine import Busy, Engine
from longmem.server.keys import NAME, Keys
from longmem.server.memories import RESPONSES, Memories
from longmem.server.refusals import Refused, error, said_of
from longmem.server.schemas import (
    ChatRequest,
    CompletionRequest,
    NewMemory,
    NewText,
    ResponsesRequest,
    SearchRequest,
)

PAGE = Path(__file__).parent / "page.html"
MOST_BYTES = 8 << 20
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
    store: Any,
    *,
    keys: Keys | None = None,
    name: str = "longmem",
    most_waiting: int = 256,
    rows: int = 16,
    seconds: float = 600.0,
    most_bytes: int = MOST_BYTES,
) -> FastAPI:
    """The application.

    Args:
        model: any of ours, in eval mode.
        tokenizer: of its backbone.
        store: a ``MemoryStore`` opened for writing with both; closed when the app shuts down.
        keys: who may use it; None is everybody, as one owner.
        name: by which the model is listed.
        most_waiting: requests that may wait for the model; one more gets 429.
        rows: answers that are generated together at most.
        seconds: after which a request is given up.
        most_bytes: of a request's body.
    """
    allowed = keys or Keys({})
    memories = Memories(store)
    engine = Engine(model, most_waiting=most_waiting, rows=rows)
    answering = Answering(engine, tokenizer, memories)
    registry = CollectorRegistry()
    requests = Counter("longmem_requests", "Requests by path and status", ["path", "status"], registry=registry)
    produced = Counter("longmem_tokens", "Tokens generated", registry=registry)
    written = Counter("longmem_memory_tokens", "Tokens written to memories", registry=registry)
    first = Histogram("longmem_first_token_seconds", "Time to the first token", registry=registry)
    Gauge("longmem_queue", "Requests that wait for the model", registry=registry).set_function(lambda: engine.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)  # every accepted write is done
        store.close()

    app = FastAPI(title="LongMem", version=__version__, lifespan=lifespan, docs_url="/docs", redoc_url=None)

    @app.middleware("http")
    async def limits(request: Request, follow: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most_bytes or "transfer-encoding" in request.headers:
            answer: Response = error(413, f"the body must say its length, and be of at most {most_bytes:,} bytes")
        else:
            answer = await follow(request)
        route = getattr(request.scope.get("route"), "path", "other")
        requests.labels(route, answer.status_code).inc()
        answer.headers.update(SECURITY if not request.url.path.startswith("/docs") else {})
        return answer

    @app.exception_handler(Refused)
    async def refused(_: Request, problem: Refused) -> Response:
        return error(problem.status, problem.message, problem.param, problem.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, problem: RequestValidationError) -> Response:
        wrong = problem.errors()[0]
        where = ".".join(str(part) for part in wrong["loc"] if part != "body") or None
        return error(400, f"{where or 'body'}: {wrong['msg']}", where, "invalid_value")

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, problem: HTTPException) -> Response:
        return error(problem.status_code, str(problem.detail))

    @app.exception_handler(Exception)
    @app.exception_handler(LongMemError)
    @app.exception_handler(Busy)
    @app.exception_handler(TimeoutError)
    async def failed(_: Request, problem: Exception) -> Response:
        return error(*said_of(problem))

    def owner(authorization: Annotated[str | None, Header()] = None) -> str:
        found = allowed.owner(authorization)
        if found is None:
            raise Refused(401, "no valid API key; send Authorization: Bearer KEY", code="invalid_api_key")
        return found

    Owner = Annotated[str, Depends(owner)]

    def own_memory(memory: str, owner: str) -> str:
        if NAME.fullmatch(memory) is None or not memories.exists(owner, memory):
            raise Refused(404, f"you have no memory {memory!r}; make it with POST /v1/memories", code="not_found")
        return memory

    async def asked_memory(body: Any, header: str | None, owner: str) -> str | None:
        """The memory that a request names; without a name it has none, never a shared one."""
        named: str | None = body.memory_id or header
        if named is None:
            if body.remember:
                raise Refused(400, "remember needs memory_id: what is kept must have a place", param="memory_id")
            return None
        return await asyncio.to_thread(own_memory, named, owner)

    async def sse(events: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(seconds):
                async for event in events:
                    yield event
        except Exception as problem:
            status, message = said_of(problem)
            yield shapes.event({"error": {"message": message, "type": "server_error", "code": status}})

    async def answer_to(body: Any, render: shapes.Rendering, streamed: AsyncIterator[Any]) -> Response:
        """Either all at once, or as server-sent events; the first piece is waited for, so that errors have a status."""
        started = time.monotonic()
        try:
            ahead = await asyncio.wait_for(anext(streamed), seconds)
        except StopAsyncIteration:
            ahead = None
        first.observe(time.monotonic() - started)

        async def all_pieces() -> AsyncIterator[Any]:
            if ahead is not None:
                yield ahead
            async for piece in streamed:
                yield piece

        if body.stream:
            return StreamingResponse(sse(render.events(all_pieces())), media_type="text/event-stream")
        async with asyncio.timeout(seconds):
            async for piece in all_pieces():
                render.take(*piece)
        return JSONResponse(render.whole())

    async def several(n: int, make: Callable[[int], AsyncIterator[Any]], after: Callable[[], Awaitable[None]]) -> Any:
        """The pieces of n answers as they come, each with its number; ``after`` runs when all have ended."""
        if n == 1:
            async for piece, tokens, answer in make(0):
                produced.inc(len(tokens))
                yield 0, piece, tokens, answer
        else:
            results: asyncio.Queue[Any] = asyncio.Queue()

            async def run(index: int) -> None:
                try:
                    async for piece, tokens, answer in make(index):
                        produced.inc(len(tokens))
                        await results.put((index, piece, list(tokens), answer))
                    await results.put(None)
                except Exception as problem:
                    await results.put(problem)

            tasks = [asyncio.create_task(run(index)) for index in range(n)]
            try:
                left = n
                while left:
                    result = await results.get()
                    if isinstance(result, Exception):
                        raise result
                    if result is None:
                        left -= 1
                    else:
                        yield result
            finally:
                for task in tasks:
                    task.cancel()
        await after()

    async def remember(body: Any, owner: str, memory: str, messages: list[dict[str, str]], render: Any) -> None:
        said = [*messages[-1:], {"role": "assistant", "content": render.text()}]
        count = await engine.call(lambda: memories.remember(owner, memory, said))
        render.written = count
        written.inc(count)

    async def nothing() -> None:
        return None

    # -- answers -----------------------------------------------------------------------------------------------------

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, who: Owner, x_memory_id: Annotated[str | None, Header()] = None) -> Response:
        """Answer a conversation, reading the memory that ``memory_id`` or ``X-Memory-Id`` names."""
        memory = await asked_memory(body, x_memory_id, who)
        messages = [message.plain for message in body.messages]
        ids, sources = await asyncio.to_thread(answering.chat_ids, messages, who, memory, body.recall)
        _check_length(model, ids)
        render = shapes.Chat(body, name, tokenizer, sources)
        after = nothing
        if body.remember and memory is not None:
            kept = memory

            async def after() -> None:
                await remember(body, who, kept, messages, render)

        def make(index: int) -> AsyncIterator[Any]:
            settings = shapes.sampling(body, body.max_completion_tokens or body.max_tokens, index)
            stop = shapes.stops(body.stop)
            return answering.stream(ids, settings, owner=who, memory=memory, stop=stop, explain=body.explain)

        return await answer_to(body, render, several(body.n, make, after))

    @app.post("/v1/completions")
    async def complete(
        body: CompletionRequest, who: Owner, x_memory_id: Annotated[str | None, Header()] = None
    ) -> Response:
        """Continue one prompt or several, reading the memory that ``memory_id`` or ``X-Memory-Id`` names."""
        memory = await asked_memory(body, x_memory_id, who)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if not prompts or any(not prompt for prompt in prompts) or len(prompts) * body.n > 64:
            raise Refused(400, "prompt must be a text, or 1 to 64 texts in all; none may be empty", param="prompt")
        encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        encoded = [ids[:-1] if len(ids) > 1 and ids[-1] in answering.stop_ids else ids for ids in encoded]
        for ids in encoded:
            _check_length(model, ids)
        render = shapes.Completion(body, name, tokenizer, prompts)
        after = nothing
        if body.remember and memory is not None:
            kept = memory

            async def after() -> None:
                await remember(body, who, kept, [{"role": "user", "content": prompts[0]}], render)

        def make(index: int) -> AsyncIterator[Any]:
            settings = shapes.sampling(body, body.max_tokens, index)
            return answering.stream(
                encoded[index // body.n], settings, owner=who, memory=memory, stop=shapes.stops(body.stop),
                explain=body.explain, chat=False,
            )  # fmt: skip

        return await answer_to(body, render, several(body.n * len(prompts), make, after))

    @app.post("/v1/responses")
    async def respond(
        body: ResponsesRequest, who: Owner, x_memory_id: Annotated[str | None, Header()] = None
    ) -> Response:
        """Answer, going on from ``previous_response_id``; what is said is a document of the memory."""
        memory = await asked_memory(body, x_memory_id, who)
        place = memory or RESPONSES
        before: list[dict[str, str]] = []
        if body.previous_response_id is not None:
            before = await asyncio.to_thread(_said_before, memories, who, place, body.previous_response_id)
        given = (
            [{"role": "user", "content": body.input}] if isinstance(body.input, str) else [m.plain for m in body.input]
        )
        if not given:
            raise Refused(400, "input must hold a message", param="input")
        told = [{"role": "system", "content": body.instructions}] if body.instructions else []
        ids, sources = await asyncio.to_thread(answering.chat_ids, [*told, *before, *given], who, memory, body.recall)
        _check_length(model, ids)
        render = shapes.Response(body, name, sources)

        async def after() -> None:
            if body.store:
                messages = [*before, *given, {"role": "assistant", "content": render.text()}]
                text = "".join(
                    f"{each['role']}: {' '.join(each['content'].split())}\n" for each in messages[len(before) :]
                )
                about = {"messages": messages, "response": render.id}
                receipt = await engine.call(lambda: memories.add(who, place, render.id, text, metadata=about))
                render.written = receipt.tokens
                written.inc(receipt.tokens)

        def make(_: int) -> AsyncIterator[Any]:
            settings = shapes.sampling(body, body.max_output_tokens, 0)
            return answering.stream(ids, settings, owner=who, memory=memory, explain=body.explain)

        return await answer_to(body, render, several(1, make, after))

    @app.get("/v1/models")
    async def models(who: Owner) -> Any:
        """The one model that is served."""
        return {"object": "list", "data": [shapes.model_card(name)]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str, who: Owner) -> Any:
        """The model, by its name."""
        if model_id != name:
            raise Refused(404, f"there is no model {model_id[:100]!r} here; this is {name}", code="model_not_found")
        return shapes.model_card(name)

    # -- memories ----------------------------------------------------------------------------------------------------

    @app.get("/v1/memories")
    async def list_memories(who: Owner) -> Any:
        """Your memories with their sizes."""
        return {"object": "list", "data": await asyncio.to_thread(memories.listed, who)}

    @app.post("/v1/memories", status_code=201)
    async def create_memory(body: NewMemory, who: Owner) -> Any:
        """Make an empty memory of your own."""
        if not await asyncio.to_thread(memories.create, who, body.id):
            raise Refused(409, f"you have a memory {body.id!r} already", param="id", code="exists")
        return await asyncio.to_thread(memories.shown, who, body.id)

    @app.get("/v1/memories/{memory}")
    async def show_memory(memory: str, who: Owner) -> Any:
        """A memory and its documents."""
        own_memory(memory, who)
        documents = await asyncio.to_thread(memories.documents, who, memory)
        shown = await asyncio.to_thread(memories.shown, who, memory)
        return {**shown, "data": [shapes.document_card(info) for info in documents]}

    @app.delete("/v1/memories/{memory}")
    async def forget_memory(memory: str, who: Owner) -> Any:
        """Forget all of a memory."""
        own_memory(memory, who)
        count = await engine.call(lambda: memories.forget(who, memory))
        return {"id": memory, "object": "memory", "deleted": True, "documents": count}

    @app.post("/v1/memories/{memory}/documents", status_code=201)
    async def add_document(memory: str, body: NewText, who: Owner) -> Any:
        """Add a text; when this is answered it is on the disk."""
        own_memory(memory, who)
        more: dict[str, Any] = {"append": body.append}
        if body.replace:
            more["replace"] = True
        if body.metadata is not None:
            more["metadata"] = body.metadata
        receipt = await engine.call(lambda: memories.add(who, memory, body.name, body.text, **more))
        written.inc(receipt.tokens)
        return {"object": "document", "name": receipt.name, "status": receipt.status, "tokens": receipt.tokens}

    @app.get("/v1/memories/{memory}/documents/{document:path}")
    async def show_document(memory: str, document: str, who: Owner) -> Any:
        """A document with its text."""
        own_memory(memory, who)
        info = _known(await asyncio.to_thread(memories.documents, who, memory), document)
        return {**shapes.document_card(info), "text": await asyncio.to_thread(memories.text, who, memory, info.name)}

    @app.delete("/v1/memories/{memory}/documents/{document:path}")
    async def forget_document(memory: str, document: str, who: Owner) -> Any:
        """Forget a document: no search and no answer finds it any more."""
        own_memory(memory, who)
        info = _known(await asyncio.to_thread(memories.documents, who, memory), document)
        await engine.call(lambda: memories.forget(who, memory, info.name))
        return {"name": info.name, "object": "document", "deleted": True}

    @app.post("/v1/memories/{memory}/search")
    async def search(memory: str, body: SearchRequest, who: Owner) -> Any:
        """Passages that share words with a query, best first."""
        own_memory(memory, who)
        found = await asyncio.to_thread(memories.search, who, memory, body.query, body.top)
        return {"object": "list", "data": [vars(passage) for passage in found]}

    @app.get("/v1/memories/{memory}/export")
    async def export(memory: str, who: Owner) -> Response:
        """All documents with their texts, as JSON lines that ``longmem memory add`` reads."""
        own_memory(memory, who)
        lines = await asyncio.to_thread(_exported, memories, who, memory)
        return PlainTextResponse(lines, media_type="application/x-ndjson")

    # -- the server --------------------------------------------------------------------------------------------------

    @app.get("/health")
    async def health() -> Any:
        """Whether it answers."""
        return {"status": "ok", "model": name, "waiting": engine.waiting}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(who: Owner) -> Any:
        """Counters in Prometheus' format."""
        return PlainTextResponse(generate_latest(registry).decode())

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE, media_type="text/html")

    return app


def _check_length(model: Any, ids: list[int]) -> None:
    """A window moves what is too long to memory; a prompt without end would still keep the model for itself."""
    most = 32 * int(getattr(model.config, "max_position_embeddings", None) or 4096)
    if len(ids) > most:
        raise Refused(400, f"the prompt has {len(ids):,} tokens, {most:,} are the most; add the text to a memory")


def _known(documents: list[Any], name: str) -> Any:
    for info in documents:
        if info.name == name:
            return info
    raise Refused(404, f"this memory has no document {name[:100]!r}", code="not_found")


def _said_before(memories: Memories, owner: str, place: str, response: str) -> list[dict[str, str]]:
    for info in memories.documents(owner, place):
        if info.name == response:
            return list(info.metadata["messages"])
    raise Refused(404, f"you have no response {response!r} here", param="previous_response_id", code="not_found")


def _exported(memories: Memories, owner: str, memory: str) -> str:
    return "".join(
        shapes.line({"id": info.name, "text": memories.text(owner, memory, info.name), "metadata": info.metadata})
        for info in memories.documents(owner, memory)
    )
