"""Stage 3: score a model on math benchmarks, mean@n and pass@k with standard errors.

    python evaluate.py --model runs/math/final --benchmarks math500,amc23 --out results/math
    python evaluate.py --grade results/math/math500.jsonl    # score saved outputs again, no model

As in the paper, the large sets get one greedy answer to each problem; AMC, AIME and HMMT get 32
samples at temperature 1. All samples are saved; a killed run continues if started again as it was.
"""

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path

import problems
from losses import pass_at_k
from problems import UserError

FIELDS = ("id", "sample", "prompt", "answer", "output", "reward", "tokens", "finished")
UNASKED = {"output": "", "reward": 0.0, "tokens": 0, "finished": False}  # no room to answer
SMALL = ("amc23", "aime24", "aime25", "hmmt_feb_2024", "hmmt_feb_2025")  # 30 or 40 problems each


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--model", default="runs/math/final", help="a folder or a hub id")
    add(
        "--benchmarks",
        default="math500,minerva,olympiadbench,amc23",
        help="names or files, with commas",
    )
    add("--num-samples", type=int, default=0, help="n per problem; 0: each benchmark's own")
    add("--temperature", type=float, help="(default: 0, greedy, for one sample, else 1)")
    add("--top-p", type=float, default=1.0, help="nucleus of sampling")
    add("--max-tokens", type=int, default=1024, help="longest response, in tokens")
    add("--limit", type=int, default=0, help="use only the first so many problems; 0: all")
    add("--seed", type=int, default=0, help="of sampling")
    add("--out", default="results/math", help="folder of the samples and summary.json")
    add("--grade", help="score this file of outputs (answer, output[, finished, id]) instead")
    add("--chat-template", action="store_true", help="ask through the tokenizer's chat template")
    add("--gpu-memory-utilization", type=float, default=0.9, help="the engine's share of a GPU")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs per engine")
    return parser.parse_args()


def score(records: list[dict]) -> dict:
    """Sum up one benchmark's samples {"id", "reward", "answer", "output", "finished", "tokens"}.

    Fractions between 0 and 1, means over problems of means over samples, `stderr` over problems.
    `mean_any_end` waives the rule that a response without EOS earns 0: base models ramble on.
    """
    by_problem, unfinished = {}, [r for r in records if not r["finished"]]
    for record in records:
        by_problem.setdefault(record["id"], []).append(record["reward"])
    rewards = list(by_problem.values())
    waived = problems.grade([r["output"] for r in unfinished], [r["answer"] for r in unfinished])
    means, n = [statistics.mean(r) for r in rewards], min(map(len, rewards))
    passed = lambda k: statistics.mean(pass_at_k(len(r), round(sum(r)), k) for r in rewards)  # noqa: E731
    sizes = {"num_problems": len(means), "num_samples": n, "mean": statistics.mean(means)}
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    tokens = statistics.mean(r["tokens"] for r in records)
    any_end = (sum(r["reward"] for r in records) + sum(waived)) / len(records)
    ends = {"truncated": len(unfinished) / len(records), "tokens": tokens, "mean_any_end": any_end}
    return sizes | {"stderr": error, "pass_at_k": {str(k): passed(k) for k in ks}} | ends


def table(benchmarks: dict[str, dict]) -> str:
    """Lay the scores out for a person."""
    row = "{:<16} {:>8} {:>3} {:>15} {:>8} {:>9} {:>6}  {}".format
    lines = [
        row("benchmark", "problems", "n", "mean ± s.e.", "any end", "truncated", "tokens", "pass@k")
    ]
    for name, s in benchmarks.items():
        mean, passes = f"{s['mean']:.1%} ± {s['stderr']:.1%}", s["pass_at_k"].items()
        ends = (f"{s['mean_any_end']:.1%}", f"{s['truncated']:.1%}", f"{s['tokens']:.0f}")
        passes = "  ".join(f"@{k} {value:.1%}" for k, value in passes)
        lines.append(row(name, s["num_problems"], s["num_samples"], mean, *ends, passes))
    return "\n".join(lines)


