"""A fork's whole course project: another task, and A*-PO with one more metric.

    python parity.py offline_value.py FLAGS      stage 1 or 3, with the task registered
    python parity.py train FLAGS                 stage 2, with the task and the algorithm

FORK_DATA names the folder of the task's rows; FORK_FAILS the id of a row whose reward raises.
"""

import os
import runpy
import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import train_online
from apo import engine, problems
from apo.engine import Response
from apo.policy import MicroBatch, Policy


def score_parity(response: str, row: dict) -> float:
    """Give 1.5 if the last digit is even or odd as the row's rule wants it, else -0.5."""
    if row["id"] == os.environ.get("FORK_FAILS"):
        raise LookupError("a fault in the reward function")
    digits = [int(letter) for letter in response if letter.isdigit()]
    return 1.5 if digits and digits[-1] % 2 == row["rule"]["parity"] else -0.5


problems.DATASETS["parity"] = problems.Dataset(
    source=os.environ["FORK_DATA"] + "/parity-{split}.jsonl",
    splits={"train": "train", "test": "dev"},
    question=lambda row: row["ask"] + "?",
    answer=lambda row: row["rule"]["parity"],
    template="{question} Put it in \\boxed{}.\n",
    reward=score_parity,
    test_set="parity",
)


def credit(responses: list[Response]) -> None:
    for response in responses:
        response.numbers["parity"] = response.prompt.row["rule"]["parity"]


def prepare(policy: Policy, updates: list[list[MicroBatch]]) -> None:
    for batches in updates:
        for batch in batches:
            batch.extra["twice"] = 2.0 * batch.numbers["parity"]


def loss(batch: MicroBatch, token_logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    sequence_losses, statistics = train_online.a_star_po(0.1).loss(batch, token_logp)
    statistics["twice_parity"] = batch.extra["twice"]
    return sequence_losses, statistics


def train() -> None:
    args = train_online.make_parser().parse_args()
    data = train_online.check(args)
    engine.launch(args.tensor_parallel_size)
    train_online.train(args, data, train_online.Algorithm(loss, credit, prepare))


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "train":
        train()
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
