r"""A*-PO with a value after each step of a response, in place of one reward at its end.

Question: equation (3) fits the log-ratio of a whole response to r - V*(x). With a value V* of each
          beginning of a response, it can be fitted step by step. Is that worth its tokens?
Command:  python -m experiments.process --values toy/values.json --lr 1e-4 --batch-size 128 \
              --num-steps 20 --eval-dataset toy/test.jsonl --eval-every 5 --out runs/process
          The flags are those of train_online.py, and --continuations.
          python -m experiments.compare --rows process --only response lines_2 --task none \
              --model toy/reference --dataset toy/train.jsonl --test toy/test.jsonl \
              --max-tokens 128 --rates 1e-4 --goals .7 .8 .9 --num-steps 40 --seeds 3 \
              --no-seconds --eval-samples 8
Time:     on one core two to three times as long a step as train_online.py
Output:   a run folder like that of train_online.py. The metric ref_tokens is the number of tokens
          that were sampled from the reference for each response of the first update.
Answer:   on the toy no: to a reward of 0.9 it takes 0.54 million tokens with two continuations, and
          0.30 million with one reward at the end; accuracy after 40 steps is 94.2 ± 0.3 % with
          two continuations, and 96.2 ± 0.2 % with one reward
          (experiments/results/process.txt, three seeds). Eight continuations were not run to the
          end.

A step is a line of the response; on the toy it is one column of the sum. After h of H lines, the
value of the beginning y_1..h is, for rewards r_t of each line,

    V*(x, y_1..h) = beta1 ln E exp(sum over t > h of r_t / beta1),    y_h+1.. ~ pi_ref

(the paper's rebuttal; h = 0 gives equation (1)). Here r_t is 0 except for the last line, which has
the reward of the response. The optimal policy satisfies for each line, with V* = 0 after the last,

    beta ln(pi / pi_ref)(line h) = r_h + V*(x, y_1..h) - V*(x, y_1..h-1),

and the sum over all lines is equation (2). The loss is the sum over the lines of the squared
differences of both sides. V*(x) is from stage 1. The other values need new samples in every step:
from each beginning, --continuations responses of the reference. So few samples estimate V* too low:
with two of them at a success rate of one half and beta1 = 0.5 it is 0.61 on average, and should be
0.72. One alone gives the mean reward.
"""

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import losses
import train_online
from apo import command_line, engine, files, math_reward, problems
from apo.engine import Response
from apo.policy import MicroBatch
from experiments import forgetting
from train_online import Algorithm, TrainingData

# ---------------------------------------------------------------------------------------------
# Lines, and the values of beginnings


def line_ends(ids: list[int], newline: int) -> list[int]:
    """Return after how many tokens each line ends. The last line ends with the response.

    >>> line_ends([5, 10, 6, 7, 10, 8, 0], newline=10)
    [2, 5, 7]
    """
    ends = [place + 1 for place, token in enumerate(ids[:-1]) if token == newline]
    return [*ends, len(ids)]


def beginning_values(
    ref: PreTrainedModel,
    tokenizer: AutoTokenizer,
    responses: list[Response],
    newline: int,
    num_continuations: int,
    max_tokens: int,
    beta1: float,
) -> tuple[list[list[float]], list[int]]:
    """Estimate V* after each line but the last of all responses, and count the tokens it took.

    Returned are the values of each response and its number of sampled tokens.
    """
    prompts = []
    beginnings = []
    for place, response in enumerate(responses):
        for end in line_ends(response.ids, newline)[:-1]:
            beginnings += [(place, end)] * num_continuations
            prompts += [response.prompt.ids + response.ids[:end]] * num_continuations
    values = [[] for _ in responses]
    num_tokens = [0] * len(responses)
    if not prompts:
        return values, num_tokens
    sampled = forgetting.sample(ref, prompts, tokenizer.eos_token_id, max_tokens)

    texts = []
    answers = []
    for (place, end), ids, length in zip(
        beginnings, sampled.ids, sampled.lengths.tolist(), strict=True
    ):
        continuation = ids[sampled.start :][:length].tolist()
        num_tokens[place] += min(length, max_tokens - end)
        whole = responses[place].ids[:end] + continuation
        is_finished = continuation[-1] == tokenizer.eos_token_id and len(whole) <= max_tokens
        # A response that does not end in time earns 0, as everywhere.
        texts.append(tokenizer.decode(whole[:-1]) if is_finished else "")
        answers.append(responses[place].prompt.row["answer"])
    rewards = torch.tensor(math_reward.grade(texts, answers), dtype=torch.float64)
    estimates = losses.optimal_value(rewards.view(-1, num_continuations), beta1).tolist()
    for (place, _), value in zip(beginnings[::num_continuations], estimates, strict=True):
        values[place].append(value)
    return values, num_tokens


