"""Whether the log-likelihoods that lm-eval logged are those of ``LLM.score``.

python docs/examples/lm_eval/compare.py RESULTS_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from oxillama_torch import LLM


def main() -> None:
    [samples] = Path(sys.argv[1]).rglob("samples_*.jsonl")
    worst = count = 0
    with LLM(device="cpu") as llm:
        for line in samples.read_text().splitlines():
            sample = json.loads(line)
            requests = sample["arguments"].values()
            for request, [[logged, _]] in zip(requests, sample["resps"], strict=True):
                context, answer = request["arg_0"], request["arg_1"]
                # lm-eval joins the tokens of the context with those of the whole that follow.
                context_ids, ids = llm.tokenize(context), llm.tokenize(context + answer)
                ids[: len(context_ids)] = context_ids
                own = sum(llm.score(ids).logprobs[len(context_ids) :])
                worst, count = max(worst, abs(own - float(logged))), count + 1
    print(f"{count} log-likelihoods, apart by {worst:.2g} at most")
    assert count and worst < 1e-3


if __name__ == "__main__":
    main()
