r"""Make the toy: a tiny reference model and its problems, on which all three stages take minutes.

Question: can a model be made in minutes that solves some problems always, some seldom, and that
reinforcement learning can improve? A*-PO needs such prompts, because V* tells them apart.

Command: python -m experiments.toy --out toy
         python offline_value.py --model toy/reference --dataset toy/train.jsonl --max-tokens 128 \
             --out toy/values.json
Time:    3 minutes on 2 cores.
Output:  toy/reference (loads like any other model), toy/train.jsonl, toy/test.jsonl and
         toy/settings.json. With --keep, a toy that was made with the same settings is kept.
Answer:  yes. The reference solves 51 % of the test problems (`make demo`).

The reference learns to add from a teacher who works column by column, from the right. On a bad day
the teacher forgets every carry:

    What is 358 + 267?      with care   8+7=15         on a bad day   8+7=15
                                        5+6+1=12                      5+6=11
                                        3+2+1=6                       3+2=5
                                        \boxed{625}                   \boxed{515}

The chance of a bad day depends on the number of digits (`BAD_DAYS`), not on the column. An error
rate per column would give nearly the same success rate to every prompt. The reference imitates both
ways of working in the teacher's proportions. Reinforcement learning then has to find out that
carrying pays. The reference trains on fresh problems all the time, never on a test problem.
"""

import argparse
import inspect
import json
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

from apo.command_line import positive_integer, positive_number, run, seed
from apo.files import (
    UserError,
    check_writable,
    read_json,
    refuse_difference,
    refuse_other_content,
    write_json,
    write_text,
)
from apo.problems import format_prompt

# ---------------------------------------------------------------------------------------------
# 1. The teacher

# The chance of a bad day, for summands of 1, 2, 3, 4 and 5 digits.
BAD_DAYS = (0.0, 0.3, 0.85, 0.6, 0.8)


class Problem(NamedTuple):
    """One addition. Both summands have the same number of digits."""

    a: int
    b: int

    @property
    def question(self) -> str:
        """Return the question as the dataset has it, without the instruction of the prompt."""
        return f"What is {self.a} + {self.b}?"

    @property
    def answer(self) -> str:
        """Return the right answer. It does not come from the teacher's work."""
        return str(self.a + self.b)

    @property
    def bad_days(self) -> float:
        """Return the chance that the teacher forgets the carries of this problem."""
        return BAD_DAYS[len(str(self.a)) - 1]


def draw_problem(rng: random.Random) -> Problem:
    """Draw a problem. Every number of digits is equally likely."""
    digits = rng.randint(1, len(BAD_DAYS))
    lowest = 10 ** (digits - 1)
    highest = 10**digits
    a = rng.randrange(lowest, highest)
    b = rng.randrange(lowest, highest)
    return Problem(a, b)


def work(problem: Problem, bad_day: bool) -> str:
    """Write down the work of the teacher, one line a column. On a bad day, nothing is carried."""
    lines = []
    answer = ""
    carry = 0
    for x, y in zip(reversed(str(problem.a)), reversed(str(problem.b)), strict=True):
        value = int(x) + int(y) + carry
        if carry:
            lines.append(f"{x}+{y}+{carry}={value}")
        else:
            lines.append(f"{x}+{y}={value}")
        answer = f"{value % 10}{answer}"
        carry = 0 if bad_day else value // 10
    # The last column keeps its carry even on a bad day: 9+9=18 ends in 18, not in 8.
    answer = f"{value // 10}{answer}"
    lines.append(f"\\boxed{{{int(answer)}}}")
    return "\n".join(lines)


def draw_sets(
    rng: random.Random, num_train: int, num_test: int
) -> tuple[list[Problem], list[Problem]]:
    """Draw distinct problems and split them into a training and a test set.

    They are shuffled first, because the few problems of one digit are all drawn early.
    """
    drawn = {}  # a dict keeps the order of drawing, a set would not
    while len(drawn) < num_train + num_test:
        drawn[draw_problem(rng)] = None
    shuffled = rng.sample(list(drawn), len(drawn))
    return shuffled[:num_train], shuffled[num_train:]


# ---------------------------------------------------------------------------------------------
# 2. The reference


