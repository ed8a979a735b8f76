"""Make the toy: a tiny reference model and its problems, so that all three stages run in minutes.

A sloppy teacher adds, subtracts and multiplies by one digit, column by column from the right,

    What is 58 + 67?   ->   8+7=15          the careless version, which forgets what it carried:   8+7=15
                            5+6+1=12                                                               5+6=11
                            \\boxed{125}                                                            \\boxed{115}

and a two-layer...
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from problems import format_prompt

EOS = "<|endoftext|>"

# How often the teacher forgets its carries, by operation and number of digits (1, 2, 3, ...).
SLIP = {
    "+": (0.0, 0.05, 0.95, 0.50, 0.80),
    "-": (0.0, 0.70, 0.30, 0.95, 0.50),
    "*": (0.0, 0.95, 0.60),
}
KINDS = [(op, digits) for op, rates in SLIP.items() for digits in range(1, len(rates) + 1)]


def question(problem: tuple[str, int, int]) -> str:
    op, a, b = problem
    return f"What is {a} {op} {b}?"


def draw_problem(rng: random.Random) -> tuple[str, int, int]:
    op, digits = rng.choice(KINDS)
    low, high = 10 ** (digits - 1), 10**digits - 1
    a = rng.randint(low, high)
    b = rng.randint(2, 9) if op == "*" else rng.randint(low, high)
    return (op, max(a, b), min(a, b)) if op == "-" else (op, a, b)


def slip_rate(problem: tuple[str, int, int]) -> float:
    op, a, _ = problem
    return SLIP[op][len(str(a)) - 1]


def work(problem: tuple[str, int, int], careless: bool) -> str:
    op, a, b = problem
    top = [int(d) for d in reversed(str(a))]
    bottom = [b] * len(top) if op == "*" else [int(d) for d in reversed(str(b))]
    lines, answer, carry = [], "", 0
    for p, q in zip(top, bottom, strict=True):
        if op == "-" and p - q - carry < 0:
            p += 10
        value = {"+": p + q + carry, "-": p - q - carry, "*": p * q + carry}[op]
        paid = "" if carry == 0 else f"-{carry}" if op == "-" else f"+{carry}"
        if op == "*" and carry:
            paid += f"={p * q}+{carry}"
        lines.append(f"{p}{op}{q}{paid}={value}")
        answer = f"{value % 10}{answer}"
        carry = 0 if careless else int(p > 9) if op == "-" else value // 10
    if op != "-" and value > 9:
        answer = f"{value // 10}{answer}"
    return "\n".join([*lines, f"\\boxed{{{int(answer)}}}"])


def solve(problem):
    op, a, b = problem
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def make_tokenizer() -> Qwen2Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([EOS, *alphabet])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048)
    tokenizer.add_tokens(["What is ", " + ", " - ", " * ", format_prompt(""), "\n\\boxed{"])
    return tokenizer


def make_model(tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("toy"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train", type=int, default=1024)
    parser.add_argument("--num-test", type=int, default=256)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=8e-3)
    args = parser.parse_args()
    if (args.out / "reference").exists():
        print("exists", file=sys.stderr)
        sys.exit(2)
    start = time.time()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    problems = {}
    while len(problems) < args.num_test + args.num_train:
        problems[draw_problem(rng)] = None
    problems = list(problems)
    test, train = problems[: args.num_test], problems[args.num_test :]
    held_out = set(test)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    nparam = sum(p.numel() for p in model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    opts = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    scheds = [
        torch.optim.lr_scheduler.LambdaLR(
            opt, lambda s: min(1, (s + 1) / 30) * max(0.02, 1 - s / args.num_steps)
        )
        for opt in opts
    ]
    eos = tokenizer.eos_token_id

    def example():
        while (p := draw_problem(rng)) in held_out:
            pass
        x = tokenizer.encode(format_prompt(question(p)))
        y = tokenizer.encode(work(p, rng.random() < slip_rate(p))) + [eos]
        return x, y

    queue = []
    for step in range(args.num_steps):
        if not queue:
            pool = sorted(
                (example() for _ in range(8 * args.batch_size)), key=lambda e: len(e[0]) + len(e[1])
            )
            queue = [pool[i : i + args.batch_size] for i in range(0, len(pool), args.batch_size)]
            rng.shuffle(queue)
        batch = queue.pop()
        T = max(len(x) + len(y) for x, y in batch)
        ids = torch.tensor([x + y + [eos] * (T - len(x) - len(y)) for x, y in batch])
        labels = torch.tensor(
            [[-100] * len(x) + y + [-100] * (T - len(x) - len(y)) for x, y in batch]
        )
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, sched in zip(opts, scheds, strict=True):
            opt.step()
            sched.step()
        if step % 50 == 0 or step == args.num_steps - 1:
            print(step, f"{loss.item():.4f} {time.time() - start:.1f}s T={T}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out / "reference")
    tokenizer.save_pretrained(args.out / "reference")
    for name, rows in ("train", train), ("test", test):
        with open(args.out / f"{name}.jsonl", "w") as f:
            for i, p in enumerate(rows):
                row = {"id": f"{name}-{i}", "question": question(p), "answer": str(solve(p))}
                f.write(json.dumps(row) + "\n")
    print(nparam, time.time() - start)


if __name__ == "__main__":
    main()
