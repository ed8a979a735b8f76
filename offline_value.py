"""Stage 1: sample N responses per prompt from the reference, grade them, save V* as JSON.

    python offline_value.py --model Qwen/Qwen2.5-1.5B --dataset math --out values/math.json

Raw rewards are saved beside V*(x) = beta1 ln((1/N) sum_i exp(r(x, y_i) / beta1)), so that another
beta1 or a smaller N needs no GPU. Graded responses go to OUT.partial-RANK as they finish: killed
and started again with the same arguments, stage 1 samples only what is missing.
"""

import argparse
import json
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import problems
from problems import UserError


def parse_args() -> argparse.Namespace:
    """Read the command line; the published MATH run needs no flag."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--model", default="Qwen/Qwen2.5-1.5B", help="reference pi_ref: a folder or a hub id")
    add("--dataset", default="math", help="math, gsm8k, or a .jsonl, .json or .parquet file")
    add("--num-value-samples", type=int, default=8, help="N, responses per prompt")
    add("--beta1", type=float, default=0.5, help="beta1 of V*; inf gives the mean reward")
    add("--temperature", type=float, default=1.0, help="of sampling; it defines pi_ref")
    add("--max-prompt-tokens", type=int, default=256, help="longer prompts are dropped")
    add("--max-tokens", type=int, default=1024, help="longest response, in tokens")
    add("--limit", type=int, default=0, help="use only the first so many problems; 0: all")
    add("--seed", type=int, default=0, help="of sampling")
    add("--out", default="values/math.json", help="the values file")
    add("--chat-template", action="store_true", help="ask through the tokenizer's chat template")
    add("--gpu-memory-utilization", type=float, default=0.9, help="the engine's share of a GPU")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs per engine")
    return parser.parse_args()


def check(args: argparse.Namespace) -> tuple[list[dict], dict[str, str]]:
    """Check arguments and files before anything starts; the problems, and {id: why dropped}."""
    problems.check_args(args, "limit")
    if Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder")
    rows = problems.load_problems(args.dataset, "train")[: args.limit or None]
    rows, ungradable = problems.split_gradable(rows)
    if not rows:
        why = next(iter(ungradable.items()))
        raise UserError(f"{args.dataset}: no answer can be graded: {why}")
    problems.check_context(args)
    return rows, ungradable


def summary(header: dict, prompts: list[dict]) -> str:
    """Tell a person what the reference can do."""
    n, p = header["num_value_samples"], len(prompts)
    right = Counter(sum(reward > 0 for reward in prompt["rewards"]) for prompt in prompts)
    shares = {"pass@1": header["pass_at_1"], f"pass@{n}": header["pass_at_n"]}
    shares |= {"all wrong": right[0] / p, "all right": right[n] / p}
    shares |= {"truncated": header["truncated"] / p / n}
    lines = [f"{p} prompts, {n} samples each, {header['seconds']:.0f} s, "
             f"{header['tokens_per_second']:.0f} tokens/s, mean V* {header['mean_v_star']:.3f}",
             "  ".join(f"{name} {share:.1%}" for name, share in shares.items()),
             f"grading {header['grading']}; prompts by samples that are right:"]  # fmt: skip
    top = max(right.values())
    return "\n".join(
        lines + [f"{k:>4} {right[k]:>6} {'#' * (50 * right[k] // top)}" for k in range(n + 1)]
    )


def main() -> None:
    """Sample, grade, save."""
    args = parse_args()
    rows, ungradable = check(args)
    problems.launch()
    start = time.perf_counter()
    import torch
    import torch.distributed as dist
    import vllm

    from losses import optimal_value

    rank, out, n = dist.get_rank(), Path(args.out), args.num_value_samples
    identity = problems.identify(args) | {"dataset_sha256": problems.content_sha256({"rows": rows})}
    if out.exists():
        header, prompts = problems.read_values(out)
        problems.refuse_difference(f"{out} is finished, and", header, identity)
        return print(summary(header, prompts)) if rank == 0 else None
    for key, reason in ungradable.items() if rank == 0 else ():
        print(f"dropped {key}: its answer is {reason}")
    llm = problems.start_engine(args, args.max_prompt_tokens + args.max_tokens, seed=args.seed)
    problems.write_prompts(rows, llm.get_tokenizer(), args.chat_template)
    short = [row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_tokens]
    if not short:
        raise UserError(f"all prompts are over --max-prompt-tokens {args.max_prompt_tokens}")
    wanted = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    drawn = problems.sample_all(llm, short, n, out, identity, args, **wanted)
    if rank == 0:
        prompts = []
        for row in short:
            samples = [drawn[row["id"], i] for i in range(n)]
            prompts.append({name: row[name] for name in ("id", "question", "prompt", "answer")})
            prompts[-1]["rewards"] = [sample["reward"] for sample in samples]
            prompts[-1]["lengths"] = [sample["tokens"] for sample in samples]
            prompts[-1]["truncated"] = sum(not sample["finished"] for sample in samples)
        rewards = torch.tensor([prompt["rewards"] for prompt in prompts], dtype=torch.float64)
        v_star = optimal_value(rewards, args.beta1)
        prompts = [p | {"v_star": v} for p, v in zip(prompts, v_star.tolist(), strict=True)]
        tokens, seconds = sum(sum(p["lengths"]) for p in prompts), time.perf_counter() - start
        header = vars(args) | identity | {"seconds": seconds, "tokens_per_second": tokens / seconds}
        names = ("torch", "transformers", "math-verify")
        header["versions"] = {name: version(name) for name in names} | {"vllm": vllm.__version__}
        header |= {"dropped_long": len(rows) - len(short), "dropped_ungradable": len(ungradable)}
        header["truncated"] = sum(prompt["truncated"] for prompt in prompts)
        header |= {"mean_v_star": v_star.mean().item(), "grading": problems.grading_counts()}
        header["pass_at_1"] = (rewards > 0).double().mean().item()
        header["pass_at_n"] = (rewards > 0).any(dim=1).double().mean().item()
        header["sha256"] = problems.content_sha256({"header": header, "prompts": prompts})
        problems.write_whole(out, json.dumps({"header": header, "prompts": prompts}))
        print(summary(header, prompts))
    dist.barrier()
    llm.llm_engine.engine_core.shutdown()  # destroys the process group as well


if __name__ == "__main__":
    problems.run(main)
