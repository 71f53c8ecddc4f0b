"""How many questions BARGAIN asks: run by `benchmarks.agreement` in an environment of its own, with the package ``bargain``.

Reads a ``.npz`` with `(N,)` labels, confidences and answers of a judge, and one JSON object on standard input: the target, delta
and the seeds. Writes one JSON list per seed: share of images asked, and number of final answers that are not the judge's.
"""

import json
import sys

import numpy as np
from BARGAIN.models.AbstractModels import Oracle, Proxy  # type: ignore[import-not-found]
from BARGAIN.process.BARGAIN_A import BARGAIN_A  # type: ignore[import-not-found]


def main() -> None:
    stored, wanted = np.load(sys.argv[1]), json.load(sys.stdin)
    labels, confidences, answers = stored["labels"], stored["confidences"], stored["answers"]

    class Scorer(Proxy):  # type: ignore[misc]
        def proxy_func(self, row: int) -> tuple[int, float]:
            return int(labels[row]), float(confidences[row])

    class Judge(Oracle):  # type: ignore[misc]
        def oracle_func(self, row: int, proposed: object) -> tuple[bool, int]:
            return bool(answers[row] == proposed), int(answers[row])

    for seed in wanted["seeds"]:
        judge = Judge(verbose=False)
        bargain = BARGAIN_A(Scorer(verbose=False), judge, wanted["target"], wanted["delta"], verbose=False, seed=seed)
        final = np.array(bargain.process(np.arange(len(labels)), return_oracle_usage=False))
        print(json.dumps([judge.get_number_preds() / len(labels), int((final != answers).sum())]), flush=True)


if __name__ == "__main__":
    main()
