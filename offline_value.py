"""Stage 1: sample N responses per prompt from the reference, grade them, save V* as JSON.

    python offline_value.py --model Qwen/Qwen2.5-1.5B --dataset math --out values/math.json

Raw rewards are saved beside V*(x) = beta1 ln((1/N) sum_i exp(r(x, y_i) / beta1)), so that another
beta1 or a smaller N needs no GPU. Graded responses go to OUT.partial-RANK as they finish: killed
and started again with the same arguments, stage 1 samples only what is missing.
"""

import argparse
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import problems


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


def summary(header: dict, prompts: list[dict], **_: str) -> str:
    """Tell a person what the reference can do."""
    n, p, share = header["num_value_samples"], len(prompts), "{} {:.1%}".format
    right = Counter(sum(reward > 0 for reward in prompt["rewards"]) for prompt in prompts)
    shares = [share("pass@1", header["pass_at_1"]), share(f"pass@{n}", header["pass_at_n"]),
              share("all wrong", right[0] / p), share("all right", right[n] / p),
              share("truncated", header["truncated"] / p / n)]  # fmt: skip
    lines = [f"{p} prompts, {n} samples each, {header['seconds']:.0f} s, "
             f"{header['tokens_per_second']:.0f} tokens/s, mean V* {header['mean_v_star']:.3f}",
             "  ".join(shares), f"grading {header['grading']}; right of {n}, prompts:"]  # fmt: skip
    bars = {k: "#" * (50 * right[k] // max(right.values())) for k in range(n + 1)}
    return "\n".join(lines + [f"{k:>4} {right[k]:>6} {bar}" for k, bar in bars.items()])


def main() -> None:
    """Sample, grade, save."""
    args = parse_args()
    problems.check_args(args, "limit")
    if Path(args.out).is_dir():
        raise problems.UserError(f"--out {args.out} is a folder")
    every = problems.load_problems(args.dataset, "train")[: args.limit or None]
    rows = problems.split_gradable(args.dataset, every, "is dropped")
    problems.check_context(args)
    problems.launch(args.tensor_parallel_size)
    start = time.perf_counter()
    import torch
    import torch.distributed as dist
    import vllm

    from losses import optimal_value

    rank, out, n = dist.get_rank(), Path(args.out), args.num_value_samples
    identity = problems.identify(args) | {"dataset_sha256": problems.content_sha256({"rows": rows})}
    if out.exists():
        values = problems.read_json(out, "header", "prompts", "sha256")
        problems.refuse_difference(f"{out} is finished, and", values["header"], identity)
        return print(summary(**values)) if rank == 0 else None
    llm = problems.start_engine(args, args.max_prompt_tokens + args.max_tokens, seed=args.seed)
    problems.write_prompts(rows, llm.get_tokenizer(), args.chat_template)
    short = [row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_tokens]
    if not short:
        raise problems.UserError(f"no prompt fits --max-prompt-tokens {args.max_prompt_tokens}")
    drawn = problems.sample_all(llm, short, n, out, identity, args, temperature=args.temperature)
    if rank == 0:
        rewards = torch.tensor([s["reward"] for s in drawn], dtype=torch.float64).view(-1, n)
        v_star, seconds = optimal_value(rewards, args.beta1), time.perf_counter() - start
        prompts = []
        for i, row in enumerate(short):
            samples = drawn[i * n : (i + 1) * n]
            prompt = {name: row[name] for name in ("id", "question", "prompt", "answer")}
            prompt |= {"rewards": [s["reward"] for s in samples]}
            prompt |= {"lengths": [s["tokens"] for s in samples]}
            prompt |= {"truncated": sum(not s["finished"] for s in samples)}
            prompts.append(prompt | {"v_star": v_star[i].item()})
        tokens = sum(s["tokens"] for s in drawn)
        header = vars(args) | identity | {"seconds": seconds, "tokens_per_second": tokens / seconds}
        versions = {name: version(name) for name in ("torch", "transformers", "math-verify")}
        header |= {"versions": versions | {"vllm": vllm.__version__}}
        header |= {"dropped_long": len(rows) - len(short)}
        header |= {"dropped_ungradable": len(every) - len(rows)}
        header |= {"truncated": sum(prompt["truncated"] for prompt in prompts)}
        header |= {"mean_v_star": v_star.mean().item(), "grading": problems.grading_counts()}
        header |= {"pass_at_1": (rewards > 0).double().mean().item()}
        header |= {"pass_at_n": (rewards > 0).any(dim=1).double().mean().item()}
        problems.write_json(out, {"header": header, "prompts": prompts})
        for path in problems.partials(out):
            path.unlink()
        print(summary(header, prompts))
    dist.barrier()
    llm.llm_engine.engine_core.shutdown()  # destroys the process group as well


if __name__ == "__main__":
    problems.run(main)
