r"""Countdown: a task that is not mathematics, from its data to its learning curve, in one file.

Question: what does it take to train on a task of one's own? Here: three functions of a row (its
          question, its answer, its reward), one entry of DATASETS, and no change in any stage.
Command:  python -m experiments.countdown make
          python -m experiments.countdown offline_value --dataset countdown \
              --model countdown/reference --max-tokens 160 --out countdown/values.json
          python -m experiments.countdown train_online --values countdown/values.json \
              --lr 1e-4 --batch-size 128 --num-steps 150 --out countdown/run
          python -m experiments.countdown evaluate --model countdown/run/final \
              --benchmarks countdown --num-samples 64 --out countdown/after
          python -m experiments.countdown describe countdown/after/countdown.jsonl
          python -m experiments.plot countdown/run
Time:     on 2 busy cores 5 minutes to make, 1 for stage 1, 10 for 150 steps, 3 for stage 3
Output:   countdown/train.jsonl, test.jsonl and reference/; then what the stages write.
Answer:   at temperature 1 the test problems solved rise from 14.4 ± 0.8 to 38.5 ± 1.7 %, and in
          64 tries from 92.2 to 96.5 % (experiments/results/countdown.txt, .jsonl and .png). One
          greedy answer solves 22 % before and 20 % after. At 2e-4 most seeds with V*
          collapse (docs/findings.md).

The task is to reach a target with given numbers, each used at most once:

    Make 26 from 4, 7, 15.        7-4=3*15=45
                                  15+4=19+7=26, yes:
                                  \boxed{(15+4)+7}

On the right is how a teacher works. As on a pocket calculator, a line is a try, from left to right.
The teacher never looks ahead. After a try that misses it may have enough, and then boxes that try.
The reference learns from this teacher, on fresh problems all the time and never on a test problem.
Reinforcement learning has to find out that it pays to go on, and which tries are promising. In the
run above the responses that end with "enough" fall from 83 to 11 %, the tries in a response rise
from 2.7 to 6.5, and the first try hits in 8.6 % instead of 5.9 %. A search needs chance: of the 256
greedy answers, 81 % repeat a try that has missed. So what counts here is the reward, not the
accuracy that stage 2 measures greedily.
"""

import argparse
import ast
import importlib
import json
import math
import operator
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

from apo import command_line, files, problems
from experiments import toy

# ---------------------------------------------------------------------------------------------
# 1. The task: all that the three stages need

TEMPLATE = "{question}\nUse each number at most once. End with an expression in \\boxed{}.\n"

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
ALLOWED = set("0123456789+-*/() ")
LONGEST = 200  # characters of an expression: too few for brackets that exhaust Python's stack


def reward(response: str, row: dict) -> float:
    """Return 1.0 if the last box holds a solution, else 0.0; it never raises on any response.

    Without a box the last line is read. A solution is an expression of + - * / and the row's
    numbers, each used at most once, whose exact value is the row's target.
    """
    _, box, expression = response.rpartition("\\boxed{")
    if box:
        expression, brace, _ = expression.partition("}")
        if not brace:
            return 0.0
    else:
        expression = response.strip().rpartition("\n")[2]
    expression = expression.strip()
    # Nothing else reaches the parser: no names, no strings, no digits of other scripts.
    if len(expression) > LONGEST or not set(expression) <= ALLOWED:
        return 0.0
    unused = list(row["numbers"])
    try:
        value = evaluate(ast.parse(expression, mode="eval").body, unused)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return 0.0
    return 1.0 if value == row["target"] else 0.0