def make_tokenizer() -> Qwen2Tokenizer:
    """Make a Qwen tokenizer whose vocabulary is the 256 bytes, so that it can read any text.

    The fixed phrases of the task are one token each. Otherwise the instruction alone would take 67
    tokens. They are added tokens, not merges. AutoTokenizer gives a Qwen2 model the class and the
    text splitting of Qwen, whatever was saved, so merges learned on another splitting would
    silently go unused.
    """
    vocab = {"<|endoftext|>": 0}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048)
    instruction = format_prompt("")
    tokenizer.add_tokens(["What is ", " + ", instruction, "\n\\boxed{"])
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Make a Qwen2 of 0.9 M parameters in float32. A window of 2,048 leaves room for bytes."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        # About 1 / sqrt(hidden_size). With Qwen2's own 0.02 it learns three times slower.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        # This is EOS too, as in many base models.
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


class Example(NamedTuple):
    """One worked problem as token ids. The response ends with EOS."""

    prompt: list[int]
    response: list[int]

    @property
    def length(self) -> int:
        """Count the tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


class Batch(NamedTuple):
    """Token ids and labels, both (B, T). A label of -100 is left out of the loss."""

    ids: torch.Tensor
    labels: torch.Tensor


def draw_examples(
    rng: random.Random, tokenizer: Qwen2Tokenizer, held_out: set[Problem], count: int
) -> list[Example]:
    """Draw problems that are not held out, and let the teacher work each of them."""
    examples = []
    while len(examples) < count:
        problem = draw_problem(rng)
        if problem in held_out:
            continue
        bad_day = rng.random() < problem.bad_days
        prompt = tokenizer(format_prompt(problem.question)).input_ids
        response = tokenizer(work(problem, bad_day)).input_ids
        examples.append(Example(prompt, [*response, tokenizer.eos_token_id]))
    return examples


def pad_batch(examples: list[Example], eos: int) -> Batch:
    """Pad examples at the end, with EOS. Only the tokens of the responses have labels."""
    longest = max(example.length for example in examples)
    ids = torch.full((len(examples), longest), eos)
    labels = torch.full((len(examples), longest), -100)
    for row, example in enumerate(examples):
        start = len(example.prompt)
        end = example.length
        ids[row, :end] = torch.tensor(example.prompt + example.response)
        labels[row, start:end] = torch.tensor(example.response)
    return Batch(ids, labels)


def draw_batches(
    rng: random.Random, tokenizer: Qwen2Tokenizer, held_out: set[Problem], batch_size: int
) -> Iterator[Batch]:
    """Yield batches without end.

    Each batch has examples of similar lengths, otherwise half of the work would be padding. So the
    examples of eight batches are drawn together and sorted, and the eight come in random order.
    """
    while True:
        pool = draw_examples(rng, tokenizer, held_out, 8 * batch_size)
        pool.sort(key=lambda example: example.length)
        starts = range(0, len(pool), batch_size)
        for start in rng.sample(starts, len(starts)):
            yield pad_batch(pool[start : start + batch_size], tokenizer.eos_token_id)


def make_optimizers(model: Qwen2ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices and AdamW for the embedding and the norms.

    After 300 steps with Muon, a reference worked 70 % of problems of up to six digits without an
    error. With AdamW at the best learning rate it worked 32 %. Finding the digits of a column is
    what takes long to learn.
    """
    matrices = []
    others = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


