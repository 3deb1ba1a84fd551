"""`python -m bench.llm.loss_curves FOLDER`: losses of the fast path and of Hugging Face + PEFT, padded, step by step.

Both begin with the same weights and see the same batches of ml-latest-small in the same order; each follows its own
gradients, so a difference of one step stays in all later ones, and a jump of the loss makes it grow: rounding alone
parts them. Writes curves.json and curves.png; exit status 1 where the curves are further apart than BOUND.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.llm.cases import LAYERS, Ordinary, Ours, adamw, examples, make_model, make_objective, step

LISTS, LEARNING_RATE = 2, 1e-3
BOUND = 5e-3  # of the loss: how far the two curves may be apart at any step


def curves(
    name: str, steps: int, history: int = 20, learning_rate: float = LEARNING_RATE, **options: Any
) -> dict[str, list[float]]:
    """The losses of both ways; history: items shown before a list; options: of ALRO."""
    objective = make_objective(history=history, **options)
    ways = {}
    for way, kind in (("alro_fast", Ours), ("Hugging Face + PEFT", Ordinary)):
        model = make_model(name, LAYERS[name])
        ways[way] = kind(model, objective, examples(objective, LISTS, history=history)), adamw(model, learning_rate)
    losses: dict[str, list[float]] = {way: [] for way in ways}
    for number in tqdm(range(steps), desc=name, mininterval=30):
        batch = examples(objective, LISTS, seed=number, history=history)
        for way, (built, optimizer) in ways.items():
            built.take(batch)
            losses[way].append(step(built, optimizer, autocast=False))
    return losses


def apart(losses: dict[str, list[float]]) -> list[float]:
    """Per step, the difference of the two losses over the second."""
    ours, theirs = losses.values()
    return [abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True)]


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Both curves, and below them how far they are apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5), height_ratios=(3, 1))
    for (way, values), style in zip(losses.items(), ({"linewidth": 3, "alpha": 0.4}, {"linewidth": 1})):
        above.plot(range(1, len(values) + 1), values, label=way, **style)
    above.set(ylabel="loss")
    above.legend()
    distance = [max(value, 1e-9) for value in apart(losses)]
    below.semilogy(range(1, len(distance) + 1), distance, color="C3", linewidth=1)
    below.axhline(BOUND, color="C7", linestyle=":")
    below.set(xlabel="step", ylabel="apart, relative")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.llm.loss_curves", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where curves.json and curves.png go")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", default="4 x 256", choices=sorted(LAYERS), help="a name of bench.llm.cases")
    options = parser.parse_args(arguments)
    losses = curves(options.model, options.steps)
    options.folder.mkdir(parents=True, exist_ok=True)
    found = {"model": options.model, "furthest_apart": max(apart(losses)), "losses": losses, "torch": torch.__version__}
    (options.folder / "curves.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(losses, options.folder / "curves.png")
    first, last = (sum(values) / 10 for values in (losses["alro_fast"][:10], losses["alro_fast"][-10:]))
    furthest = max(apart(losses))
    print(f"{options.steps} steps of {options.model}: loss {first:.3f} to {last:.3f}; furthest apart {furthest:.1e}")
    return 0 if max(apart(losses)) <= BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
