"""Stage 3: score a model on math benchmarks, mean@n and pass@k with standard errors.

    python evaluate.py --model runs/math/final --benchmarks math500,amc23 --out results/math
    python evaluate.py --grade results/math/math500.jsonl    # score saved outputs again, no model

As in the paper, the large sets get one greedy answer to each problem; AMC, AIME and HMMT get 32
samples at temperature 1. All samples are saved; a killed run continues if started again as it was.
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

import problems
from losses import pass_at_k

SMALL = ("amc23", "aime24", "aime25", "hmmt_feb_2024", "hmmt_feb_2025")  # 30 or 40 problems each

parser = problems.command_line(__doc__.splitlines()[0], engine_share=0.9)
add = parser.add_argument
add("--model", default="runs/math/final", help="a folder or a hub id")
add("--benchmarks", default="math500,minerva,olympiadbench,amc23", help="names or files")
add("--num-samples", type=int, default=0, help="n per problem; 0: each benchmark's own")
add("--temperature", type=float, help="None: 0, greedy, for one sample, else 1")
add("--top-p", type=float, default=1.0, help="nucleus of sampling")
add("--max-tokens", type=int, default=1024, help="longest response, in tokens")
add("--limit", type=int, default=0, help="use only the first so many problems; 0: all")
add("--out", default="results/math", help="folder of the samples and summary.json")
add("--grade", help="score this file of outputs (answer, output[, finished, id]) instead")
add("--chat-template", action="store_true", help="ask through the tokenizer's chat template")


def score(records: list[dict]) -> dict:
    """Sum up one benchmark's samples {"id", "reward", "answer", "output", "finished", "tokens"}.

    Fractions between 0 and 1. `mean` and pass@k are means over problems, `stderr` is over problems;
    the rest is over samples. `mean_any_end` waives the rule that a response without EOS earns 0,
    since base models ramble on.
    """
    by_problem, cut = {}, [r for r in records if not r["finished"]]
    for record in records:
        by_problem.setdefault(record["id"], []).append(record["reward"])
    rewards, average = list(by_problem.values()), statistics.mean
    means, n = [average(r) for r in rewards], min(map(len, rewards))
    passed = {str(k): average(pass_at_k(len(r), sum(x > 0 for x in r), k) for r in rewards)
              for k in sorted({2**i for i in range(n.bit_length())} | {n})}  # fmt: skip
    any_end = problems.grade([r["output"] for r in cut], [r["answer"] for r in cut])
    any_end += [r["reward"] for r in records if r["finished"]]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    told = {"num_problems": len(means), "num_samples": n, "mean": average(means), "stderr": error}
    told |= {"pass_at_k": passed, "tokens": average(r["tokens"] for r in records)}
    return told | {"truncated": len(cut) / len(records), "mean_any_end": average(any_end)}


def table(benchmarks: dict[str, dict]) -> str:
    """Lay the scores out for a person."""
    lines = ["benchmark        problems   n    mean ±  s.e.  any end  truncated  tokens  pass@k"]
    row = ("{:<16} {num_problems:>8} {num_samples:>3} {mean:>7.1%} ± {stderr:>5.1%} "
           "{mean_any_end:>8.1%} {truncated:>10.1%} {tokens:>7.0f}  {}").format  # fmt: skip
    for name, told in benchmarks.items():
        passes = (f"@{k} {value:.1%}" for k, value in told["pass_at_k"].items())
        lines.append(row(name, "  ".join(passes), **told))
    return "\n".join(lines)


def grade_file(path: Path) -> dict:
    """Score saved outputs again; UserError unless every row has an answer and an output."""
    rows, summary = problems.read_rows(path), path.with_name("summary.json")
    if summary.exists():  # samples of ours: are they as they were saved?
        saved = problems.read_json(summary, ours=True).get("benchmarks", {}).get(path.stem)
        if saved and saved["samples_sha256"] != problems.file_sha256(path):
            print(f"{path} is not as it was saved: damaged or edited", file=sys.stderr)
    types = {"output": str, "finished": bool, "tokens": int, "id": str | int}
    for i, row in enumerate(rows):
        with problems.explain(f"{path}, row {i + 1}"):
            rows[i] = {"id": f"row {i + 1}", "finished": True, "tokens": 0} | row
            wrong = [key for key, kind in types.items() if not isinstance(rows[i].get(key), kind)]
            if wrong or "answer" not in row:
                raise TypeError(f"without a usable {wrong[0] if wrong else 'answer'}: {row!r:.60}")
    problems.split_gradable(path, rows, "counts as wrong")
    said = [row["output"] if row["finished"] else "" for row in rows]
    rewards = problems.grade(said, [row["answer"] for row in rows])
    return score([row | {"reward": r} for row, r in zip(rows, rewards, strict=True)])


def main() -> None:
    """Sample, grade, save, sum up."""
    args = parser.parse_args()
    problems.check_args(args, "num_samples", "limit", "temperature")
    if args.grade:
        return print(table({Path(args.grade).stem: grade_file(Path(args.grade))}))
    sets, out = {}, Path(args.out)
    for name in args.benchmarks.split(","):
        rows = problems.load_problems(name, "test")[: args.limit or None]
        problems.split_gradable(name, rows, "counts as wrong")
        name = Path(name).stem if Path(name).suffix else name
        if name in sets:
            raise problems.UserError(f"two benchmarks are called {name}: give each its own --out")
        sets[name] = rows, {"rows_sha256": problems.content_sha256({"rows": rows})}
    # in tokens; of a longer prompt the end is asked
    longest = min(4096, problems.context_length(args.model) - args.max_tokens)
    if longest < 1:
        raise problems.UserError(f"--max-tokens {args.max_tokens} leaves {args.model} no prompt")
    problems.launch(args.tensor_parallel_size)
    import torch.distributed as dist

    header = problems.identify(args, "benchmarks", "grade")
    done = problems.left_by(out / "summary.json", header).get("benchmarks", {})
    # what is done is compared with its file, and is not sampled again
    for name in sets.keys() & done.keys():
        ours = sets.pop(name)[1] | {"samples_sha256": problems.file_sha256(out / f"{name}.jsonl")}
        problems.refuse_difference(f"{out / name}.jsonl", done[name], ours)
    llm = problems.start_engine(args, longest) if sets else None
    for name, (rows, identity) in sets.items():
        problems.write_prompts(rows, llm, args, longest)
        n, file = args.num_samples or (32 if name in SMALL else 1), out / f"{name}.jsonl"
        heat = float(n > 1) if args.temperature is None else args.temperature
        how = {"temperature": heat, "top_p": args.top_p}
        records = problems.sample_all(llm, rows, n, file, header | identity, args, **how)
        if dist.get_rank() == 0:
            problems.write_whole(file, "".join(json.dumps(record) + "\n" for record in records))
            done[name] = score(records) | identity | {"samples_sha256": problems.file_sha256(file)}
            problems.write_json(out / "summary.json", {"header": header, "benchmarks": done})
            shutil.rmtree(f"{file}.partial", ignore_errors=True)  # NFS may keep an empty one
        dist.barrier()
    if dist.get_rank() == 0:
        print(table(done), "grading:", problems.grading_counts, sep="\n")
    if llm:
        llm.llm_engine.engine_core.shutdown()  # destroys the process group as well


if __name__ == "__main__":
    problems.run(main)
