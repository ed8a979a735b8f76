"""Stage 1: sample N responses per prompt from the reference, grade them, save V* as JSON.

V*(x) = beta1 ln((1/N) sum_i exp(r(x, y_i) / beta1)) is all that stage 2 needs from the reference's
samples; the raw rewards are saved beside it, so that another beta1 or a smaller N needs no GPU.

    python offline_value.py --model Qwen/Qwen2.5-1.5B --dataset math --out values/math.json

Finished responses are appended to OUT.partial-RANK at once. Killed and started again with the same
arguments, it samples only what is missing.
"""

import argparse
import glob
import json
import os
import time
from collections import Counter, deque
from datetime import timedelta
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
    add("--temperature", type=float, default=1.0, help="of sampling; part of what pi_ref is")
    add("--max-prompt-tokens", type=int, default=256, help="longer prompts are dropped")
    add("--max-tokens", type=int, default=1024, help="longest response, in tokens")
    add("--limit", type=int, default=0, help="only the first so many problems; 0 is all")
    add("--seed", type=int, default=0, help="of sampling")
    add("--out", default="values/math.json", help="the values file")
    add("--chat-template", action="store_true", help="ask in the tokenizer's chat template")
    add("--gpu-memory-utilization", type=float, default=0.9, help="the engine's share of a GPU")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs per engine")
    return parser.parse_args()


