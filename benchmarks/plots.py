"""The pictures beside the tables. The only module that imports matplotlib."""

from collections.abc import Callable
from pathlib import Path
from statistics import median

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.figures import BARE, PEER, STOCK, TRIPOD, Figures, Spread
from benchmarks.run import Run

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

WHOLE = FuncFormatter(lambda value, _: f"{value:,.0f}")

ENGINE_COLOURS = ("#1f6feb", "#d9541e", "#2e9e6b", "#8b5cf6", "#b7791f", "#6b7280")

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
            top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            top.yaxis.set_minor_formatter(NullFormatter())
            top.set_title(f"round trip of {round_trip * 1000:.0f} ms")
            bottom.set_ylim(bottom=0)
            bottom.set_xlabel("jobs at once")
        axes[0][0].set_ylabel("time to first token, ms")
        axes[0][0].yaxis.set_major_formatter(WHOLE)
        axes[1][0].set_ylabel("throughput, tokens/s")
        axes[1][0].yaxis.set_major_formatter(WHOLE)
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


def engines(runs: list[Run], titles: dict[str, str], path: Path) -> None:
    """Throughput and first token by requests at once, a bar for each engine."""
    sizes = sorted({run.requests for run in runs})
    names = [name for name in titles if any(run.engine == name for run in runs)]
    panels = (
        ("throughput, tokens/s", lambda run: run.speed),
        ("time to first token, ms", lambda run: 1000 * median(run.first_token)),
    )
    width = 0.8 / len(names)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.8))
        for panel, (label, value) in zip(axes, panels, strict=True):
            for place, name in enumerate(names):
                found = [
                    [value(run) for run in runs if (run.engine, run.requests) == (name, size)]
                    for size in sizes
                ]
                heights = [median(values) for values in found]
                bars = panel.bar(
                    [n + (place + 0.5) * width - 0.4 for n in range(len(sizes))],
                    heights,
                    width * 0.92,
                    yerr=[
                        [h - min(v) for h, v in zip(heights, found, strict=True)],
                        [max(v) - h for h, v in zip(heights, found, strict=True)],
                    ],
                    error_kw={"ecolor": "#374151", "elinewidth": 1, "capsize": 2},
                    color=ENGINE_COLOURS[place % len(ENGINE_COLOURS)],
                    label=titles[name],
                )
                panel.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
            panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            panel.set_xlabel("requests at once")
            panel.set_ylabel(label)
            panel.yaxis.set_major_formatter(WHOLE)
            panel.grid(visible=False, axis="x")
            panel.margins(y=0.12)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels))
        figure.tight_layout(rect=(0, 0, 1, 0.92))
        figure.savefig(path)
        plt.close(figure)
