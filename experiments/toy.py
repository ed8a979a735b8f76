r"""Make the toy: a tiny reference model and its problems, so that all three stages run in minutes.

A teacher adds column by column, from the right. On a bad day it forgets whatever it carried:

    What is 358 + 267?      with care   8+7=15         on a bad day   8+7=15
                                        5+6+1=12                      5+6=11
                                        3+2+1=6                       3+2=5
                                        \boxed{625}                   \boxed{515}

How often it has a bad day depends on the number of digits (`BAD_DAYS`), not on the single column:
an error rate per column would give nearly the same success rate to every prompt. So some prompts
are always solved (nothing to carry), some seldom, and V* has something to tell apart. A reference
trained from scratch on that teacher's work imitates both ways of working, in its proportions; what
reinforcement learning has to find out is that carrying pays. It loads like any other model:

    python -m experiments.toy --out toy
    python offline_value.py --model toy/reference --dataset toy/train.jsonl --max-tokens 128 \
        --out toy/values.json

writes toy/reference, toy/train.jsonl and toy/test.jsonl. The reference trains on problems that are
drawn afresh all the time, test problems left out.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

import problems

# ---------------------------------------------------------------------------------------------
# 1. The teacher

# How often the teacher has a bad day, for summands of 1, 2, 3, ... digits.
BAD_DAYS = (0.0, 0.3, 0.85, 0.6, 0.8)


class Problem(NamedTuple):
    """One addition; both summands have the same number of digits."""

    a: int
    b: int

    @property
    def question(self) -> str:
        """The question as it stands in the dataset, without the instruction of the prompt."""
        return f"What is {self.a} + {self.b}?"

    @property
    def answer(self) -> str:
        """The right answer, not by the teacher's way."""
        return str(self.a + self.b)

    @property
    def bad_days(self) -> float:
        """How often the teacher forgets its carries in problems of this length."""
        return BAD_DAYS[len(str(self.a)) - 1]


def draw_problem(rng: random.Random) -> Problem:
    """Draw a problem, every number of digits as often."""
    digits = rng.randint(1, len(BAD_DAYS))
    return Problem(*(rng.randrange(10 ** (digits - 1), 10**digits) for _ in "ab"))


def work(problem: Problem, bad_day: bool) -> str:
    """Work a problem as the teacher does; what was carried is dropped on a bad day."""
    lines, answer, carry = [], "", 0
    for x, y in zip(reversed(str(problem.a)), reversed(str(problem.b)), strict=True):
        value = int(x) + int(y) + carry
        lines.append(f"{x}+{y}+{carry}={value}" if carry else f"{x}+{y}={value}")
        answer = f"{value % 10}{answer}"
        carry = 0 if bad_day else value // 10
    answer = f"{value // 10}{answer}"  # the last column is written out whole
    return "\n".join([*lines, f"\\boxed{{{int(answer)}}}"])


def draw_sets(rng: random.Random, num_train: int, num_test: int) -> tuple[list, list]:
    """Draw distinct problems and split them, shuffled: the few of one digit run out early."""
    drawn = {}
    while len(drawn) < num_train + num_test:
        drawn[draw_problem(rng)] = None
    drawn = rng.sample(list(drawn), len(drawn))
    return drawn[:num_train], drawn[num_train:]


# ---------------------------------------------------------------------------------------------
# 2. The reference


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer with the bytes for a vocabulary, so that any text can be fed.

    The task's fixed phrases are one token each, or the instruction alone would cost 67. They are
    added tokens, not merges: AutoTokenizer gives a Qwen2 model Qwen's class and its way of
    splitting text, whatever was saved, so merges learned on another splitting silently go unused.
    """
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048)
    phrases = ["What is ", " + ", problems.format_prompt(""), "\n\\boxed{"]
    tokenizer.add_tokens(phrases)
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A Qwen2 of 0.9 M parameters in float32, with a window of 2,048 for texts byte by byte."""
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
        initializer_range=0.08,  # about 1 / sqrt(hidden_size); Qwen2's 0.02 learns 3 times slower
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,  # is EOS, as in many base models
    )
    return Qwen2ForCausalLM(config)