def evaluate(node: ast.expr, unused: list[int]) -> Fraction:
    """Return the value of an expression, and remove its numbers from `unused`.

    Raises ValueError for a number that is not there, and for anything but + - * / and integers.
    """
    if isinstance(node, ast.Constant):
        unused.remove(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
        raise ValueError(f"{type(node).__name__} is not allowed")
    left = evaluate(node.left, unused)
    right = evaluate(node.right, unused)
    return OPERATORS[type(node.op)](left, right)


def question(row: dict) -> str:
    """Ask for a row's target."""
    numbers = ", ".join(str(number) for number in row["numbers"])
    return f"Make {row['target']} from {numbers}."


def answer(row: dict) -> str:
    """Return what is shown as the answer. The reward does not need it: many expressions do."""
    return str(row["target"])


TASK = problems.Dataset(
    source="countdown/{split}.jsonl",
    splits={"train": "train", "test": "test"},
    question=question,
    answer=answer,
    template=TEMPLATE,
    reward=reward,
    test_set="countdown",
)
problems.DATASETS["countdown"] = TASK


# ---------------------------------------------------------------------------------------------
# 2. The teacher

LARGEST_NUMBER = 9
SMALLEST_TARGET = 10  # so that no number is the target already
LARGEST_VALUE = 60  # of a target and of what is computed on the way
SIZES = (3, 4)  # how many numbers a problem has; each entry is as likely
GIVES_UP = 0.2  # how often, after a try that misses
MOST_TRIES = 8
# What follows the last try: a hit, or enough of it.
HIT = ", yes:\n\\boxed{"
ENOUGH = ", enough:\n\\boxed{"


class Step(NamedTuple):
    """One step of a calculation: an operator, the number on its right, and the value so far."""

    sign: str
    number: int
    value: int


class Try(NamedTuple):
    """One calculation from left to right, with all numbers of a problem."""

    first: int
    steps: list[Step]

    @property
    def value(self) -> int:
        """Return what comes out."""
        return self.steps[-1].value

    @property
    def line(self) -> str:
        """Write it as on a pocket calculator: 15+4=19+7=26."""
        text = str(self.first)
        for step in self.steps:
            text += f"{step.sign}{step.number}={step.value}"
        return text

    @property
    def expression(self) -> str:
        """Write it as one expression: (15+4)+7."""
        text = str(self.first)
        for step in self.steps:
            if step is not self.steps[0]:
                text = f"({text})"
            text += f"{step.sign}{step.number}"
        return text


class Problem(NamedTuple):
    """One problem; the numbers in ascending order, so that equal problems are equal."""

    numbers: tuple[int, ...]
    target: int


def possible_steps(value: int, number: int) -> list[Step]:
    """List the steps whose value is a whole number from 1 to LARGEST_VALUE.

    There is always one: + where the value is small, - where it is large.
    """
    values = {"+": value + number, "-": value - number}
    if number > 1:  # times 1 and divided by 1 lead nowhere
        values["*"] = value * number
        if value % number == 0:
            values["/"] = value // number
    steps = [Step(sign, number, result) for sign, result in values.items()]
    return [step for step in steps if 1 <= step.value <= LARGEST_VALUE]


def draw_try(rng: random.Random, numbers: tuple[int, ...]) -> Try:
    """Calculate blindly: numbers in random order, each step as likely as any other."""
    order = rng.sample(numbers, len(numbers))
    value = order[0]
    steps = []
    for number in order[1:]:
        step = rng.choice(possible_steps(value, number))
        steps.append(step)
        value = step.value
    return Try(order[0], steps)


def draw_problem(rng: random.Random, sizes: tuple[int, ...] = SIZES) -> Problem:
    """Draw a problem. Its target is what a blind try gives, so that it can be solved."""
    while True:
        numbers = [rng.randint(1, LARGEST_NUMBER) for _ in range(rng.choice(sizes))]
        target = draw_try(rng, tuple(numbers)).value
        if target >= SMALLEST_TARGET:
            return Problem(tuple(sorted(numbers)), target)


def work(rng: random.Random, problem: Problem) -> str:
    """Work a problem as the teacher does: try until one hits, or until it has enough."""
    text = ""
    for num_tries in range(1, MOST_TRIES + 1):
        attempt = draw_try(rng, problem.numbers)
        text += attempt.line
        if attempt.value == problem.target:
            return f"{text}{HIT}{attempt.expression}}}"
        if num_tries == MOST_TRIES or rng.random() < GIVES_UP:
            break
        text += "\n"
    return f"{text}{ENOUGH}{attempt.expression}}}"


def draw_sets(
    rng: random.Random, num_train: int, num_test: int
) -> tuple[list[Problem], list[Problem]]:
    """Draw distinct problems, and split them into a training and a test set."""
    wanted = num_train + num_test
    drawn = {}  # a dict keeps the order of drawing, a set would not
    for _ in range(100 * wanted):  # if these do not suffice, there are not so many
        drawn[draw_problem(rng)] = None
        if len(drawn) == wanted:
            break
    else:
        raise files.UserError(f"there are not {wanted} different problems: ask for fewer")
    shuffled = rng.sample(list(drawn), len(drawn))
    return shuffled[:num_train], shuffled[num_train:]


def make_rows(rng: random.Random, name: str, drawn: list[Problem]) -> list[dict]:
    """Make the rows of a dataset. The numbers are shuffled: their order must tell nothing."""
    rows = []
    for i, problem in enumerate(drawn):
        numbers = rng.sample(problem.numbers, len(problem.numbers))
        rows.append({"id": f"{name}-{i}", "numbers": numbers, "target": problem.target})
    return rows


# ---------------------------------------------------------------------------------------------
# 3. The reference

# It grows up on small problems: (share of its training, sizes). With two numbers a line is short
# and every second try hits, so that it learns soon to compare a result with the target. On
# problems of three and four numbers from the start it had not learned that after 600 steps.
LESSONS = (
    (0.2, (2,)),
    (0.8, (2, 2, 3, 3, 4)),
)


def make_tokenizer() -> Qwen2Tokenizer:
    """Make a Qwen tokenizer of bytes, in which numbers up to 99 are one token each.

    So are the fixed phrases. All of them are added tokens, not merges (toy.make_tokenizer says
    why).
    """
    vocab = {"<|endoftext|>": 0}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048)
    tokenizer.add_tokens([str(number) for number in range(10, LARGEST_VALUE + 1)])
    instruction = TEMPLATE.replace("{question}", ".")
    tokenizer.add_tokens(["Make ", " from ", ", ", instruction, HIT, ENOUGH])
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Make a Qwen2 of 0.4 M parameters in float32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        # About 1 / sqrt(hidden_size). Qwen2's own 0.02 learns more slowly.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        # This is EOS too, as in many base models.
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def draw_examples(
    rng: random.Random,
    tokenizer: Qwen2Tokenizer,
    held_out: set[Problem],
    count: int,
    sizes: tuple[int, ...],
) -> list[toy.Example]:
    """Draw problems that are not held out, and let the teacher work each of them."""
    examples = []
    while len(examples) < count:
        problem = draw_problem(rng, sizes)
        if problem in held_out:
            continue
        (row,) = make_rows(rng, "", [problem])
        prompt = tokenizer(TEMPLATE.replace("{question}", question(row))).input_ids
        response = tokenizer(work(rng, problem)).input_ids
        examples.append(toy.Example(prompt, [*response, tokenizer.eos_token_id]))
    return examples


