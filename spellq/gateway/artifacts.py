"""REST: contents by hash, trees, and the outputs of runs. Nothing is held in memory whole."""

from typing import Final

import msgspec
from anyio import to_thread
from litestar import get, post, put
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.response import Stream

from spellq.control.errors import NotFound, Rejected
from spellq.gateway.services import ApiRequest, Provided
from spellq.trees import InvalidTreeError, Tree, decode_tree, encode_tree
from spellq.wire import Hashes, LsReply, TreeReply

MAX_TREE_BYTES: Final = 256 * 1024 * 1024
MAX_HASHES: Final = 10_000
MAX_BATCH: Final = 1000
MAX_BATCH_BYTES: Final = 16 * 1024 * 1024

_batch: Final = msgspec.msgpack.Decoder(list[bytes])


def _check_hash(sha256: str) -> None:
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise Rejected(f"{sha256[:80]!r} is no SHA-256: 64 digits 0-9 and a-f.")


@post("/artifacts/missing", status_code=200)
async def missing(data: JSONBody[Hashes], services: Provided) -> Hashes:
    """Which of these contents are not stored."""
    if len(data.hashes) > MAX_HASHES:
        raise Rejected(f"{len(data.hashes)} hashes in one request; the limit is {MAX_HASHES}.")
    for sha256 in data.hashes:
        _check_hash(sha256)
    return Hashes(await services.artifacts.missing(data.hashes))


@post("/artifacts/batch", status_code=200, request_max_body_size=MAX_BATCH_BYTES)
async def upload_batch(request: ApiRequest, services: Provided) -> Hashes:
    """Store several small contents: a msgpack array of byte strings, answered by their hashes."""
    try:
        contents = _batch.decode(await request.body())
    except msgspec.DecodeError as error:
        raise Rejected(f"No msgpack array of byte strings: {error}.") from error
    if len(contents) > MAX_BATCH:
        raise Rejected(f"{len(contents)} contents in one request; the limit is {MAX_BATCH}.")
    return Hashes(await services.artifacts.put_all(contents))


@put("/artifacts/{sha256:str}", status_code=204, request_max_body_size=None)
async def upload(sha256: FromPath[str], request: ApiRequest, services: Provided) -> None:
    """Store a content; it is kept only if its SHA-256 is the one in the path."""
    _check_hash(sha256)
    try:
        await services.artifacts.put(sha256, request.stream())
    except ValueError as error:
        raise Rejected(f"Nothing was stored: {error}.") from error


@get("/artifacts/{sha256:str}")
async def download(sha256: FromPath[str], services: Provided) -> Stream:
    """A content, streamed.

    Its hash is a capability: whoever has a valid token and knows the hash may read the content,
    whoever stored it. Hashes of others' files are told to nobody who may not see their runs.
    """
    _check_hash(sha256)
    try:
        content = await services.artifacts.open(sha256)
    except KeyError as error:
        raise NotFound(f"There is no content {sha256}.") from error
    return Stream(content, media_type="application/octet-stream")


@post("/trees", request_max_body_size=MAX_TREE_BYTES)
async def create_tree(request: ApiRequest, services: Provided) -> TreeReply:
    """Store a tree whose contents are stored."""
    body = await request.body()
    try:  # a large tree takes seconds: not in the loop
        hashes, tree_id, data = await to_thread.run_sync(_read_tree, body)
    except InvalidTreeError as error:
        raise Rejected(f"Invalid tree: {error}.") from error
    lacking = await services.artifacts.missing(hashes)
    if lacking:
        raise Rejected(f"{len(lacking)} contents of the tree are not stored, {lacking[0]} is one.")
    await services.artifacts.put_bytes(data)
    return TreeReply(tree_id)


def _read_tree(body: bytes) -> tuple[list[str], str, bytes]:
    """The hashes in a tree, its id, and its bytes in the one way they are kept."""
    tree = decode_tree(body)
    hashes = sorted({entry.sha256 for entry in tree.entries if entry.sha256 is not None})
    return hashes, *encode_tree(tree)


@get("/resources/tree")
async def resource_tree(path: FromQuery[str], request: ApiRequest, services: Provided) -> Tree:
    """What lies at a resource, for downloading."""
    return await services.outputs.subtree(path, request.user.sees)


@get("/resources/ls")
async def list_resource(
    request: ApiRequest, services: Provided, path: FromQuery[str] = ""
) -> LsReply:
    """One folder of the resources."""
    return LsReply(await services.outputs.ls(path, request.user.sees))


HANDLERS = [missing, upload, upload_batch, download, create_tree, resource_tree, list_resource]
