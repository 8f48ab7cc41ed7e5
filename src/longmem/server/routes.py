"""Memories over HTTP: made, listed, filled, searched, shown, forgotten and exported by the owner alone."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response, UploadFile
from fastapi.responses import PlainTextResponse

from longmem.errors import DataError
from longmem.server import openai_api as shapes
from longmem.server.engine import Engine
from longmem.server.keys import NAME
from longmem.server.memories import Memories
from longmem.server.refusals import Refused
from longmem.server.schemas import NewMemory, NewText, SearchRequest
from longmem.server.uploads import texts_of


def memory_routes(memories: Memories, engine: Engine, owner: Callable[..., str], written: Any) -> APIRouter:
    """The routes under ``/v1/memories``.

    Args:
        memories: behind them.
        engine: runs what writes.
        owner: who a request is from.
        written: counter of tokens.
    """
    router = APIRouter(prefix="/v1/memories")
    Owner = Annotated[str, Depends(owner)]

    def own(memory: str, who: Owner) -> str:
        return own_memory(memories, who, memory)

    Mine = Annotated[str, Depends(own)]

    @router.get("")
    async def list_memories(who: Owner) -> Any:
        """Your memories with their sizes."""
        return {"object": "list", "data": await asyncio.to_thread(memories.listed, who)}

    @router.post("", status_code=201)
    async def create_memory(body: NewMemory, who: Owner) -> Any:
        """Make an empty memory of your own."""
        if not await asyncio.to_thread(memories.create, who, body.id):
            raise Refused(409, f"you have a memory {body.id!r} already", param="id", code="exists")
        return await asyncio.to_thread(memories.shown, who, body.id)

    @router.get("/{memory}")
    async def show_memory(memory: Mine, who: Owner) -> Any:
        """A memory and its documents."""
        documents = await asyncio.to_thread(memories.documents, who, memory)
        shown = await asyncio.to_thread(memories.shown, who, memory)
        return {**shown, "data": [shapes.document_card(info) for info in documents]}

    @router.delete("/{memory}")
    async def forget_memory(memory: Mine, who: Owner) -> Any:
        """Forget all of a memory."""
        count = await engine.call(lambda: memories.forget(who, memory))
        return {"id": memory, "object": "memory", "deleted": True, "documents": count}

    @router.post("/{memory}/documents", status_code=201)
    async def add_document(memory: Mine, body: NewText, who: Owner) -> Any:
        """Add a text; when this is answered it is on the disk."""
        settings = {"append": body.append, "replace": body.replace, "metadata": body.metadata}
        receipt = await engine.call(lambda: memories.add(who, memory, body.name, body.text, **settings))
        written.inc(receipt.tokens)
        return _added(receipt)

    @router.post("/{memory}/files", status_code=201)
    async def add_file(memory: Mine, file: UploadFile, who: Owner) -> Any:
        """Add the texts of a file: .txt, .md, .rst, .tex, .py, .jsonl with a field text, or any of them as .gz."""
        data = await file.read()
        try:
            texts = await asyncio.to_thread(texts_of, file.filename or "", data)
        except DataError:
            raise Refused(
                400,
                "the file holds no text in UTF-8, or a line of it is no JSON object with a field text",
                param="file",
            ) from None
        receipts = await engine.call(lambda: [memories.add(who, memory, name, text) for name, text in texts])
        written.inc(sum(receipt.tokens for receipt in receipts))
        return {"object": "list", "data": [_added(receipt) for receipt in receipts]}

    @router.get("/{memory}/documents/{document:path}")
    async def show_document(memory: Mine, document: str, who: Owner) -> Any:
        """A document with its text."""
        info = await asyncio.to_thread(known_document, memories, who, memory, document)
        return {**shapes.document_card(info), "text": await asyncio.to_thread(memories.text, who, memory, info.name)}

    @router.delete("/{memory}/documents/{document:path}")
    async def forget_document(memory: Mine, document: str, who: Owner) -> Any:
        """Forget a document: no search and no answer finds it any more."""
        info = await asyncio.to_thread(known_document, memories, who, memory, document)
        await engine.call(lambda: memories.forget(who, memory, info.name))
        return {"name": info.name, "object": "document", "deleted": True}

    @router.post("/{memory}/search")
    async def search(memory: Mine, body: SearchRequest, who: Owner) -> Any:
        """Passages that share words with a query, best first."""
        found = await asyncio.to_thread(memories.search, who, memory, body.query, body.top)
        return {"object": "list", "data": [vars(passage) for passage in found]}

    @router.get("/{memory}/export")
    async def export(memory: Mine, who: Owner) -> Response:
        """All documents with their texts, as JSON lines that ``longmem memory add`` reads."""
        lines = await asyncio.to_thread(_exported, memories, who, memory)
        return PlainTextResponse(lines, media_type="application/x-ndjson")

    return router


def own_memory(memories: Memories, owner: str, memory: str) -> str:
    """The memory of this id, if the owner has it.

    Raises:
        Refused: they have none; whether another has one is not told.
    """
    if NAME.fullmatch(memory) is None or not memories.exists(owner, memory):
        raise Refused(404, f"you have no memory {memory[:100]!r}; make it with POST /v1/memories", code="not_found")
    return memory


def known_document(memories: Memories, owner: str, memory: str, name: str) -> Any:
    """A document of a memory.

    Raises:
        Refused: it has none of this name.
    """
    for info in memories.documents(owner, memory):
        if info.name == name:
            return info
    raise Refused(404, f"this memory has no document {name[:100]!r}", code="not_found")


def _added(receipt: Any) -> dict[str, Any]:
    return {"object": "document", "name": receipt.name, "status": receipt.status, "tokens": receipt.tokens}


def _exported(memories: Memories, owner: str, memory: str) -> str:
    return "".join(
        shapes.line({"id": info.name, "text": memories.text(owner, memory, info.name), "metadata": info.metadata})
        for info in memories.documents(owner, memory)
    )
