"""Put the results into docs/reference/figures.md, and their promises into README.md."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reference" / "figures.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def with_block(text: str, block: str) -> str:
    """The text with `block` between its marks.

    Raises:
        ValueError: the marks are not both there, once and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"the page must hold {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{after}"


def promises(block: str) -> str:
    """The rows of the table of promises in the page's figures, with its head."""
    _, head, rest = block.partition("| promise | limit | measured | |")
    return head + rest.partition("\n\n")[0]


def put(path: Path, block: str) -> None:
    path.write_text(with_block(path.read_text(encoding="utf-8"), block), encoding="utf-8")


def main() -> None:
    """Refresh the pages from benchmarks/results/*.md, whose pictures lie beside them."""
    found = [RESULTS / name for name in ("job_path.md", "engines.md")]
    parts = [path.read_text(encoding="utf-8").strip() for path in found if path.exists()]
    block = re.sub(r"\]\((?!https?:)", "](../../benchmarks/results/", "\n\n".join(parts))
    put(PAGE, block)
    put(README, promises(block))
    print(f"{PAGE.name} holds the figures of {', '.join(p.name for p in found if p.exists())}")


if __name__ == "__main__":
    main()