def draw_batches(
    rng: random.Random,
    tokenizer: Qwen2Tokenizer,
    held_out: set[Problem],
    batch_size: int,
    num_steps: int,
) -> Iterator[toy.Batch]:
    """Yield a batch for each step, lesson by lesson.

    Each batch has examples of similar lengths, otherwise half of the work would be padding. So the
    examples of eight batches are drawn together and sorted, and the eight come in random order.
    """
    for share, sizes in LESSONS:
        batches_left = math.ceil(share * num_steps)
        while batches_left > 0:
            pool = draw_examples(rng, tokenizer, held_out, 8 * batch_size, sizes)
            pool.sort(key=lambda example: example.length)
            starts = range(0, len(pool), batch_size)
            for start in rng.sample(starts, min(batches_left, len(starts))):
                yield toy.pad_batch(pool[start : start + batch_size], tokenizer.eos_token_id)
                batches_left -= 1


# ---------------------------------------------------------------------------------------------
# 4. The commands

# What can be run on this task: the second word of the command, and its module.
STAGES = {
    "offline_value": "offline_value",
    "train_online": "train_online",
    "baselines": "experiments.baselines",
    "evaluate": "evaluate",
}
USAGE = f"python -m experiments.countdown make|describe|{'|'.join(STAGES)} [flags]"


