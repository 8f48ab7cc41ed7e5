"""The server: an OpenAI-compatible API whose answers can read a named memory, and the memories themselves.

Handlers are thin. The model and all writes run in the engine's one thread; nothing of it blocks the event loop.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Header, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from longmem import __version__
from longmem.chat import transcript
from longmem.errors import LongMemError
from longmem.generation.reading import positions
from longmem.server import openai_api as shapes
from longmem.server.answering import Answering
from longmem.server.engine import Busy, Engine
from longmem.server.keys import NAME, Keys
from longmem.server.limits import Limits
from longmem.server.memories import RESPONSES, Memories
from longmem.server.refusals import Refused, error, said_of
from longmem.server.routes import known_document, memory_routes, own_memory
from longmem.server.schemas import RESPONSE, ChatRequest, CompletionRequest, ResponsesRequest

T = TypeVar("T")
PAGE = Path(__file__).parent / "page.html"
MOST_BYTES = 8 << 20
ANSWER_TOKENS = (256, 1024)
"""What is left of the window, but at least and at most these: of an answer that asks for no number."""
COMPLETION_TOKENS = 16  # as in the OpenAI API
MemoryHeader = Annotated[str | None, Header(alias="X-Memory-Id", pattern=f"^{NAME.pattern}$")]
ResponseId = Annotated[str, PathParameter(pattern=RESPONSE)]


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
    app.add_middleware(Limits, most_bytes=most_bytes, anybody=not allowed.hashes, requests=requests)

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
        answer = error(problem.status_code, str(problem.detail))
        answer.headers.update(problem.headers or {})
        return answer

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

    async def asked_memory(body: Any, header: str | None, owner: str) -> str | None:
        """The memory that a request names; without a name it has none, never a shared one."""
        named: str | None = body.memory_id or header
        if named is None:
            if body.remember:
                raise Refused(400, "remember needs memory_id: what is kept must have a place", param="memory_id")
            return None
        return await asyncio.to_thread(own_memory, memories, owner, named)

    async def sse(events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
        try:
            async with aclosing(events), asyncio.timeout(seconds):
                async for event in events:
                    yield event
        except Exception as problem:
            status, message = said_of(problem)
            yield shapes.event({"error": {"message": message, "type": "server_error", "code": status}})

    async def answer_to(
        body: Any, request: Request, render: shapes.Rendering, pieces: AsyncGenerator[Any, None]
    ) -> Response:
        """Either all at once, or as server-sent events; the first piece is waited for, so that errors have a status."""
        started = time.monotonic()

        async def ahead() -> list[Any]:
            found = [piece async for piece in _first(pieces)]
            first.observe(time.monotonic() - started)
            return found

        async def rest(begun: list[Any]) -> AsyncIterator[Any]:
            async with aclosing(pieces):
                for piece in begun:
                    yield piece
                async for piece in pieces:
                    yield piece

        async def whole() -> Response:
            async for piece in rest(await ahead()):
                render.take(*piece)
            return JSONResponse(render.whole())

        async with asyncio.timeout(seconds):
            if not body.stream:
                return await while_there(request, whole())
            begun = await while_there(request, ahead())
        return StreamingResponse(sse(render.events(rest(begun))), media_type="text/event-stream")

    async def several(n: int, make: Callable[[int], Any], after: Callable[[], Awaitable[None]]) -> Any:
        """The pieces of n answers as they come, each with its number; ``after`` runs when all have ended."""
        results: asyncio.Queue[Any] = asyncio.Queue()

        async def run(index: int) -> None:
            try:
                async with aclosing(make(index)) as pieces:
                    async for piece, tokens, answer in pieces:
                        produced.inc(len(tokens))
                        results.put_nowait((index, piece, tokens, answer))
                results.put_nowait(None)
            except Exception as problem:
                results.put_nowait(problem)

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
        count = await engine.call(lambda: memories.remember(owner, memory, said), follows=True)
        render.written = count
        written.inc(count)

    async def nothing() -> None:
        return None

    def room(ids: list[int]) -> int:
        """Tokens of an answer that asks for no number: what is left of the window, within bounds."""
        return max(ANSWER_TOKENS[0], min(ANSWER_TOKENS[1], (positions(model) or 0) - len(ids)))

    # -- answers -----------------------------------------------------------------------------------------------------

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, who: Owner, request: Request, x_memory_id: MemoryHeader = None) -> Response:
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

        def make(index: int) -> Any:
            settings = shapes.sampling(body, body.max_completion_tokens or body.max_tokens or room(ids), index)
            stop = shapes.stops(body.stop)
            return answering.stream(ids, settings, owner=who, memory=memory, stop=stop, explain=body.explain)

        return await answer_to(body, request, render, several(body.n, make, after))

    @app.post("/v1/completions")
    async def complete(
        body: CompletionRequest, who: Owner, request: Request, x_memory_id: MemoryHeader = None
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

        def make(index: int) -> Any:
            settings = shapes.sampling(body, body.max_tokens or COMPLETION_TOKENS, index)
            return answering.stream(
                encoded[index // body.n], settings, owner=who, memory=memory, stop=shapes.stops(body.stop),
                explain=body.explain, chat=False,
            )  # fmt: skip

        return await answer_to(body, request, render, several(body.n * len(prompts), make, after))

    @app.post("/v1/responses")
    async def respond(
        body: ResponsesRequest, who: Owner, request: Request, x_memory_id: MemoryHeader = None
    ) -> Response:
        """Answer, going on from ``previous_response_id``; what is said is a document of the memory."""
        memory = await asked_memory(body, x_memory_id, who)
        place = memory or RESPONSES
        before: list[dict[str, str]] = []
        if body.previous_response_id is not None:
            earlier = await asyncio.to_thread(stored_response, who, place, body.previous_response_id)
            before = list(earlier.metadata["messages"])
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
                about = {"messages": messages, "response": render.whole()}
                text = transcript(messages[len(before) :])
                receipt = await engine.call(
                    lambda: memories.add(who, place, render.id, text, metadata=about), follows=True
                )
                render.written = receipt.tokens
                written.inc(receipt.tokens)

        def make(_: int) -> Any:
            settings = shapes.sampling(body, body.max_output_tokens or room(ids), 0)
            return answering.stream(ids, settings, owner=who, memory=memory, explain=body.explain)

        return await answer_to(body, request, render, several(1, make, after))

    def stored_response(who: str, place: str, response: str) -> Any:
        try:
            return known_document(memories, who, place, response)
        except Refused:
            said = f"you have no response {response!r} here; one that named a memory is in that memory"
            raise Refused(404, said, param="previous_response_id", code="not_found") from None

    @app.get("/v1/responses/{response}")
    async def show_response(response: ResponseId, who: Owner, x_memory_id: MemoryHeader = None) -> Any:
        """A stored response; of one that named a memory, with its ``X-Memory-Id``."""
        found = await asyncio.to_thread(stored_response, who, x_memory_id or RESPONSES, response)
        return found.metadata["response"]

    @app.delete("/v1/responses/{response}")
    async def forget_response(response: ResponseId, who: Owner, x_memory_id: MemoryHeader = None) -> Any:
        """Forget a stored response."""
        place = x_memory_id or RESPONSES
        await asyncio.to_thread(stored_response, who, place, response)
        await engine.call(lambda: memories.forget(who, place, response))
        return {"id": response, "object": "response", "deleted": True}

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

    # -- the server --------------------------------------------------------------------------------------------------

    app.include_router(memory_routes(memories, engine, owner, written))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Any:
        """Whether it answers."""
        return {"status": "ok", "model": name, "waiting": engine.waiting}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(who: Owner) -> Any:
        """Counters in Prometheus' format."""
        return PlainTextResponse(generate_latest(registry).decode())

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE, media_type="text/html")

    return app


def _check_length(model: Any, ids: list[int]) -> None:
    """A window moves what is too long to memory; a prompt without end would still keep the model for itself."""
    most = 32 * int(getattr(model.config, "max_position_embeddings", None) or 4096)
    if len(ids) > most:
        raise Refused(400, f"the prompt has {len(ids):,} tokens, {most:,} are the most; add the text to a memory")


async def _first(pieces: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The first piece, if there is one."""
    with suppress(StopAsyncIteration):
        yield await anext(pieces)


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do something for a client; when it leaves first, the work is cancelled.

    Raises:
        Refused: it has left; nobody reads this.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client has left")
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