def draw_batches(
    rng: random.Random, tokenizer: Qwen2Tokenizer, held_out: set[Problem], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and labels, both (B, T), for ever: prompt + worked answer + EOS.

    The prompt has no labels. A batch is of similar lengths, or half the work would be padding.
    """
    eos = tokenizer.eos_token_id
    while True:
        pool = []
        while len(pool) < 8 * batch_size:
            problem = draw_problem(rng)
            if problem not in held_out:
                prompt = tokenizer(problems.format_prompt(problem.question)).input_ids
                answer = tokenizer(work(problem, rng.random() < problem.bad_days)).input_ids
                pool.append((prompt, [*answer, eos]))
        pool.sort(key=lambda example: len(example[0]) + len(example[1]))
        starts = range(0, len(pool), batch_size)
        for start in rng.sample(starts, len(starts)):
            batch = pool[start : start + batch_size]
            longest = len(batch[-1][0]) + len(batch[-1][1])
            ids = torch.full((batch_size, longest), eos)
            labels = torch.full((batch_size, longest), -100)  # what cross_entropy leaves out
            for row, (prompt, response) in enumerate(batch):
                end = len(prompt) + len(response)
                ids[row, :end] = torch.tensor(prompt + response)
                labels[row, len(prompt) : end] = torch.tensor(response)
            yield ids, labels


def train(model: Qwen2ForCausalLM, batches: Iterator, num_steps: int, lr: float) -> float:
    """Train to predict the next token; returns the loss, the mean of the last 50 steps.

    Muon for the matrices: after 300 steps it worked 70 % of problems of up to six digits without
    an error, AdamW at its best learning rate 32 %. What is hard is to find the digits of a column.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    losses = []
    start = time.time()
    for step in range(num_steps):
        ids, labels = next(batches)
        # Padding comes last, so that causal attention needs no mask.
        logits = model(input_ids=ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 30, 1 - step / num_steps)
            optimizer.step()
            optimizer.zero_grad()
        losses = [*losses[-49:], loss.item()]
        if (step + 1) % 50 == 0:
            mean = sum(losses) / len(losses)
            print(f"step {step + 1:4d}  loss {mean:.3f}  {time.time() - start:4.0f} s", flush=True)
    return sum(losses) / len(losses)


# ---------------------------------------------------------------------------------------------
# 3. The toy


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--out", type=Path, default=Path("toy"), help="folder to write to")
    add("--seed", type=int, default=0, help="seed of problems, initial weights and training")
    add("--num-train", type=int, default=1024, help="problems in train.jsonl")
    add("--num-test", type=int, default=256, help="problems in test.jsonl")
    add("--num-steps", type=int, default=600, help="updates of the reference")
    add("--batch-size", type=int, default=64, help="worked answers per update")
    add("--lr", type=float, default=1e-2, help="learning rate, after 30 steps of warm-up")
    return parser.parse_args()


def main() -> None:
    """Draw the problems, train the reference, and write everything or nothing."""
    args = parse_args()
    for name in ("num_train", "num_test", "num_steps", "batch_size"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise problems.UserError(f"{flag} must be at least 1, not {getattr(args, name)}.")
    if (args.out / "reference").exists():
        raise problems.UserError(f"{args.out}/reference exists; remove it or choose another --out.")
    args.out.mkdir(parents=True, exist_ok=True)  # says now, not in two minutes, that it cannot
    disable_progress_bar()
    start = time.time()
    # So small a model gains nothing from more, and sums would depend on the number of cores.
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    train_set, test_set = draw_sets(rng, args.num_train, args.num_test)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    batches = draw_batches(rng, tokenizer, set(test_set), args.batch_size)
    loss = train(model, batches, args.num_steps, args.lr)

    with tempfile.TemporaryDirectory(dir=args.out, prefix=".toy-") as beside:
        model.save_pretrained(Path(beside, "reference"))
        tokenizer.save_pretrained(Path(beside, "reference"))
        for name, drawn in ("train", train_set), ("test", test_set):
            rows = [
                {"id": f"{name}-{i}", "question": problem.question, "answer": problem.answer}
                for i, problem in enumerate(drawn)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            problems.write_whole(args.out / f"{name}.jsonl", text)
        # Last, as its presence says that the toy is whole.
        Path(beside, "reference").rename(args.out / "reference")
    print(
        f"{args.out}/reference: {model.num_parameters():,} parameters, {len(tokenizer)} tokens, "
        f"loss {loss:.3f} after {args.num_steps} steps, {time.time() - start:.0f} s; "
        f"{len(train_set)} training and {len(test_set)} test problems"
    )


if __name__ == "__main__":
    problems.run(main)
