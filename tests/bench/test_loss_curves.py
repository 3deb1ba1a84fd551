"""The fast path and Hugging Face + PEFT, padded, on ml-latest-small: two losses at every step, one curve."""

from __future__ import annotations

import pytest


def test_the_curves_lie_on_each_other(shared_data):
    from bench.llm.loss_curves import apart, curves

    losses = curves("tiny", 8, history=2, learning_rate=0.02)
    ours = losses["alro_fast"]
    assert len(ours) == 8
    assert max(apart(losses)) <= 1e-5
    assert max(ours) - min(ours) > 0.02 * max(ours)  # they go somewhere


def test_every_lever_left_out_gives_the_same_loss(shared_data):
    from bench.llm.cases import LEVERS, Ours, examples, make_model, make_objective

    objective = make_objective(history=2)
    chosen = examples(objective, 2, history=2)
    losses = {lever: Ours(make_model("tiny", 2), objective, chosen, lever).loss().item() for lever in ("", *LEVERS)}
    assert losses == pytest.approx(dict.fromkeys(losses, losses[""]), rel=1e-5)
