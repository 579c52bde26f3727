"""What README, docs/ and ARCHITECTURE.md say is so: tables, links, commands that need no engine."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import worker.__main__
from benchmarks import readme
from tests.support import ROOT
from worker.engines.vllm.arguments import argument_problems
from worker.job import routes
from worker.job.input import Options
from worker.settings import Settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def reference(name: str) -> str:
    return (ROOT / "docs" / "reference" / f"{name}.md").read_text(encoding="utf-8")


def settings_table() -> str:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) else f"`{field.default}`"
        lines.append(f"| `{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines)


def test_the_table_of_variables_is_that_of_settings() -> None:
    table = settings_table()
    assert table in reference("variables"), f"variables.md must hold this table:\n{table}"


def test_the_table_of_commands_is_that_of_make() -> None:
    ran = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.findall(r"^  (make [a-z-]+)", ran.stdout, re.MULTILINE)
    assert targets
    assert sorted(commands("make")) == sorted(targets)


def test_the_table_of_commands_has_those_of_the_worker() -> None:
    known = [f"python -m worker {one.name}" for one in worker.__main__.cli.registered_commands]
    assert commands("python -m worker") == ["python -m worker", *known]


def commands(program: str) -> list[str]:
    """Those of `program` that have a row in commands.md."""
    return re.findall(rf"^\| `({program}\b[^`]*)` \|", reference("commands"), re.MULTILINE)


def test_setup_has_nothing_to_do_the_second_time() -> None:
    command = ["make", "--no-print-directory", "setup"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "setup: nothing to do"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", head.lower()) for head in heads)
    return {text.replace(" ", "-") for text in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_linked_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), target


def test_the_promises_name_tests_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## Promises")[2]
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_the_exit_codes_are_those_of_the_worker() -> None:
    said = re.findall(r"\b(\d+) (?=stopped|the )", worker.__main__.__doc__ or "")
    assert said == ["0", "1", "2"]
    listed = re.findall(r"^\| (\d+) \|", reference("exit-codes"), re.MULTILINE)
    assert listed == [*said, "130"]


def test_the_routes_are_those_that_are_served() -> None:
    listed = re.findall(r"^\| `(/v1/\S+)` \| (\w+) \|$", reference("routes"), re.MULTILINE)
    assert dict(listed) == routes.ALLOWED


def test_the_options_are_those_of_a_request() -> None:
    table = reference("input").partition("| options | allowed |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(Options.model_fields)


def test_worker_vllms_options_are_vllms_under_the_names_that_the_page_gives() -> None:
    page = (ROOT / "docs" / "how-to" / "from-worker-vllm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+`) \| (the lower-case name|likewise)(.+) \|$", page, re.MULTILINE)
    names = [name.lower() for row in rows for name in re.findall(r"`([A-Z_]+)`", row[0])]
    assert len(names) > 10
    examples = [json.loads(text) for row in rows for text in re.findall(r"`(\{.+?\})`", row[2])]
    assert len(examples) == len(rows)
    for asked in [dict.fromkeys(names), *examples]:
        assert argument_problems(asked) == []


def test_the_readmes_figures_are_those_of_the_page() -> None:
    shown = README.partition(readme.BEGIN)[2].partition(readme.END)[0].strip()
    assert shown.startswith("| promise |")
    assert shown == readme.promises(reference("figures"))


def test_the_readmes_test_of_a_handler_runs() -> None:
    [command] = [line for line in README.splitlines() if "-m pytest -q" in line]
    ran = subprocess.run(
        [*shlex.split(command), "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_handler_of_the_how_to_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "how-to" / "handler.md").read_text(encoding="utf-8")
    handler, test = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_handler").mkdir()
    (tmp_path / "my_handler" / "handler.py").write_text(handler)
    (tmp_path / "test_my_handler.py").write_text(test)
    [command] = re.findall(r"^\S+python -m pytest -q .*$", page, re.MULTILINE)
    program, *rest = shlex.split(command)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ran = subprocess.run(
        [ROOT / program, *rest],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 passed" in ran.stdout
