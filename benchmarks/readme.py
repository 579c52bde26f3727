"""Put the results into docs/reference/figures.md, between its two marks."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reference" / "figures.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def with_block(text: str, block: str) -> str:
    """The text with `block` between its marks.

    Raises:
        ValueError: the marks are not both there, once and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"{PAGE.name} must hold {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{after}"


def main() -> None:
    """Refresh the page from benchmarks/results/*.md, whose pictures lie beside them."""
    found = [RESULTS / name for name in ("job_path.md", "engines.md")]
    parts = [path.read_text(encoding="utf-8").strip() for path in found if path.exists()]
    block = re.sub(r"\]\((?!https?:)", "](../../benchmarks/results/", "\n\n".join(parts))
    PAGE.write_text(with_block(PAGE.read_text(encoding="utf-8"), block), encoding="utf-8")
    print(f"{PAGE.name} holds the figures of {', '.join(p.name for p in found if p.exists())}")


if __name__ == "__main__":
    main()
