"""A model hub on loopback that the real huggingface_hub talks to.

`python tests/preload/hub.py --root DIR [--port N] [--token T] [--gated org/name]` serves each
folder `DIR/org/name` as the repository `org/name`; `--repository org/name=FOLDER` serves any
folder. Its clients set HF_ENDPOINT. In tests it runs in a thread, counts the bytes it sends,
and can be told to send wrong bytes, to cut a connection, or to hold until released.
"""

import argparse
import asyncio
import hashlib
import re
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

LARGE = (".safetensors", ".gguf", ".bin", ".pth", ".onnx", ".model", ".png")
"""What the real hub stores outside of git, by its usual .gitattributes."""

PIECE = 1 << 20
"""Bytes sent at a time."""


@cache
def _hashes(file: Path, changed: int) -> tuple[int, str, str]:
    """Size, git's sha1 and sha256 of a file that was last changed then."""
    content = file.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return len(content), blob, hashlib.sha256(content).hexdigest()


@dataclass
class Repository:
    """A folder as `name`; `commit` is what its main branch and its tags stand for."""

    name: str
    folder: Path
    gated: bool = False
    tags: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        every = self.folder.rglob("*")
        return sorted(str(path.relative_to(self.folder)) for path in every if path.is_file())

    @property
    def commit(self) -> str:
        state = [(path, (self.folder / path).stat().st_size) for path in self.paths]
        return hashlib.sha1(repr(state).encode()).hexdigest()

    def knows(self, revision: str) -> bool:
        return revision in ("main", self.commit, *self.tags)

    def sibling(self, path: str) -> dict[str, Any]:
        """One file as `/api/models/{name}?blobs=true` lists it."""
        file = self.folder / path
        size, sha1, sha256 = _hashes(file, file.stat().st_mtime_ns)
        listed = {"rfilename": path, "size": size, "blobId": sha1}
        if path.endswith(LARGE):
            # The real blobId is that of a pointer file; no client compares it.
            lfs = {"sha256": sha256, "size": size, "pointerSize": 134}
            listed |= {"blobId": hashlib.sha1(sha256.encode()).hexdigest(), "lfs": lfs}
        return listed

    def tree_entry(self, path: str) -> dict[str, Any]:
        """The same file as `/api/models/{name}/tree/{revision}` lists it."""
        file = self.sibling(path)
        entry = {"type": "file", "path": path, "size": file["size"], "oid": file["blobId"]}
        if lfs := file.get("lfs"):
            large = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
            entry["lfs"] = large
        return entry


