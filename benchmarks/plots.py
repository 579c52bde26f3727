"""The pictures beside the tables. The only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.figures import BARE, PEER, STOCK, TRIPOD, Figures, Spread

mpl.use("Agg")

COLOURS = {BARE: "#6b7280", TRIPOD: "#1f6feb", STOCK: "#7cb5ff", PEER: "#d9541e"}
MARKERS = {BARE: "s", TRIPOD: "o", STOCK: "^", PEER: "D"}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "savefig.dpi": 150,
}

Value = Callable[[str, int, float], Spread | None]


def job_path(figures: Figures, path: Path) -> None:
    """First token above, throughput below; a column for each round trip."""
    columns = len(figures.round_trips)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, columns, figsize=(4.6 * columns, 7), sharex=True, sharey="row", squeeze=False
        )
        for column, round_trip in enumerate(figures.round_trips):
            top, bottom = axes[0][column], axes[1][column]
            _lines(top, figures, round_trip, figures.first_token)
            _lines(bottom, figures, round_trip, figures.tokens_per_second)
            top.set_yscale("log")
            top.set_title(f"platform {round_trip * 1000:.0f} ms away")
            bottom.set_ylim(bottom=0)
            bottom.set_xlabel("jobs at once")
        axes[0][0].set_ylabel("time to first token, ms")
        axes[0][0].yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda y, _: f"{y:,.0f}"))
        axes[1][0].set_ylabel("throughput, tokens/s")
        axes[1][0].yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda y, _: f"{y:,.0f}"))
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels))
        figure.tight_layout(rect=(0, 0, 1, 0.95))
        figure.savefig(path)
        plt.close(figure)


def _lines(axes: Axes, figures: Figures, round_trip: float, value: Value) -> None:
    """A line for each subject through its medians, the rounds' range shaded around it."""
    for subject, title in figures.titles.items():
        points = [
            (n, s) for n, jobs in enumerate(figures.jobs) if (s := value(subject, jobs, round_trip))
        ]
        if not points:
            continue
        places = [place for place, _ in points]
        spreads = [spread for _, spread in points]
        axes.plot(
            places,
            [spread.median for spread in spreads],
            color=COLOURS[subject],
            marker=MARKERS[subject],
            linestyle="--" if subject == BARE else "-",
            label=title,
        )
        axes.fill_between(
            places,
            [spread.low for spread in spreads],
            [spread.high for spread in spreads],
            color=COLOURS[subject],
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xticks(range(len(figures.jobs)), [str(jobs) for jobs in figures.jobs])
