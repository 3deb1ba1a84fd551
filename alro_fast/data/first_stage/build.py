"""A first stage's lists: sampled users to train on, the retriever's candidates to rank, a hint for every candidate.

Nothing that training reads depends on a held-out like: the retriever, the hints, the sampled users and the training
lists are functions of the training ratings of likes.py alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import polars as pl

from ...run_folder import held
from ..lists import TARGET_SCHEMA, seen_frame, train_statistics, write_prepared
from ..prepared import FileOptions, Stages, check_output, manifest_of, read_files
from ..records import RankingList
from ..sources.interactions import Interactions
from ..windows import TIE_RULE
from .hints import FoldedModels, FoldedRetrievers
from .likes import LIKE_SPLIT_RULE, LikeSplit, split_likes
from .list_maker import ListMaker
from .options import HintOptions
from .retrieval import Retrieved, Retriever, fit_retriever, need_libraries, retrieval_metrics, retrieve, seen_items
from .sampling import UserSample, candidates_for_sampling, describe, parse_parts, rule, sample_users

TRAIN_RULE = (
    "each draw of a user gives a choice list and, unless --choice_lists_only, a rated list; choice list: half of "
    "num_candidates are rated, three fifths of those of one rating and the rest of the next lower value of the scale, "
    "the highest such pair, both likes, of which the user has more of each; where there is none, the user's best "
    "rated (ties at random); the other half are items the user has no training rating of, uniformly among items with "
    "training ratings; rated list: training ratings of the user drawn uniformly, half of them at most; history = "
    "history_length of the user's other training ratings, drawn uniformly, in time order; presented order random"
)
EVAL_RULE = (
    "one list per user with targets: the best num_candidates the user has no training rating of, in the retriever's "
    "order (test lists leave the validation target out); only the target is rated, a missed one leaves all unrated; "
    "history = the user's latest history_length training ratings; a user with every retrievable item rated has no list"
)
HINT_RULE = (
    "biased matrix factorisation of training ratings; training candidates by the model that has not seen their fold "
    "(a hash of user and item), other candidates by the model of all training ratings; candidate_retriever: the "
    "share of the items that the retriever can score which it ranks no higher; of training candidates by a retriever "
    "that has not seen the likes of their fold"
)


class Hinted(NamedTuple):
    """What write_prepared takes (items, lists, targets), counts and figures for the manifest, the sample for a plot."""

    items: pl.DataFrame
    lists: dict[str, list[RankingList]]
    targets: pl.DataFrame
    counts: dict[str, Any]
    retrieval: dict[str, dict[str, float]]
    retriever: dict[str, Any]
    hint_error: float
    sample: UserSample
    like_count: np.ndarray


def prepare_hinted(files: FileOptions, options: HintOptions) -> tuple[Hinted, Stages]:
    """Download if need be, read, `build_hinted`, write; a line for every stage. Returns the stages' printer too."""
    need_libraries()
    recorded = options.recorded | files.recorded
    check_output(files, recorded)
    with held(files.output_dir):
        stage = Stages()
        interactions = read_files(files, stage)
        built = build_hinted(interactions, options, stage.notice, stage.done)
        lists = ", ".join(f"{split} {count:,}" for split, count in built.counts["lists"].items())
        stage.done(f"made lists: {lists}")
        rules = {"tie_rule": TIE_RULE, "split_rule": LIKE_SPLIT_RULE, "train_rule": TRAIN_RULE, "order_rule": EVAL_RULE}
        rules |= {"hint_rule": HINT_RULE, "sampling_rule": rule(parse_parts(options.sampling))}
        manifest = manifest_of(files, interactions, recorded, options.seed, rules, built.counts) | {
            "retriever": built.retriever,
            "retrieval": built.retrieval,
            "hint_rmse": built.hint_error,
            "sampling": describe(built.sample, built.like_count),
        }
        seen = seen_frame(interactions.user, interactions.item, interactions.user_ids)
        write_prepared(files.output_dir, built.items, built.lists, manifest, built.targets, seen)
        return built, stage