@dataclass
class Hub:
    """The repositories, who may read them, what was sent, and what to do wrong."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    token: str | None = None
    sent: Counter[str] = field(default_factory=Counter)
    requests: list[str] = field(default_factory=list)
    sending: int = 0
    wrong: set[str] = field(default_factory=set)
    cut_at: dict[str, int] = field(default_factory=dict)
    hold_at: dict[str, int] = field(default_factory=dict)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, name: str, folder: Path, **options: Any) -> Repository:
        self.repositories[name] = Repository(name, folder, **options)
        return self.repositories[name]

    def app(self) -> Starlette:
        name = r"{org}/{name}"
        return Starlette(
            routes=[
                Route(f"/api/models/{name}", self._info),
                Route(f"/api/models/{name}/revision/{{revision:path}}", self._info),
                Route(f"/api/models/{name}/tree/{{revision}}", self._tree),
                Route(f"/{name}/resolve/{{revision}}/{{path:path}}", self._resolve),
                Route(f"/cdn/{name}/{{path:path}}", self._cdn),
            ]
        )

    async def _info(self, request: Request) -> Response:
        repository = self._repository(request, of_files=False)
        if isinstance(repository, Response):
            return repository
        blobs = request.query_params.get("blobs", "").lower() == "true"
        siblings = [
            repository.sibling(path) if blobs else {"rfilename": path} for path in repository.paths
        ]
        info = {"id": repository.name, "modelId": repository.name, "sha": repository.commit}
        return JSONResponse({**info, "private": False, "siblings": siblings})

    async def _tree(self, request: Request) -> Response:
        repository = self._repository(request, of_files=False)
        if isinstance(repository, Response):
            return repository
        return JSONResponse([repository.tree_entry(path) for path in repository.paths])

    async def _resolve(self, request: Request) -> Response:
        """Small files are sent from here, large ones by a redirect, as the real hub does."""
        repository = self._repository(request, of_files=True)
        if isinstance(repository, Response):
            return repository
        path = request.path_params["path"]
        if path not in repository.paths:
            return _refused(404, "EntryNotFound", "Entry not found")
        file = repository.sibling(path)
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{file["blobId"]}"'}
        if lfs := file.get("lfs"):
            headers |= {"X-Linked-Etag": f'"{lfs["sha256"]}"', "X-Linked-Size": str(file["size"])}
            cdn = request.url.replace(hostname="localhost", path=f"/cdn/{repository.name}/{path}")
            return RedirectResponse(str(cdn), 302, headers)
        return self._bytes(request, repository, path, headers)

    async def _cdn(self, request: Request) -> Response:
        """Another host to the client, and one that must never see the token."""
        if "Authorization" in request.headers:
            return _refused(400, None, "Only one auth mechanism allowed")
        name = f"{request.path_params['org']}/{request.path_params['name']}"
        return self._bytes(request, self.repositories[name], request.path_params["path"], {})

    def _repository(self, request: Request, *, of_files: bool) -> Repository | Response:
        """The repository that is asked for, or the answer that the real hub would give."""
        given = request.headers.get("Authorization")
        if given and given != f"Bearer {self.token}":
            return _refused(401, None, "Invalid credentials in Authorization header")
        name = f"{request.path_params['org']}/{request.path_params['name']}"
        repository = self.repositories.get(name)
        if repository is None:
            if given:
                return _refused(404, "RepoNotFound", "Repository not found")
            return _refused(401, None, "Invalid username or password.")
        if of_files and repository.gated and not given:
            return _refused(401, "GatedRepo", f"Access to model {name} is restricted.")
        if of_files and repository.gated and self.token == "no-access":
            return _refused(403, "GatedRepo", f"Access to model {name} is restricted.")
        if not repository.knows(request.path_params.get("revision", "main")):
            return _refused(404, "RevisionNotFound", "Invalid rev id")
        return repository

    def _bytes(
        self, request: Request, repository: Repository, path: str, headers: dict[str, str]
    ) -> Response:
        content = (repository.folder / path).read_bytes()
        if path in self.wrong:
            content = bytes(len(content))
        given = request.headers.get("Range")
        start = int(re.fullmatch(r"bytes=(\d+)-", given)[1]) if given else 0  # type: ignore[index]
        headers = headers | {"Content-Length": str(len(content) - start)}
        if given:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if request.method == "HEAD":
            return Response(headers=headers)
        self.requests.append(path)
        body = self._pieces(path, content, start)
        return StreamingResponse(body, 206 if given else 200, headers)

    async def _pieces(self, path: str, content: bytes, start: int) -> AsyncIterator[bytes]:
        self.sending += 1
        try:
            while start < len(content):
                if start >= self.cut_at.get(path, len(content)):
                    del self.cut_at[path]
                    raise ConnectionAbortedError(path)
                if start >= self.hold_at.get(path, len(content)):
                    await self.released.wait()
                piece = content[start : start + PIECE]
                yield piece
                start += len(piece)
                self.sent[path] += len(piece)
        finally:
            self.sending -= 1


def _refused(status: int, code: str | None, message: str) -> Response:
    headers = {"X-Error-Message": message}
    if code:
        headers["X-Error-Code"] = code
    return JSONResponse({"error": message}, status, headers)


class Running:
    """A hub that serves on a free port of loopback, in a thread of this process."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(hub.app(), log_level="critical", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="hub")

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._socket])

    def release(self) -> None:
        """Let go on what is held, from now on."""
        self.hub.hold_at.clear()
        self._loop.call_soon_threadsafe(self.hub.released.set)

    def __enter__(self) -> "Running":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join()
        self._socket.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="a model hub on loopback")
    parser.add_argument("--root", type=Path, help="serve DIR/org/name as org/name")
    parser.add_argument("--repository", action="append", default=[], metavar="org/name=FOLDER")
    parser.add_argument("--gated", action="append", default=[], metavar="org/name")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", help="the one token that is accepted")
    options = parser.parse_args(arguments)
    hub = Hub(token=options.token)
    if options.root:
        for folder in sorted(path for path in options.root.glob("*/*") if path.is_dir()):
            hub.add(str(folder.relative_to(options.root)), folder)
    for entry in options.repository:
        name, _, folder = entry.partition("=")
        hub.add(name, Path(folder))
    for name in options.gated:
        hub.repositories[name].gated = True
    listener = socket.create_server(("127.0.0.1", options.port))
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(hub.app(), log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
