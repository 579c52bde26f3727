"""Fetch and bake MODEL: `python -m preload [--into /models]`.

The only reader of the environment here. Exit codes: 0 baked (or nothing to bake), 1 not,
in one sentence on stderr.
"""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from preload import catalog, fetch, manifest, weights
from preload.errors import Interrupted, WeightsError
from preload.model import Model, ModelNameError, parse

SECRET = Path("/run/secrets/HF_TOKEN")
"""Where an image build mounts the secret HF_TOKEN."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Fetch MODEL from the hub into one folder, verified against the hub's hashes.")
def main(
    into: Annotated[
        Path, typer.Option(help="The folder that baked models stand in.")
    ] = weights.BAKED,
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        print(bake(os.environ, into), flush=True)
    except (WeightsError, ModelNameError) as error:
        print(f"preload: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def bake(environ: Mapping[str, str], into: Path) -> str:
    """Fetch what `environ` names into `into`, and say in one line what is there now.

    Raises:
        WeightsError: the model can't be had, or SIGINT or SIGTERM came.
        ModelNameError: MODEL or MODEL_REVISION is wrong.
    """
    text = environ.get("MODEL", "").strip()
    if not text:
        return "MODEL is not set: nothing is baked, the model is downloaded at run time"
    if (engine := environ.get("ENGINE", "").strip()) in weights.WITHOUT:
        return f"ENGINE={engine} brings its own weights: nothing is baked"
    model = _model(text, environ.get("MODEL_REVISION", ""))
    if model.folder:
        if lacks := weights.missing(model.folder, model.gguf):
            raise WeightsError(f"MODEL={model}: {lacks}")
        return f"MODEL={model} is on this machine: nothing is fetched"
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
            f"MODEL={model}: interrupted; run this again to go on from here"
        ) from None


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
