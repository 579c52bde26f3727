"""Fetch and bake MODEL, and the LoRA adapters that ENGINE_ARGS names:
`python -m preload [--into /models]`.

The only reader of the environment here. Exit codes: 0 baked (or nothing to bake), 1 not,
in one sentence on stderr.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from preload import adapters, catalog, fetch, manifest, weights
from preload.errors import Interrupted, WeightsError
from preload.model import Model, ModelNameError, parse, parse_adapter

SECRET = Path("/run/secrets/HF_TOKEN")
"""Where an image build mounts the secret HF_TOKEN."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    help="Fetch MODEL, and the LoRA adapters that ENGINE_ARGS names, from the hub into a folder "
    "each, verified against the hub's hashes."
)
def main(
    into: Annotated[
        Path, typer.Option(help="The folder that baked models stand in.")
    ] = weights.BAKED,
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        for line in bake(os.environ, into):
            print(line, flush=True)
    except (WeightsError, ModelNameError) as error:
        print(f"preload: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def bake(environ: Mapping[str, str], into: Path) -> Iterator[str]:
    """Fetch what `environ` names into `into`, and say of each in one line what is there now.

    Raises:
        WeightsError: the model or an adapter can't be had, or SIGINT or SIGTERM came.
        ModelNameError: MODEL or MODEL_REVISION is wrong.
    """
    named = _adapters(environ)
    yield _bake_model(environ, into)
    for adapter in named:
        if adapter.folder:
            yield f"{adapter.label} is a folder: nothing is fetched"
        else:
            yield _bake(adapter, environ, into)


def _bake_model(environ: Mapping[str, str], into: Path) -> str:
    text = environ.get("MODEL", "").strip()
    if not text:
        return "MODEL is not set: nothing is baked, the model is downloaded at run time"
    if (engine := environ.get("ENGINE", "").strip()) in weights.WITHOUT:
        return f"ENGINE={engine} brings its own weights: nothing is baked"
    model = _model(text, environ.get("MODEL_REVISION", ""))
    if model.folder:
        if lacks := weights.missing(model, model.folder):
            raise WeightsError(f"{model.label}: {lacks}")
        return f"{model.label} is on this machine: nothing is fetched"
    return _bake(model, environ, into)


def _bake(model: Model, environ: Mapping[str, str], into: Path) -> str:
    for folder, held in manifest.folders(into):
        if held.holds(model) and manifest.problem(folder) is None:
            return f"{folder}: {model} is baked already, at commit {held.commit}"
    try:
        if model.openllm:
            model = catalog.resolve(model)
            print(f"{model} is {model.entry}", flush=True)
        return _fetch(model, into, _token(environ))
    except KeyboardInterrupt:
        raise Interrupted(
            f"{model.label}: interrupted; run this again to go on from here"
        ) from None


def _adapters(environ: Mapping[str, str]) -> list[Model]:
    """Those that ENGINE_ARGS names."""
    try:
        args = json.loads(environ.get("ENGINE_ARGS", "").strip() or "{}")
        if not isinstance(args, dict):
            raise ValueError("must be a JSON object")
        return [parse_adapter(entry["path"]) for entry in adapters.named(args)]
    except ValueError as error:
        raise WeightsError(f"ENGINE_ARGS: {error}") from None


def _model(text: str, revision: str) -> Model:
    try:
        return parse(text, revision)
    except ModelNameError as error:
        raise ModelNameError(f"MODEL={text}: {error}") from None


def _token(environ: Mapping[str, str], secret: Path = SECRET) -> str | None:
    """HF_TOKEN, or the build secret of that name."""
    token = environ.get("HF_TOKEN", "").strip()
    if not token and secret.is_file():
        try:
            token = secret.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise WeightsError(f"the build secret {secret} can't be read as text") from None
    return token or None


def _fetch(model: Model, into: Path, token: str | None) -> str:
    download = fetch.prepare(model, into, token)
    here = f" ({decimal(download.here)} are here already)" if download.here else ""
    print(
        f"{model}: fetching {len(download.files)} files, {decimal(download.total)}{here}, "
        f"of commit {download.listing.commit}",
        flush=True,
    )
    folder, held = fetch.finish(download, into)
    return f"{folder}: {model} is baked, {decimal(held.total_size)}, every hash verified"


if __name__ == "__main__":
    try:
        app()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        # A thread that still waits for the hub would hold up a normal exit.
        os._exit(end.code if isinstance(end.code, int) else 1)
