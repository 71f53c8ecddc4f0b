"""Measures the bundled cascade with cascadevlm, on new images of species that were not used in training.

``python -m training.measure`` prints the figures of the README as JSON. The judge is asked once about each image, and its
verdicts are kept, so that all figures use the same answers.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import cascadevlm_backends.aviary
from cascadevlm import Cascade, LabelSet, Prediction, TopK, load_scorer
from cascadevlm.base.images import load_image
from cascadevlm.config.config import Config, read_toml
from cascadevlm.judges.cache import MemoryStore
from cascadevlm.policies.measures import entropy
from cascadevlm.policies.rules import Always
from cascadevlm_backends.aviary.birds import species
from training.render import TEST_SEED, render_files

AVIARY = Path(next(iter(cascadevlm_backends.aviary.__path__)))


def right(predictions: Sequence[Prediction], truths: Sequence[str]) -> float:
    return float(np.mean([p.label == truth for p, truth in zip(predictions, truths, strict=True)]))


def main(each: Annotated[int, typer.Option(help="Number of images per species.")] = 20, all_names: bool = True) -> None:
    labels = LabelSet.of(kind.name for kind in species()[1])
    with tempfile.TemporaryDirectory() as folder:
        paths, truths = zip(*render_files(Path(folder), each=each, seed=TEST_SEED), strict=True)
        scorer = load_scorer("open_clip:aviary")
        scores = scorer.score([load_image(path) for path in paths], labels)
        columns = np.array([labels.names.index(truth) for truth in truths])
        ranks = (scores.log_probs > scores.log_probs[np.arange(len(columns)), columns][:, None]).sum(axis=1)
        uncertain = np.argsort(entropy(scores), kind="stable")
        quartiles = [float((ranks[part] == 0).mean()) for part in np.array_split(uncertain, 4)]

        cascade = Config.parse(read_toml(AVIARY / "cascade.toml")).build(labels)
        (stage,) = cascade.stages
        store = MemoryStore()
        ask_all = Cascade(scorer, [replace(stage, policy=Always())], labels=labels, store=store)
        asked = ask_all.classify(paths)
        gated = Cascade(scorer, [stage], labels=labels, store=store).classify(paths)
        five = ranks < 5
        figures: dict[str, object] = {
            "images": len(paths),
            "labels": len(labels),
            "scorer_top1": float((ranks == 0).mean()),
            "scorer_top5": float(five.mean()),
            "scorer_by_entropy_quartile": quartiles,
            "judge_when_truth_among_five": right(
                [p for p, in_five in zip(asked, five, strict=True) if in_five], np.array(truths)[five].tolist()
            ),
            "judge_of_five_on_everything": right(asked, truths),
            "judge_unparsed": sum(p.verdict is not None and p.verdict.outcome == "unparsed" for p in asked),
            "policy": str(stage.policy),
            "escalated": sum(p.escalated for p in gated) / len(gated),
            "cascade": right(gated, truths),
        }
        if all_names:
            whole = Cascade(
                scorer, [replace(stage, policy=Always(), candidates=TopK(k=len(labels)))], labels=labels, on_failure="abstain"
            )
            figures["judge_shown_all_names"] = right(whole.classify(paths), truths)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