def parse_args() -> argparse.Namespace:
    """Read the flags of `make`."""
    parser = command_line.new_parser("Make the problems and the reference of countdown.", "")
    add = parser.add_argument
    whole = command_line.positive_integer
    add("--out", type=Path, default=Path("countdown"), help="folder to write to")
    add("--seed", type=command_line.seed, default=0, help="seed of problems, weights and training")
    add("--num-train", type=whole, default=1024, help="problems in train.jsonl")
    add("--num-test", type=whole, default=256, help="problems in test.jsonl")
    add("--num-steps", type=whole, default=900, help="updates of the reference")
    add("--batch-size", type=whole, default=64, help="worked problems per update")
    add(
        "--lr",
        type=command_line.positive_number,
        default=1e-2,
        help="learning rate, after 30 steps of warm-up",
    )
    return parser.parse_args()


def make() -> None:
    """Draw the problems, train the reference, and write both. The reference gets its name last."""
    args = parse_args()
    reference = args.out / "reference"
    if reference.exists():
        raise files.UserError(f"{reference} exists: remove it or choose another --out")
    files.check_writable(reference)
    disable_progress_bar()
    start = time.monotonic()
    # So small a model gains little from a second thread, and loses much on a busy machine. With a
    # fixed number the sums do not depend on the number of cores.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    train_set, test_set = draw_sets(rng, args.num_train, args.num_test)
    for name, drawn in (("train", train_set), ("test", test_set)):
        lines = [json.dumps(row) + "\n" for row in make_rows(rng, name, drawn)]
        path = args.out / f"{name}.jsonl"
        text = "".join(lines)
        files.refuse_other_content(path, text)
        files.write_text(path, text)

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    batches = draw_batches(rng, tokenizer, set(test_set), args.batch_size, args.num_steps)
    loss = toy.train(model, batches, args.num_steps, args.lr)
    with tempfile.TemporaryDirectory(dir=args.out) as unfinished:
        model.save_pretrained(Path(unfinished, "reference"))
        tokenizer.save_pretrained(Path(unfinished, "reference"))
        Path(unfinished, "reference").rename(reference)
    print(
        f"{reference}: {model.num_parameters():,} parameters, loss {loss:.3f} after "
        f"{args.num_steps} steps, {time.monotonic() - start:.0f} s; "
        f"{len(train_set)} training and {len(test_set)} test problems"
    )


def tries_of(response: str) -> list[str]:
    """Return the tries of a response: the lines before its box, without what follows a comma."""
    before_box = response.partition("\\boxed")[0]
    return [line.partition(",")[0] for line in before_box.split("\n") if "=" in line]


def describe(path: str) -> str:
    """Say how the responses in a file of stage 3 search."""
    records = files.read_jsonl(path)
    if not records or not all({"output", "reward"} <= record.keys() for record in records):
        raise files.UserError(f"{path} has no responses of stage 3")
    num_tries = 0
    num_enough = 0
    num_first_hits = 0
    num_repeating = 0
    for record in records:
        tries = tries_of(record["output"])
        num_tries += len(tries)
        if ENOUGH in record["output"]:
            num_enough += 1
        if len(tries) == 1 and record["reward"] == 1.0:
            num_first_hits += 1
        if len(set(tries)) < len(tries):
            num_repeating += 1
    n = len(records)
    return (
        f"{path}: {n} responses, {num_tries / n:.1f} tries each; {num_enough / n:.1%} end with "
        f'"enough", {num_first_hits / n:.1%} hit with the first try, {num_repeating / n:.1%} '
        "repeat a try"
    )


def main() -> None:
    """Run `make`, `describe`, or a stage that knows the task: the second word says which."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command == "describe":
        for path in sys.argv[2:]:
            print(describe(path))
        return
    if command != "make" and command not in STAGES:
        raise files.UserError(f"{command!r} is no command: {USAGE}")
    # What follows is for the stage, which reads sys.argv as if it had been started itself.
    sys.argv = [f"python -m experiments.countdown {command}", *sys.argv[2:]]
    if command == "make":
        make()
    else:
        importlib.import_module(STAGES[command]).main()


if __name__ == "__main__":
    # Under its full name: a values file says which function scored it, and `__main__.reward` is
    # none that anyone else could find.
    command_line.run(importlib.import_module(__spec__.name).main)