def build_hinted(
    interactions: Interactions,
    options: HintOptions,
    notice: Callable[[str], None] = print,
    done: Callable[[str], None] = lambda what: None,
) -> Hinted:
    """Split, fit, sample and cut. notice: takes what a user should know; done: called with a line after every stage."""
    need_libraries()
    split = split_likes(interactions, options.like, options.seed, options.min_likes)
    candidates_for_sampling(split.like_count)
    _notices_of_split(split, options, notice)
    done(f"split {split.liked.sum():,} training likes, {(split.target['test'] >= 0).sum():,} users with targets")
    retriever = fit_retriever(options.retriever, split, options.of_retriever, options.seed)
    found = {
        name: retrieve(retriever, seen_items(split, also), split.target[name], options.num_candidates)
        for name, also in (("valid", None), ("test", split.target["valid"]))
    }
    has = split.target["test"] >= 0
    retrieval = {name: _figures(one, has, options.num_candidates) for name, one in found.items()}
    done(f"fitted {options.retriever}: " + ", ".join(f"{k} {v:.4f}" for k, v in retrieval["valid"].items() if "@" in k))
    refit = partial(fit_retriever, options.retriever, options=options.of_retriever, seed=options.seed)
    models = FoldedModels(split, options.folds, options.seed)
    retrievers = FoldedRetrievers(split, options.folds, options.seed, retriever, refit)
    done(f"fitted rating models: root mean square error {models.error:.4f} out of fold")
    sample = sample_users(
        split.like_count, retriever.embeddings, options.num_samples, seed=options.seed,
        parts=parse_parts(options.sampling),
    )  # fmt: skip
    maker = ListMaker(interactions, split, models, retrievers, options)
    train, how = maker.train(sample.drawn)
    lists = {"train": train, **{name: maker.ranked(name, one) for name, one in found.items()}}
    counts = _counts(split, retriever, lists, options, notice) | how
    count, mean = train_statistics(split.item, split.rating, split.items)
    return Hinted(
        items=interactions.items.with_columns(train_count=count, train_mean=mean),
        lists=lists,
        targets=pl.concat([_targets(name, interactions, split, one) for name, one in found.items()]),
        counts=counts,
        retrieval=retrieval,
        retriever={"name": retriever.name, **retriever.options},
        hint_error=models.error,
        sample=sample,
        like_count=split.like_count,
    )


def _counts(
    split: LikeSplit,
    retriever: Retriever,
    lists: dict[str, list[RankingList]],
    options: HintOptions,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """What was made of what, for the manifest; a notice for whatever is not as a user would expect."""
    has = split.target["test"] >= 0
    cold = int((retriever.cold & has).sum())
    left_out = int(has.sum()) - len(lists["test"])
    short = sum(len(one.candidates) < options.num_candidates for one in lists["test"])
    if cold:
        notice(f"{cold:,} users are unknown to the retriever: their candidates are the most popular items")
    if left_out:
        notice(f"{left_out:,} users have seen every item that can be retrieved: they have a miss and no test list")
    if short:
        notice(f"{short:,} users have fewer than {options.num_candidates} candidates: all that are left to them")
    return {
        "users_with_targets": int(has.sum()),
        "users_unknown_to_the_retriever": cold,
        "training_ratings": len(split.item),
        "training_likes": int(split.liked.sum()),
        "training_dislikes": int((split.rating <= options.dislike).sum()),
        "ratings_after_a_validation_target_dropped": split.dropped,
        "lists": {name: len(some) for name, some in lists.items()},
        "short_test_lists": short,
        "users_without_a_candidate": left_out,
    }


def _figures(found: Retrieved, has: np.ndarray, count: int) -> dict[str, float]:
    """Metrics over all users with a target, the ceiling of any re-ranking among them."""
    place = found.place[has]
    ceiling = float(((place >= 1) & (place <= count)).mean())
    return {
        "users": len(place),
        **retrieval_metrics(place),
        "targets_among_candidates": ceiling,
        "targets_that_cannot_be_retrieved": int((place == 0).sum()),
    }


def _targets(name: str, interactions: Interactions, split: LikeSplit, found: Retrieved) -> pl.DataFrame:
    users = np.flatnonzero(split.target[name] >= 0)
    place = pl.Series(found.place[users])
    columns = {
        "split": pl.repeat(name, len(users), eager=True),
        "user_id": interactions.user_ids.gather(users),
        "item": split.target[name][users],
        "place": place.replace(0, None),
    }
    return pl.DataFrame(columns).cast(cast(Any, TARGET_SCHEMA))


def _notices_of_split(split: LikeSplit, options: HintOptions, notice: Callable[[str], None]) -> None:
    without = int((split.target["test"] < 0).sum())
    if without:
        few = f"{without:,} of {split.users:,} users have fewer than {options.min_likes} likes"
        notice(f"{few}: no targets, all their ratings train")
    if not (split.rating <= options.dislike).any():
        notice(f"no training rating is --dislike {options.dislike:g} or less: no prompt shows disliked items")
