"""The table of engines, with those that are not here."""

from pathlib import Path

import pytest

from benchmarks import engines


def run(requests: int, number: int, speed: float) -> engines.Run:
    return engines.Run(
        engine="mlc",
        requests=requests,
        round=number,
        decode=[speed] * requests,
        speed=speed * requests,
        first_token=[0.01 * number] * requests,
    )


def test_measured_engines_have_figures_and_the_others_a_reason() -> None:
    runs = [run(n, number, 100.0 + number) for n in engines.REQUESTS for number in (1, 2, 3)]
    reasons = {"tabby": "not installed", "remote": "no ENGINE_URL given"}
    rows = engines.table(runs, {"mlc": "7B, 4 bits"}, reasons).splitlines()
    by_name = {row.split("|")[1].strip(): row for row in rows[2:]}
    assert list(by_name) == engines.NAMES
    assert by_name["mlc"] == (
        "| mlc | 7B, 4 bits | 102 (101 to 103) | 816 (808 to 824) | 3,264 (3,232 to 3,296) "
        "| 20 (10 to 30) | 20 (10 to 30) | 20 (10 to 30) |"
    )
    assert by_name["tabby"].startswith("| tabby | not installed |")
    assert by_name["vllm"].startswith("| vllm | not measured |")
    assert {row.count("|") for row in rows} == {rows[0].count("|")}


def test_what_is_not_on_path_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ENGINE_URL", raising=False)
    assert engines.missing("mlc") == "not installed"
    assert engines.missing("remote") == "no ENGINE_URL given"
    program = tmp_path / "mlc_llm"
    program.touch(0o755)
    monkeypatch.setenv("ENGINE_URL", "http://127.0.0.1:1")
    assert engines.missing("mlc") is None
    assert engines.missing("remote") is None