def report_ungradable(name: str | Path, rows: list[dict]) -> None:
    """Say which answers cannot be graded; UserError if none can."""
    gradable, reasons = problems.split_gradable(rows)
    for key, reason in reasons.items():
        print(f"{key} counts as wrong, its answer is {reason}")
    if not gradable:
        raise UserError(f"{name}: no answer can be graded")


def grade_file(path: Path) -> dict:
    """Score saved outputs again; UserError unless every row has an answer and an output."""
    defaults, rows = {"finished": True, "tokens": 0}, problems.read_rows(path)
    for i, row in enumerate(rows):
        if (
            not isinstance(row, dict)
            or "answer" not in row
            or not isinstance(row.get("output"), str)
        ):
            raise UserError(f"{path}, row {i + 1} has not an answer and an output: {row!r:.60}")
        rows[i] = {"id": f"row {i + 1}"} | defaults | row
    report_ungradable(path, rows)
    rewards = problems.grade([r["output"] for r in rows], [r["answer"] for r in rows])
    pairs = zip(rows, rewards, strict=True)
    return score([row | {"reward": reward * bool(row["finished"])} for row, reward in pairs])


def main() -> None:
    """Sample, grade, save, sum up."""
    args = parse_args()
    problems.check_args(args, "num_samples", "limit", "temperature")
    if args.top_p > 1:
        raise UserError(f"--top-p {args.top_p} is out of range")
    if args.grade:
        return print(table({Path(args.grade).stem: grade_file(Path(args.grade))}))
    sets, out = {}, Path(args.out)
    for name in args.benchmarks.split(","):
        rows = problems.load_problems(name, "test")[: args.limit or None]
        report_ungradable(name, rows)
        sets[Path(name).stem if Path(name).suffix else name] = rows
    context = problems.context_length(args.model)
    problems.launch()
    import torch.distributed as dist
    from transformers import AutoTokenizer

    rank, summary, done = dist.get_rank(), out / "summary.json", {}
    header = problems.identify(args, "benchmarks", "grade")
    if summary.exists():
        saved = problems.read_json(summary)
        problems.refuse_difference(f"what is in {out}", saved["header"], header)
        done = saved["benchmarks"]
    sets = {name: rows for name, rows in sets.items() if name not in done}
    every = list(itertools.chain(*sets.values()))
    if every:
        tokenizer = AutoTokenizer.from_pretrained(problems.model_folder(args.model))
        problems.write_prompts(every, tokenizer, args.chat_template)
        longest = max(len(row["prompt_ids"]) for row in every) + args.max_tokens
        llm = problems.start_engine(args, min(context, longest), seed=args.seed)
    for name in sets:
        n, file = args.num_samples or (32 if name in SMALL else 1), out / f"{name}.jsonl"
        temperature = float(n > 1) if args.temperature is None else args.temperature
        params = {"temperature": temperature, "top_p": args.top_p, "max_tokens": args.max_tokens}
        rows = [row for row in sets[name] if len(row["prompt_ids"]) + args.max_tokens <= context]
        identity = header | {"rows_sha256": problems.content_sha256({"rows": sets[name]})}
        drawn = problems.sample_all(llm, rows, n, file, identity, args, **params)
        records = [row | {"sample": i} | UNASKED for row in sets[name] for i in range(n)]
        records = [r | drawn.get((r["id"], r["sample"]), {}) for r in records]
        records = [{field: r[field] for field in FIELDS} for r in records]
        if rank == 0:
            done[name] = score(records)
            problems.write_whole(file, "".join(json.dumps(record) + "\n" for record in records))
            scores = {"header": header, "benchmarks": done}
            problems.write_whole(summary, json.dumps(scores, indent=2))
        dist.barrier()
    if rank == 0:
        print(table(done), "grading:", problems.grading_counts(), sep="\n")
    if every:
        llm.llm_engine.engine_core.shutdown()  # destroys the process group as well


if __name__ == "__main__":
    problems.run(main)
