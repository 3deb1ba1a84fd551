"""The closing table, the tables of the report and the report itself, sent to the trackers of --report_to.

Steps and validations reach trackers by the Trainer's own integrations: the loss and its parts, NDCG, throughput and
utilisation. Those end with training; the test lists are ranked after it. So the runs that they began are noted when
training begins, and opened again for what is measured in the end.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from ...texts import read_json

RESULTS = ("results.json", "preference_results.json")


class Measured(NamedTuple):
    """What a run's folder holds of its end: means by "test/<ranker>/<metric>", tables by name, and the page."""

    means: dict[str, float]
    tables: dict[str, list[list[str]]]  # the first row: names of columns
    page: Path | None


class Closing(TrainerCallback):
    """Notes where the trackers write; `share(folder)` sends them what the folder holds when everything is measured."""

    def __init__(self) -> None:
        self.senders: list[Callable[[Measured], None]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the integrations, which are called before callbacks that are given."""
        if not state.is_world_process_zero:
            return
        self.senders = [OPENED[name](args) for name in args.report_to or () if name in OPENED]

    def share(self, folder: Path) -> None:
        """To every tracker; once."""
        if self.senders:
            measured = read_measured(folder)
            for send in self.senders:
                send(measured)
            self.senders = []


def read_results(folder: Path) -> dict[str, Any]:
    """What results.json holds, or preference_results.json; nothing where a run had no test lists."""
    for name in RESULTS:
        if (folder / name).is_file():
            found: dict[str, Any] = read_json(folder / name)
            return found
    return {}


def read_measured(folder: Path) -> Measured:
    """Of the results, tables/*.csv and report.html: what is there."""
    means, tables = dict(_numbers(read_results(folder), "test")), {}
    for path in sorted((folder / "tables").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            tables[path.stem] = list(csv.reader(file))
    page = folder / "report.html"
    return Measured(means, tables, page if page.is_file() else None)


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Numbers of nested mappings by their paths; what is about the measurement, and ends of intervals, are left out."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key != "about":
                yield from _numbers(each, f"{name}/{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield re.sub(r"[^\w./@-]+", "_", name), float(value)


def as_markdown(table: list[list[str]]) -> str:
    """A table of CSV rows."""
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tensorboard(args: Any) -> Callable[[Measured], None]:
    from torch.utils.tensorboard import SummaryWriter

    begun = (Path(args.output_dir) / "runs").glob("*")
    folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or max(begun, key=lambda path: path.stat().st_mtime)

    def send(measured: Measured) -> None:
        writer: Any = SummaryWriter(str(folder))
        for name, value in measured.means.items():
            writer.add_scalar(name, value, 0)
        for name, table in measured.tables.items():
            writer.add_text(f"report/{name}", as_markdown(table), 0)
        writer.close()

    return send


def _wandb(args: Any) -> Callable[[Measured], None]:
    import wandb

    run = wandb.run

    def send(measured: Measured) -> None:
        run.summary.update(measured.means)
        shown: dict[str, Any] = {
            f"report/{name}": wandb.Table(columns=table[0], data=table[1:]) for name, table in measured.tables.items()
        }
        if measured.page is not None:
            shown["report/page"] = wandb.Html(str(measured.page), inject=False)
        run.log(shown)
        run.finish()

    return send


def _mlflow(args: Any) -> Callable[[Measured], None]:
    import mlflow

    run = mlflow.active_run().info.run_id
    client = mlflow.MlflowClient()

    def send(measured: Measured) -> None:
        for name, value in measured.means.items():
            client.log_metric(run, name.replace("@", "_"), value)
        for name, table in measured.tables.items():
            client.log_table(run, dict(zip(table[0], zip(*table[1:]))), f"report/{name}.json")
        if measured.page is not None:
            client.log_artifact(run, str(measured.page), "report")

    return send


def _trackio(args: Any) -> Callable[[Measured], None]:
    import trackio

    name = trackio.context_vars.current_run.get().name

    def send(measured: Measured) -> None:
        trackio.init(project=args.project, name=name, resume="must", space_id=args.trackio_space_id)
        shown: dict[str, Any] = {
            f"report/{title}": trackio.Table(columns=table[0], data=table[1:])
            for title, table in measured.tables.items()
        }
        trackio.log(measured.means | shown)
        trackio.finish()

    return send


OPENED: dict[str, Callable[[Any], Callable[[Measured], None]]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio,
}  # fmt: skip
