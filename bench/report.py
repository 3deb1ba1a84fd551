"""`python -m bench.report RESULTS.json ... [--output DIR]`: benchmark results as Markdown tables and PNG plots.

Reads the JSON of `pytest bench/... --benchmark-json`. One table and one plot per group of contestants; contestants that
could not run are listed with the reason. Every number comes from the files. Without matplotlib no plots are made, and
that is said.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

COLUMNS = {  # key of a record: heading, format
    "median_s": ("median", lambda value: _seconds(value)),
    "spread": ("spread", lambda value: f"{100 * value:.0f} %"),
    "times_floor": ("x floor", lambda value: f"{value:.2f}"),
    "times_faster": ("x faster", lambda value: f"{value:.1f}"),
    "error": ("error", lambda value: f"{value:.1e}"),
    "peak_bytes": ("peak memory", lambda value: f"{value / 2**20:,.0f} MiB"),
    "peak_of_logits": ("of fp32 logits", lambda value: f"{100 * value:.1f} %"),
}


class BadResults(ValueError):
    """A file that is no benchmark result."""


def load(paths: list[Path], skip: bool = False) -> dict[str, list[dict]]:
    """Records by group, in the order of the files; with `skip` those that are no results are named and left out."""
    groups: dict[str, list[dict]] = {}
    for path in paths:
        try:
            entries = _entries(path)
        except BadResults as reason:
            if not skip:
                raise
            print(f"left out: {reason}", file=sys.stderr)
            continue
        for entry in entries:
            groups.setdefault(entry["group"] or entry["name"], []).append(_record(entry))
    if not groups:
        raise BadResults(f"{', '.join(map(str, paths))}: no benchmarks inside; run pytest with --benchmark-json first")
    return groups


def _entries(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text())["benchmarks"]
    except FileNotFoundError:
        raise BadResults(f"{path} does not exist; expected the JSON of pytest --benchmark-json") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise BadResults(f"{path} is no benchmark result; expected the JSON of pytest --benchmark-json") from None


def _record(entry: dict) -> dict:
    """A benchmark's own record or, where it made none, pytest-benchmark's statistics."""
    info = dict(entry.get("extra_info", {}))
    info.setdefault("contestant", entry["name"])
    if "absent" not in info:
        stats = entry["stats"]
        if "median_s" not in info and "min" in stats:
            info["spread"] = (stats["max"] - stats["min"]) / stats["median"]
        info.setdefault("median_s", stats["median"])
    return info


def markdown(groups: dict[str, list[dict]]) -> str:
    """All tables, below one line per machine they were measured on."""
    machines = {
        ", ".join(f"{key} {value}" for key, value in record["machine"].items() if value is not None): None
        for records in groups.values()
        for record in records
        if "machine" in record
    }
    parts = ["\n".join(f"Measured on: {line}." for line in machines)] if machines else []
    parts += [table(group, records) for group, records in groups.items()]
    return "\n\n".join(parts) + "\n"


def table(group: str, records: list[dict]) -> str:
    """One group: fastest first, then who is missing and why."""
    ran = sorted((record for record in records if "absent" not in record), key=lambda record: record["median_s"])
    keys = [key for key in COLUMNS if any(record.get(key) is not None for record in ran)]
    lines = [f"### {group.strip('-')}", ""]
    described = next((record for record in ran if "entropy" in record), None)
    if described is not None:
        lines += [f"Logits: mean entropy {described['entropy']:.2f} nats, top-1 {described['top1']:.2f}.", ""]
    lines += ["| | " + " | ".join(COLUMNS[key][0] for key in keys) + " |", "| --- |" + " ---: |" * len(keys)]
    for record in ran:
        cells = ["" if record.get(key) is None else COLUMNS[key][1](record[key]) for key in keys]
        lines.append(f"| {record['contestant']} | " + " | ".join(cells) + " |")
    for record in records:
        if "absent" in record:
            lines.append(f"| {record['contestant']} | {record['absent']} |" + " |" * (len(keys) - 1))
    return "\n".join(lines)


def plots(groups: dict[str, list[dict]], folder: Path) -> list[Path]:
    """One bar chart of medians per group; an empty list without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for group, records in groups.items():
        ran = sorted((record for record in records if "absent" not in record), key=lambda record: -record["median_s"])
        if not ran:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(ran) + 1.4))
        ours = [record["contestant"].startswith("alro_fast") for record in ran]
        times = [1e3 * record["median_s"] for record in ran]
        bars = axes.barh([record["contestant"] for record in ran], times, color=["C0" if own else "C7" for own in ours])
        axes.bar_label(bars, labels=[_seconds(record["median_s"]) for record in ran], padding=3)
        floor = next((record["median_s"] for record in ran if record["contestant"].startswith("floor")), None)
        if floor is not None:
            axes.axvline(1e3 * floor, color="C3", linewidth=1)
        axes.set(title=group.strip("-"), xlabel="median, ms")
        axes.margins(x=0.15)
        path = folder / (re.sub(r"[^A-Za-z0-9.]+", "-", group).strip("-") + ".png")
        figure.savefig(path, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        made.append(path)
    return made


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Benchmark JSON to Markdown and PNG.")
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of pytest --benchmark-json")
    parser.add_argument("--output", type=Path, help="folder for report.md and plots; without it, Markdown is printed")
    parser.add_argument("--skip-unreadable", action="store_true", help="name files that are no results, go on")
    options = parser.parse_args(arguments)
    try:
        groups = load(options.results, options.skip_unreadable)
    except BadResults as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = markdown(groups)
    if options.output is None:
        print(text, end="")
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.md").write_text(text)
    made = plots(groups, options.output)
    drawn = f"{len(made)} plots" if made else "no plots: matplotlib is not installed"
    print(f"{options.output / 'report.md'}: {len(groups)} tables, {drawn}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
