"""The README's tables are true."""

import re
import subprocess

from tests.support import ROOT
from worker.settings import Settings

README = (ROOT / "README.md").read_text(encoding="utf-8")


def settings_table() -> str:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) else f"`{field.default}`"
        lines.append(f"| `{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines)


def test_the_table_of_variables_is_that_of_settings() -> None:
    assert settings_table() in README, f"README.md must hold this table:\n{settings_table()}"


def test_the_table_of_commands_is_that_of_make() -> None:
    ran = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.findall(r"^  (make [a-z-]+)", ran.stdout, re.MULTILINE)
    assert targets
    for target in targets:
        assert f"`{target}`" in README


def test_setup_has_nothing_to_do_the_second_time() -> None:
    command = ["make", "--no-print-directory", "setup"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "setup: nothing to do"


def test_the_files_that_are_linked_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_promises_name_tests_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## Promises")[2]
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), test
