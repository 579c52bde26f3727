"""Samples → medians, spreads, tables and promises."""

from dataclasses import replace

import pytest

from benchmarks import readme
from benchmarks.figures import (
    BARE,
    PEER,
    TRIPOD,
    Figures,
    Sample,
    Spread,
    percentile_99,
    promises,
    promises_table,
    table,
)

TITLES = {BARE: "bare engine", TRIPOD: "Tripod", PEER: "worker-vllm"}


def sample(subject: str, jobs: int, **changes) -> Sample:
    made = Sample(
        subject=subject,
        jobs=jobs,
        round_trip=0.0,
        round=1,
        first_token=[0.010] * jobs,
        seconds=[1.0],
        tokens=128 * jobs,
        chunks=64 * jobs,
        bytes=1280 * jobs,
        front_cpu=0.5,
        core_cpu=1.0,
    )
    return replace(made, **changes)


def kept() -> list[Sample]:
    """A run in which every promise is kept, but only just."""
    return [
        sample(BARE, 1),
        sample(TRIPOD, 1, first_token=[0.0249]),
        sample(TRIPOD, 1, round_trip=0.05, seconds=[1.09]),
        sample(BARE, 16, first_token=[0.040] * 16),
        sample(TRIPOD, 16, first_token=[0.049] * 16, seconds=[1.11]),
        sample(PEER, 16, first_token=[0.15] * 16),
        sample(BARE, 64, first_token=[0.080] * 64),
        sample(
            TRIPOD,
            64,
            first_token=[0.099] * 64,
            seconds=[1.11],
            bytes=128 * 64 * 12,
            front_cpu=0.245,
        ),
        sample(PEER, 64, first_token=[0.3] * 64),
        sample(BARE, 128, first_token=[0.080] * 128),
        sample(TRIPOD, 128, first_token=[0.099] * 128, seconds=[1.11]),
    ]


def test_a_case_is_the_median_of_its_rounds_with_the_lowest_and_the_highest() -> None:
    seconds = {1: 2.0, 2: 1.0, 3: 4.0}
    figures = Figures([sample(TRIPOD, 1, round=n, seconds=[s]) for n, s in seconds.items()], TITLES)
    assert figures.tokens_per_second(TRIPOD, 1, 0.0) == Spread(64, 32, 128)
    assert figures.bytes_per_token(TRIPOD, 1, 0.0) == Spread(10, 10, 10)
    assert figures.cpu_per_1000_tokens(TRIPOD, 1, 0.0).median == pytest.approx(500 / 128)
    assert figures.seconds(PEER, 1, 0.0) is None


def test_p99_is_that_of_all_jobs_of_all_rounds() -> None:
    assert percentile_99([7]) == 7
    assert percentile_99(range(101)) == 99
    rounds = [sample(TRIPOD, 1, first_token=[0.01 * n]) for n in range(101)]
    assert Figures(rounds, TITLES).first_token_p99(TRIPOD, 1, 0.0) == pytest.approx(990)


def test_the_table_has_a_row_for_each_measured_case_and_the_bare_engine_once() -> None:
    samples = [*kept(), sample(PEER, 1, round_trip=0.05, tokens=128 * 1000, seconds=[10.0])]
    rows = table(Figures(samples, TITLES)).splitlines()[2:]
    assert len(rows) == len(samples)
    assert rows[0] == "|  | 1 | bare engine | 10 | 10 | 128 | 0.50 | 10.0 | 3.91 |"
    assert "| 50 ms | 1 | worker-vllm | 10 | 10 | 12,800 |" in rows[-1]
    assert Spread(1234.5, 1000, 2000).text(1) == "1,234.5 (1,000.0 to 2,000.0)"


def test_promises_that_are_just_kept_pass() -> None:
    found = promises(Figures(kept(), TITLES))
    assert [promise.kept for promise in found] == [True] * 12
    assert promises_table(found).count("| pass |") == 12


@pytest.mark.parametrize(
    ("place", "changes", "missed"),
    [
        (1, {"first_token": [0.0251]}, 0),
        (5, {"first_token": [0.146] * 16}, 1),
        (8, {"first_token": [0.29] * 64}, 2),
        (3, {"first_token": [0.039] * 16}, 3),
        (6, {"first_token": [0.079] * 64}, 4),
        (10, {"first_token": [0.101] * 128}, 5),
        (4, {"seconds": [1.12]}, 6),
        (7, {"seconds": [1.12]}, 7),
        (9, {"seconds": [0.99]}, 8),
        (7, {"front_cpu": 0.246}, 9),
        (2, {"seconds": [1.11]}, 10),
        (7, {"bytes": 128 * 64 * 12 + 1}, 11),
    ],
)
def test_each_promise_is_missed_by_its_own_figure(place: int, changes: dict, missed: int) -> None:
    samples = kept()
    samples[place] = replace(samples[place], **changes)
    found = promises(Figures(samples, TITLES))
    assert [n for n, promise in enumerate(found) if not promise.kept] == [missed]
    assert "**miss**" in found[missed].row()


def test_without_the_peer_its_promises_are_not_measured() -> None:
    rows = promises_table(promises(Figures([s for s in kept() if s.subject != PEER], TITLES)))
    assert rows.count("not measured") == 2
    assert rows.count("pass") == 10


def test_the_readme_keeps_everything_but_what_stands_between_the_marks() -> None:
    text = f"a\n{readme.BEGIN}\nold\n{readme.END}\nb\n"
    made = readme.with_block(text, "new\n")
    assert made == f"a\n{readme.BEGIN}\nnew\n{readme.END}\nb\n"
    assert readme.with_block(made, "new") == made
    for wrong in ("nothing", f"{readme.END} {readme.BEGIN}", f"{text}{readme.BEGIN}{readme.END}"):
        with pytest.raises(ValueError, match="once each"):
            readme.with_block(wrong, "new")


def test_the_page_of_figures_has_the_marks() -> None:
    readme.with_block(readme.PAGE.read_text(encoding="utf-8"), "new")