def train(model: Qwen2ForCausalLM, batches: Iterator[Batch], num_steps: int, lr: float) -> float:
    """Train to predict the next token. Return the mean loss of the last 50 steps, in nats."""
    optimizers = make_optimizers(model, lr)
    last_losses = deque(maxlen=50)
    lines_every = max(1, num_steps // 20)
    start = time.monotonic()
    for step in range(1, num_steps + 1):
        batch = next(batches)
        # The padding comes last, so causal attention needs no mask.
        logits = model(input_ids=batch.ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # The learning rate rises for 30 steps. It falls to zero over the full run.
        schedule = min(step / 30, 1 - (step - 1) / num_steps)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * schedule
            optimizer.step()
            optimizer.zero_grad()
        last_losses.append(loss.item())
        if step % lines_every == 0:
            mean = sum(last_losses) / len(last_losses)
            seconds_left = (time.monotonic() - start) / step * (num_steps - step)
            print(
                f"reference: step {step:4d} of {num_steps}  loss {mean:.3f}  "
                f"about {seconds_left:.0f} s left",
                flush=True,
            )
    return sum(last_losses) / len(last_losses)


# ---------------------------------------------------------------------------------------------
# 3. The toy


def make_settings(args: argparse.Namespace) -> dict:
    """Name everything that decides what the toy contains.

    A module can replace Problem here, and so change the toy. So Problem's file is named too.
    """
    return {
        "teacher": Path(inspect.getfile(Problem)).stem,
        "seed": args.seed,
        "num_train": args.num_train,
        "num_test": args.num_test,
        "num_steps": args.num_steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
    }


def check_kept(folder: Path, settings: dict) -> None:
    """Raise UserError unless the folder has a complete toy that was made with these settings."""
    for name in ("settings.json", "train.jsonl", "test.jsonl"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}/reference cannot be kept without {folder / name}: "
                f"remove {folder} to make it again."
            )
    saved = read_json(folder / "settings.json")
    refuse_difference(f"{folder} (remove it or choose another --out)", saved, settings)


def dataset_text(name: str, problems: list[Problem]) -> str:
    """Return a data set as text: one JSON object a line with id, question and answer."""
    lines = []
    for i, problem in enumerate(problems):
        row = {
            "id": f"{name}-{i}",
            "question": problem.question,
            "answer": problem.answer,
        }
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def parse_args() -> argparse.Namespace:
    """Read the command line. Raise UserError for a size below 1."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("toy"), help="folder to write to")
    add("--keep", action="store_true", help="keep a toy that was made with the same settings")
    add("--seed", type=seed, default=0, help="seed of problems, initial weights and training")
    add("--num-train", type=positive_integer, default=1024, help="problems in train.jsonl")
    add("--num-test", type=positive_integer, default=256, help="problems in test.jsonl")
    add("--num-steps", type=positive_integer, default=600, help="updates of the reference")
    add("--batch-size", type=positive_integer, default=64, help="worked answers per update")
    add("--lr", type=positive_number, default=1e-2, help="learning rate, after 30 steps of warm-up")
    return parser.parse_args()


def main() -> None:
    """Draw the problems, train the reference, and write everything or nothing."""
    args = parse_args()
    reference = args.out / "reference"
    if reference.exists() and not args.keep:
        raise UserError(f"{reference} exists: add --keep, remove it, or choose another --out.")

    settings = make_settings(args)
    if reference.exists():
        check_kept(args.out, settings)
        print(f"{reference}: kept, it was made with the same settings (seed {args.seed})")
        return

    # A folder that cannot be written is refused now, not in two minutes.
    check_writable(reference)
    args.out.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    start = time.monotonic()
    # Two threads everywhere. So small a model gains nothing from more, and a sum would depend on
    # the number of cores.
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    train_set, test_set = draw_sets(rng, args.num_train, args.num_test)
    data = {
        args.out / "train.jsonl": dataset_text("train", train_set),
        args.out / "test.jsonl": dataset_text("test", test_set),
    }
    for path, text in data.items():
        refuse_other_content(path, text)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    batches = draw_batches(rng, tokenizer, set(test_set), args.batch_size)
    loss = train(model, batches, args.num_steps, args.lr)

    with tempfile.TemporaryDirectory(dir=args.out, prefix=".toy-") as temporary:
        model.save_pretrained(Path(temporary, "reference"))
        tokenizer.save_pretrained(Path(temporary, "reference"))
        for path, text in data.items():
            write_text(path, text)
        write_json(args.out / "settings.json", settings)
        # The reference gets its name last. Its presence says that the toy is complete.
        Path(temporary, "reference").rename(reference)
    print(
        f"{reference}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens, "
        f"loss {loss:.3f} after {args.num_steps} steps, {time.monotonic() - start:.0f} s; "
        f"{len(train_set)} training and {len(test_set)} test problems"
    )


if __name__ == "__main__":
    run(main)
