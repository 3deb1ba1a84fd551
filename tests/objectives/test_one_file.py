"""An objective is one file: everybody who has to know of it asks its description."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

from alro_fast import objectives, train
from alro_fast.errors import AlroFastError
from alro_fast.objectives.base import descriptions
from alro_fast.ranking.ranker import Ranker
from alro_fast.training.help import help_text

LISTNET = '''"""ListNet's top-one loss (Cao et al., 2007) on the prompts of ALRO: the first slot as ratings are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..modeling.lm_head import Head
from ..modeling.packing import PackedBatch
from ..ops import linear_logprobs
from ..options import option
from ..prompts import PromptBuilder
from .alro import ALROObjective, ALROTargets
from .base import ALWAYS, Description, Example, LossTerm


@dataclass
class ListNetArguments:
    temperature: float = option(1.0, "Ratings are divided by it: the lower, the more the best one counts.")


class ListNetObjective(ALROObjective):
    """loss = mean over lists of -sum_i P(i) log Q(i), P = softmax(ratings / temperature), Q = softmax(logits)."""

    def targets(self, packed: PackedBatch, examples: Sequence[Example]) -> tuple[ALROTargets, dict[str, int]]:
        targets, _ = super().targets(packed, examples)
        return targets, {"listnet": targets.presented}

    def loss(self, hidden: Tensor, head: Head, packed: PackedBatch, targets: ALROTargets) -> list[LossTerm]:
        lists, nothing = targets.lists, torch.finfo(torch.float32).min
        rows = hidden[lists.slot_rows[:, 0]]  # those that predict the first identifier
        ids = lists.candidate_ids.masked_fill(lists.candidate_ids < 0, -100)
        logprobs, _ = linear_logprobs(rows, head.weight, ids, bias=head.bias, softcap=head.softcap, scale=head.scale)
        logq = logprobs.masked_fill(ids < 0, nothing).log_softmax(dim=1)
        wanted = (lists.ratings / self.arguments.temperature).nan_to_num(nan=nothing).softmax(dim=1)
        return [LossTerm("listnet", -(wanted * logq).sum(dim=1).mean(), 1.0, targets.presented)]


LISTNET = Description(
    name="listnet",
    summary="the best candidate first: ListNet's top-one loss (Cao et al., 2007)",
    objective=ListNetObjective,
    run="lists",
    prompts=PromptBuilder,
    options=ListNetArguments,
    reads={"permutations": ALWAYS},
    logs={"listnet": "ListNet"},
    learns=lambda options: "identifiers",
)
'''


@pytest.fixture
def listnet(tmp_path):
    """The file beside the others, for as long as a test runs."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "listnet.py").write_text(LISTNET)
    objectives.__path__.append(str(tmp_path / "package"))
    descriptions.cache_clear()
    yield
    objectives.__path__.pop()
    sys.modules.pop("alro_fast.objectives.listnet", None)
    descriptions.cache_clear()


def test_an_objective_is_one_file(listnet, tmp_path):
    """Options, --help, training, what was learned and ranking: all from its description."""
    assert "--temperature FLOAT" in help_text("listnet", [])
    words = (
        "--objective listnet --dataset demo --model_name_or_path demo --template demo --use_cpu true --max_steps 12 "
    )
    words += "--max_train_lists 64 --max_eval_lists 4 --max_test_lists 8 --save_strategy no --disable_tqdm true "
    words += (
        f"--learning_rate 0.003 --warmup_steps 0 --logging_steps 1 --report_to none --output_dir {tmp_path / 'run'}"
    )
    with pytest.raises(AlroFastError, match=r"--alpha has no meaning for --objective listnet; .* --objective alro"):
        train.main([*words.split(), "--alpha", "1"])
    with pytest.raises(AlroFastError, match=r"--temperature has no meaning for --objective alro; .* listnet"):
        train.main([*words.replace("listnet", "alro").split(), "--temperature", "1"])
    train.main([*words.split(), "--temperature", "0.5", "--permutations", "0"])
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (options["temperature"], options["learned_answers"]) == (0.5, "identifiers")
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["listnet"] for entry in history if "listnet" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert Ranker.load(tmp_path / "run", device="cpu").answer == "ranking"