def line_targets(reward: float, v_star: float, values: list[float]) -> list[float]:
    """Return r_h + V*(x, y_1..h) - V*(x, y_1..h-1) of each line; their sum is r - V*(x).

    >>> line_targets(1.0, 0.5, [0.25, 0.75])
    [-0.25, 0.5, 0.25]
    """
    before = [v_star, *values]
    after = [*values, reward]
    return [a - b for a, b in zip(after, before, strict=True)]


# ---------------------------------------------------------------------------------------------
# The algorithm


def process(args: argparse.Namespace, data: TrainingData) -> Algorithm:
    """A*-PO by lines. The reference that samples is loaded once more, for transformers."""
    disable_progress_bar()
    folder = files.model_folder(data.values.header["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ref = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    newline = tokenizer("\n").input_ids[-1]
    # For the responses of a step, by their index: the last token and the target of each line.
    ends = {}
    targets = {}

    def credit(responses: list[Response]) -> None:
        values, num_tokens = beginning_values(
            ref,
            tokenizer,
            responses,
            newline,
            args.continuations,
            data.values.header["max_tokens"],
            args.beta1 or data.values.header["beta1"],
        )
        for response, value, count in zip(responses, values, num_tokens, strict=True):
            ends[response.index] = line_ends(response.ids, newline)
            v_star = response.numbers["v_star"]
            targets[response.index] = line_targets(response.reward, v_star, value)
            response.numbers["ref_tokens"] = float(count)

    def loss(batch: MicroBatch, token_logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sequence_losses = []
        token_logratios = (token_logp - batch.ref_logp).split(batch.lengths.tolist())
        for response, token_logratio in zip(batch.responses, token_logratios, strict=True):
            lengths = torch.tensor([0, *ends[response.index]]).diff()
            logratio = losses.sequence_logprob(token_logratio, lengths)
            target = torch.tensor(targets[response.index], device=logratio.device)
            sequence_losses.append((args.beta2 * logratio - target).square().sum())
        logratio = losses.sequence_logprob(token_logp - batch.ref_logp, batch.lengths)
        statistics = {"logratio": logratio, "ref_tokens": batch.numbers["ref_tokens"]}
        return torch.stack(sequence_losses), statistics

    return Algorithm(loss, credit=credit)


# ---------------------------------------------------------------------------------------------
# The command


def make_parser() -> argparse.ArgumentParser:
    """Take the flags of train_online.py, and add --continuations."""
    parser = train_online.make_parser()
    parser.description = __doc__.splitlines()[0]
    parser.epilog = None
    group = parser.add_argument_group("process")
    group.add_argument(
        "--continuations",
        type=command_line.positive_integer,
        default=2,
        help="responses of the reference from each beginning",
    )
    return parser


def main() -> None:
    """Check, launch, train."""
    args = make_parser().parse_args()
    if args.resume:
        raise files.UserError(
            "process cannot --resume, because checkpoints do not hold the state of its sampling: "
            "start again with another --out"
        )
    data = train_online.check(args, can_resume=False)
    header = data.values.header
    if header["reward"] != problems.reward_name("math") or header["temperature"] != 1:
        raise files.UserError(
            f"process knows mathematics at temperature 1 alone, and {args.values} has the reward "
            f"{header['reward']} at {header['temperature']}"
        )
    engine.launch(args.tensor_parallel_size)
    train_online.train(args, data, process(args, data))


if __name__ == "__main__":
    command_line.run(main)