def check(args: argparse.Namespace) -> tuple[list[dict], dict[str, str]]:
    """Check arguments and files before anything starts; the problems, and why others were dropped."""
    for name in ("num_value_samples", "beta1", "temperature", "max_prompt_tokens", "max_tokens"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be > 0, not {getattr(args, name)}")
    if args.limit < 0:
        raise UserError(f"--limit must be >= 0, not {args.limit}")
    folder = problems.model_folder(args.model)
    context = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    if context and args.max_prompt_tokens + args.max_tokens > context:
        raise UserError(f"--max-prompt-tokens + --max-tokens exceed the {context} of {args.model}")
    rows = problems.load_problems(args.dataset, "train")
    gradable, reasons = problems.split_gradable(rows[: args.limit or None])
    if not gradable:
        raise UserError(
            f"no answer in {args.dataset} can be graded, e.g. {next(iter(reasons.items()))}"
        )
    return gradable, reasons


def summary(values: dict) -> str:
    """Tell a person what the reference can do."""
    header, prompts = values["header"], values["prompts"]
    n, solved = header["num_value_samples"], Counter(sum(p["rewards"]) for p in values["prompts"])
    share = lambda count, of=len(prompts): f"{count / of:.1%}"  # noqa: E731
    lines = [
        f"{len(prompts)} prompts x {n} samples in {header['seconds']:.0f} s, "
        f"{header['tokens_per_second']:.0f} tokens/s, {share(header['truncated'], len(prompts) * n)} truncated",
        f"pass@1 {header['pass_at_1']:.1%}   pass@{n} {header['pass_at_n']:.1%}   mean V* "
        f"{sum(p['v_star'] for p in prompts) / len(prompts):.3f}   "
        f"all wrong {share(solved[0])}   all right {share(solved[n])}",
        f"prompts by how many of their {n} samples are right:",
    ]
    for k in range(n + 1):
        lines.append(f"{k:>4} {solved[k]:>7} {'#' * round(50 * solved[k] / max(solved.values()))}")
    return "\n".join(lines)


def main() -> None:
    """Sample, grade, save."""
    args = parse_args()
    rows, ungradable = check(args)
    problems.launch()
    start = time.perf_counter()
    import torch
    import torch.distributed as dist
    from tqdm import tqdm
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from losses import optimal_value

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # ranks end at different times
    rank, world, tp = dist.get_rank(), dist.get_world_size(), args.tensor_parallel_size
    out, n = Path(args.out), args.num_value_samples

    # What makes the file this one: a finished or partial one from other arguments is refused.
    free = ("out", "gpu_memory_utilization", "tensor_parallel_size")
    identity = {k: v for k, v in vars(args).items() if k not in free}
    identity["prompt_template"] = problems.PROMPT_TEMPLATE
    identity["dataset_sha256"] = problems.content_sha256({"rows": rows})
    box = [problems.model_sha256(args.model) if rank == 0 else ""]
    dist.broadcast_object_list(box)
    identity["model_sha256"] = box[0]
    if out.exists():
        values = json.loads(out.read_text())
        problems.refuse_difference(f"{out}, which is finished,", values["header"], identity)
        return print(f"{out} is finished already.\n{summary(values)}") if rank == 0 else None
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["id"], r["sample"]) for r in problems.read_partial(out, identity)}
    dist.barrier()  # all ranks have read before one writes
    partial = problems.lock(Path(f"{out}.partial-{rank}"))
    problems.append_record(partial, {"identity": identity})

    llm = LLM(
        model=args.model,
        dtype="bfloat16" if on_gpu else "float32",
        hf_overrides={"head_dtype": "float32"},  # as in stage 2: V* belongs to the same pi_ref
        max_model_len=args.max_prompt_tokens + args.max_tokens,
        tensor_parallel_size=tp,
        distributed_executor_backend="external_launcher",  # an engine per rank of torchrun's
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=not on_gpu,
        enable_chunked_prefill=on_gpu,  # the CPU engine cannot seed a request whose prompt it cuts
        seed=args.seed,
    )
    tokenizer, prompts = llm.get_tokenizer(), []
    for row in rows:
        prompt = problems.format_prompt(row["question"], tokenizer if args.chat_template else None)
        ids = problems.prompt_token_ids(tokenizer, prompt, args.chat_template)
        if len(ids) <= args.max_prompt_tokens:
            prompts.append(row | {"prompt": prompt, "prompt_ids": ids})
    if not prompts:
        raise UserError(f"every prompt is over --max-prompt-tokens {args.max_prompt_tokens}")

    # top_p = 1 and no top_k: the expectation in V* is under pi_ref itself.
    jobs = [(p, i) for p in prompts for i in range(n) if (p["id"], i) not in done]
    jobs = jobs[rank // tp :: world // tp]
    wanted = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    for key, (prompt, i) in enumerate(jobs):
        seed = problems.response_seed(args.seed, 0, prompt["id"], i)
        params = SamplingParams(**wanted, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY)
        llm.llm_engine.add_request(str(key), {"prompt_token_ids": prompt["prompt_ids"]}, params)
    waiting, tokens = deque(), 0
    with tqdm(total=len(jobs), unit=" responses", disable=rank > 0) as bar:
        while waiting or llm.llm_engine.has_unfinished_requests():
            busy = llm.llm_engine.has_unfinished_requests()
            for output in llm.llm_engine.step() if busy else ():
                (prompt, i), completion = jobs[int(output.request_id)], output.outputs[0]
                finished = completion.finish_reason == "stop"  # with its EOS; else the reward is 0
                grade = problems.submit(completion.text, prompt["answer"]) if finished else None
                length = len(completion.token_ids)
                record = {"id": prompt["id"], "sample": i, "tokens": length, "finished": finished}
                waiting.append((record, grade))
                tokens += length
            while waiting and (not busy or not waiting[0][1] or waiting[0][1].done()):
                record, grade = waiting.popleft()
                reward = grade.result() if grade else 0.0
                if rank % tp == 0:
                    problems.append_record(partial, record | {"reward": reward})
                bar.update()
    dist.barrier()
    seconds = time.perf_counter() - start
    if rank == 0:
        samples = {p["id"]: {} for p in prompts}
        for r in problems.read_partial(out, identity):
            samples[r["id"]][r["sample"]] = r
        for prompt in prompts:
            drawn = [samples[prompt["id"]][i] for i in range(n)]
            prompt |= {
                "rewards": [r["reward"] for r in drawn],
                "lengths": [r["tokens"] for r in drawn],
            }
            prompt["truncated"] = sum(not r["finished"] for r in drawn)
            del prompt["prompt_ids"]
        rewards = torch.tensor([p["rewards"] for p in prompts], dtype=torch.float64)
        for prompt, v_star in zip(
            prompts, optimal_value(rewards, args.beta1).tolist(), strict=True
        ):
            prompt["v_star"] = v_star
        header = (
            vars(args)
            | identity
            | {
                "versions": {m: version(m) for m in ("torch", "transformers", "math-verify")},
                "dropped_long": len(rows) - len(prompts),
                "dropped_ungradable": len(ungradable),
                "grading": problems.grading_counts(),
                "truncated": sum(p["truncated"] for p in prompts),
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "pass_at_1": rewards.gt(0).double().mean().item(),
                "pass_at_n": rewards.gt(0).any(dim=1).double().mean().item(),
            }
        )
        values = {"header": header, "prompts": prompts}
        header["sha256"] = problems.content_sha256(values)
        problems.write_whole(out, json.dumps(values))
        for path in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
            path.unlink()
        print(summary(values))
    dist.barrier()
    llm.llm_engine.engine_core.shutdown()  # destroys the process group as well


if __name__ == "__main__":
    problems.run(main)
