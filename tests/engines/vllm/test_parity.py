"""On machines that are not here, vLLM in this process is started as `vllm serve` starts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.cases import Case, cases
from tests.engines.vllm.faked_platform import CPU, GPUS, MACHINES, Machine
from tests.support import ROOT

pytestmark = pytest.mark.engine

PAGE = (ROOT / "docs" / "reference" / "vllm.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("| field")[2].partition("\n\n")[0]
DEPARTURES = [
    set(re.findall(r"`([^`]+)`", row)) for row in re.findall(r"^\| (`.+?) \|", TABLE, re.MULTILINE)
]
DOCUMENTED = set().union(*DEPARTURES)

CHANGES = {
    "another usage context": ("nothing", "scheduler_config.max_num_seqs"),
    "a new default": ("nothing", "cache_config.gpu_memory_utilization"),
    "no checks": ("tools without a parser", "refused"),
    "no plugins": ("parser plugins", "tool parsers"),
    "a model's own error": ("nothing", "refused"),
}
"""What somebody may change in Tripod: the case that sees it, and where."""

Found = dict[str, str]


@dataclass
class Compared:
    """One case by `vllm serve`, by it when it is told of the departures, and by Tripod."""

    case: Case
    serve: Found
    told: Found
    tripod: Found

    def departing(self) -> set[str]:
        """What differs, without what only follows from a departure of the page."""
        differing = {
            _named(path)
            for path in self.serve.keys() | self.tripod.keys()
            if self.serve.get(path) != self.tripod.get(path)
            and (_named(path) in DOCUMENTED or self.told.get(path) != self.tripod.get(path))
        }
        if "start.usage_context" not in self.serve:  # several front processes, started otherwise
            differing -= {path for path in self.tripod if path.startswith("start.")}
        return differing


def _named(path: str) -> str:
    """As the page names it: an option of either place by its own name, a list as a whole."""
    path = re.sub(r"\[.*", "", path)
    option = path.removeprefix("args.").removeprefix("start.")
    return option if option in DOCUMENTED else path


def asked(kind: str, tasks: list[dict[str, Any]]) -> list[list[Found]]:
    kept = {name: value for name, value in os.environ.items() if name not in DOCUMENTED}
    environment = kept | {"VLLM_API_KEY": "of the operator"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.engines.vllm.ways_in", kind],
        cwd=ROOT,
        input=json.dumps(tasks),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    found: list[list[Found]] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Compared]]:
    """By the machine's name, and by the change where somebody changed Tripod."""
    folder: Path = tmp_path_factory.mktemp("parity")
    of = {name: cases(folder, machine) for name, machine in MACHINES.items()}
    tasks: dict[str, list[dict[str, Any]]] = {"cpu": [], "cuda": []}
    for name, machine in MACHINES.items():
        told = [case.task(case.told_on(machine)) for case in of[name]]
        plain = [case.task() for case in of[name]]
        for way, some in (("serve", plain), ("serve", told), ("tripod", plain)):
            task = {"machine": name, "way": way, "cases": some}
            tasks["cpu" if machine == CPU else "cuda"].append(task)
    changed = GPUS[0].name
    for change, (seen_by, _) in CHANGES.items():
        some = [case.task() for case in of[changed] if case.name == seen_by]
        task = {"machine": changed, "way": "tripod", "change": change, "cases": some}
        tasks["cuda"].append(task)
    with ThreadPoolExecutor() as pool:
        answers = dict(zip(tasks, pool.map(asked, tasks, tasks.values()), strict=True))
    compared: dict[str, list[Compared]] = {}
    for kind, machines in (("cpu", (CPU,)), ("cuda", GPUS)):
        rest = iter(answers[kind])
        for machine in machines:
            found = zip(of[machine.name], next(rest), next(rest), next(rest), strict=True)
            compared[machine.name] = [Compared(*four) for four in found]
        for change, [tripod] in zip(CHANGES, rest, strict=False):
            [same] = [one for one in compared[changed] if one.case.name == CHANGES[change][0]]
            compared[change] = [Compared(same.case, same.serve, same.told, tripod)]
    return compared


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_every_field_is_equal_or_documented(
    found: dict[str, list[Compared]], machine: Machine
) -> None:
    for one in found[machine.name]:
        undocumented = one.departing() - DOCUMENTED - {"refused"}
        assert not undocumented, one.case.name
        if one.case.refused:
            assert one.case.refused in one.serve["refused"]
            assert one.case.refused in one.tripod["refused"]
            assert "\n" not in one.tripod["refused"]
        else:
            assert "refused" not in one.serve | one.tripod, one.case.name
            assert len(one.tripod) > 900


def test_each_documented_departure_is_one(found: dict[str, list[Compared]]) -> None:
    seen = set().union(*(one.departing() for name in MACHINES for one in found[name]))
    assert seen - {"refused"} == DOCUMENTED
    assert len(DEPARTURES) <= 10


def test_parsers_are_chosen_for_a_known_family_that_generates(
    found: dict[str, list[Compared]],
) -> None:
    options = {"tool_call_parser", "enable_auto_tool_choice", "reasoning_parser"}
    chosen = {
        one.case.name for name in MACHINES for one in found[name] if options & one.departing()
    }
    assert chosen == {"a known family"}


def test_a_user_may_have_other_adapters_at_once(found: dict[str, list[Compared]]) -> None:
    for name in MACHINES:
        [one] = [one for one in found[name] if one.case.name == "LoRA as the user has it"]
        assert not {path for path in one.departing() if "lora_config" in path}


def test_what_a_gpu_compiles_stays_compiled(found: dict[str, list[Compared]]) -> None:
    for machine in GPUS:
        assert all("TORCHDYNAMO_DISABLE" not in one.tripod for one in found[machine.name])
    assert found[CPU.name][0].tripod["TORCHDYNAMO_DISABLE"] == "'1'"


def test_a_user_may_have_the_statistics(found: dict[str, list[Compared]]) -> None:
    for one in found[CPU.name]:
        if one.case.name in {"api mode", "what is logged", "metrics of a request"}:
            assert "disable_log_stats" not in one.departing(), one.case.name


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_the_pages_defaults_are_vllms(found: dict[str, list[Compared]], machine: Machine) -> None:
    used = found[machine.name][0].tripod
    assert used["scheduler_config.max_num_batched_tokens"] == str(machine.tokens)
    assert used["scheduler_config.max_num_seqs"] == str(machine.sequences)
    assert f"| {machine.name} | {machine.tokens:,} | {machine.sequences:,} |" in PAGE
    assert f"`gpu_memory_utilization` {used['cache_config.gpu_memory_utilization']}" in PAGE


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(found: dict[str, list[Compared]], change: str) -> None:
    [one] = found[change]
    assert CHANGES[change][1] in one.departing() - DOCUMENTED


def test_any_error_of_the_start_is_one_sentence(found: dict[str, list[Compared]]) -> None:
    [one] = found["a model's own error"]
    assert one.tripod["refused"] == "vLLM did not start: no rope"
