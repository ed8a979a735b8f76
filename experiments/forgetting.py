"""How far has training moved a model on problems of another size?

Question: training has three and four numbers in a problem. What happens to problems with two, which
          the reference can solve and which training never sees?
Command:  python -m experiments.forgetting --model countdown/run/final --out countdown/other.json
Time:     20 s on one core
Output:   JSON with "kl", the mean of ln(pi / pi_ref) of a response in nats, and "reward", the share
          of right responses; both over NUM_SAMPLES responses to each such problem
Answer:   see docs/findings.md; compare.py runs this for each trained model.
"""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from apo import command_line, files
from experiments import countdown
from experiments.countdown import LARGEST_NUMBER, SMALLEST_TARGET, Problem

NUM_SAMPLES = 16
MAX_TOKENS = 160


class Responses(NamedTuple):
    """Sampled responses to prompts of different lengths, padded on both sides."""

    ids: Tensor  # (B, T): padding, prompt, response, padding
    mask: Tensor  # (B, T): true for prompt and response
    start: int  # where each response begins
    lengths: Tensor  # (B,): tokens of each response, EOS included


def other_problems() -> list[Problem]:
    """List all problems with two numbers. Their order is fixed."""
    problems = set()
    for numbers in itertools.combinations_with_replacement(range(1, LARGEST_NUMBER + 1), 2):
        for first, second in itertools.permutations(numbers):
            for step in countdown.possible_steps(first, second):
                if step.value >= SMALLEST_TARGET:
                    problems.add(Problem(numbers, step.value))
    return sorted(problems)


def sample(
    model: PreTrainedModel, prompts: list[list[int]], eos: int, max_tokens: int
) -> Responses:
    """Sample a response to each prompt at temperature 1. EOS is the padding, too."""
    start = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), start), eos)
    mask = torch.zeros(len(prompts), start, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, start - len(prompt) :] = torch.tensor(prompt)
        mask[row, start - len(prompt) :] = 1
    ids = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        pad_token_id=eos,
    )
    response = ids[:, start:]
    # All tokens before the first EOS, and that one.
    before_eos = (response == eos).cumsum(dim=1) == 0
    lengths = (before_eos.sum(dim=1) + 1).clamp(max=response.shape[1])
    is_response = torch.arange(response.shape[1]) < lengths[:, None]
    return Responses(ids, torch.cat([mask.bool(), is_response], dim=1), start, lengths)


@torch.no_grad()
def sequence_logprobs(model: PreTrainedModel, responses: Responses) -> Tensor:
    """Return ln pi of each response, summed over its tokens, (B,)."""
    positions = (responses.mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        input_ids=responses.ids, attention_mask=responses.mask.long(), position_ids=positions
    ).logits
    token_logp = logits[:, :-1].log_softmax(dim=-1)
    token_logp = token_logp.gather(2, responses.ids[:, 1:, None]).squeeze(2)
    is_response = responses.mask[:, 1:].clone()
    is_response[:, : responses.start - 1] = False
    return (token_logp * is_response).sum(dim=1)


def measure(folder: Path, reference: Path, seed: int) -> dict[str, float]:
    """Sample from the model in `folder`, and compare it with the reference."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(reference)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ref = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    rows = []
    prompts = []
    for problem in other_problems():
        row = problem._asdict()
        prompt = countdown.TEMPLATE.replace("{question}", countdown.question(row))
        rows += [row] * NUM_SAMPLES
        prompts += [tokenizer(prompt).input_ids] * NUM_SAMPLES
    eos = tokenizer.eos_token_id
    responses = sample(model, prompts, eos, MAX_TOKENS)
    logratios = sequence_logprobs(model, responses) - sequence_logprobs(ref, responses)
    rewards = 0.0
    for row, ids, length in zip(rows, responses.ids, responses.lengths, strict=True):
        response = ids[responses.start :][:length]
        if response[-1] == eos:  # otherwise it was cut off, and earns nothing
            rewards += countdown.reward(tokenizer.decode(response[:-1]), row)
    return {"kl": logratios.mean().item(), "reward": rewards / len(rows)}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.new_parser(__doc__.splitlines()[0], "")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the trained model")
    add("--reference", type=Path, default=Path("countdown/reference"), help="the reference")
    add("--seed", type=command_line.seed, default=0, help="seed of sampling")
    add("--out", type=Path, required=True, help="file to write")
    return parser.parse_args()


def main() -> None:
    """Measure one model."""
    args = parse_args()
    files.check_writable(args.out)
    disable_progress_bar()
    folders = [files.model_folder(str(model)) for model in (args.model, args.reference)]
    result = measure(*folders, args.seed)
    print(result)
    files.write_json(args.out, result)


if __name__ == "__main__":
    command_line.run(main)
