"""How good a tuned model's rankings are, beside the baselines, on the same lists.

`python -m alro_fast.evaluate --adapter DIR --lists PREPARED [--split test]` prints NDCG@1/3/5/10 with intervals, states
every convention behind them, and writes results.json, predictions.jsonl, run.trec, qrels.trec and report.html.
`--model_name_or_path BASE` in place of `--adapter DIR` measures a base as it is. Under torchrun, every process ranks a
share of the lists on a device of its own.
"""

from __future__ import annotations

from .cli import launch  # before torch: see there

if __name__ == "__main__":
    launch("evaluate")

# isort: split

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from .cli import OneLineParser
from .evaluation.baselines import baseline_scores
from .evaluation.options import add_evaluation_options, check_evaluation
from .evaluation.preferences import evaluate_preferences
from .evaluation.rankings import evaluate_rankings
from .evaluation.results import evaluate_lists
from .evaluation.zero_shot import add_zero_shot_options
from .modeling.quiet import quiet_libraries
from .processes.dealing import dealing
from .processes.launch import is_first
from .ranking.options import add_model_options, add_ranking_options
from .ranking.ranker import check_device
from .run_folder import held

__all__ = ["baseline_scores", "evaluate_lists", "main"]


def main(argv: Sequence[str]) -> None:
    """Check, then measure rankings or preferences."""
    options = parser().parse_args(argv)
    how = check_evaluation(options)
    with dealing(options.device) as options.device, held(Path(options.output_dir)) if is_first() else nullcontext():
        check_device(options.device)
        quiet_libraries()
        if how is None:
            evaluate_preferences(options)
        else:
            evaluate_rankings(options, how)


def parser() -> OneLineParser:
    """The command's options."""
    parser = OneLineParser(prog="python -m alro_fast.evaluate", description=__doc__)
    add_model_options(parser, adapter_required=False)
    add_evaluation_options(parser)
    add_ranking_options(parser)
    add_zero_shot_options(parser)
    return parser
