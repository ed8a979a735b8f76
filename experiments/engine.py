"""Where the engine's time goes: bookkeeping, the model, the sampler; on the CPU or a GPU.

    python -m experiments.engine --model toy/reference --dataset toy/train.jsonl

Two loads, sampled by problems.sample as the stages do: N responses to each of the first prompts, as
in stage 1, and one response to each of a batch, with log-probs, as in a step of stage 2. The
engine's functions are timed where they are, each without what it calls of the others:

scheduling   which requests run, and their KV blocks
batch        inputs put together for the model
model        its forward
sampling     logits to tokens, and their log-probs
results      tokens back to their requests, and who has ended; texts and grades are not the engine's
rest         everything else in between, grading handed over included

What is Python per request and token (scheduling, batch, results, rest) does not shrink with the
model: it is why a tiny model on a CPU is not sampled faster than by a plain padded loop.
Writes OUT.json and OUT.txt, by default experiments/results/engine.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import problems
from experiments.speed import RESULTS, Stopwatch, describe

PARTS = ("scheduling", "batch", "model", "sampling", "results", "rest")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--model", required=True, help="a folder or a hub id")
    add("--dataset", required=True, help="problems whose prompts are asked")
    add("--prompts", type=int, default=512, help="prompts of the first load")
    add("--num-value-samples", type=int, default=8, help="N, responses per prompt in it")
    add("--batch-size", type=int, default=128, help="prompts of the second load")
    add("--max-prompt-tokens", type=int, default=256, help="longest prompt, in tokens")
    add("--max-tokens", type=int, default=128, help="longest response, in tokens")
    add("--rounds", type=int, default=3, help="rounds of each load, after one that is not counted")
    add("--seed", type=int, default=0, help="of sampling")
    add("--gpu-memory-utilization", type=float, default=0.6, help="the engine's share of a GPU")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs per engine")
    add("--out", type=Path, default=RESULTS / "engine", help="results, without suffix")
    return parser.parse_args()


def watch_engine(llm: Any, watch: Stopwatch) -> None:
    """Have the engine's functions count their time as parts."""
    core, processor = llm.llm_engine.engine_core.engine_core, llm.llm_engine.output_processor
    runner = core.model_executor.driver_worker.model_runner
    places = [(core.scheduler, "schedule", "scheduling"), (processor, "process_outputs", "results"),
              (core.scheduler, "update_from_output", "results"),
              (core.model_executor, "execute_model", "batch"), (runner, "_model_forward", "model"),
              (core.model_executor, "sample_tokens", "results"),
              (runner, "_sample", "sampling")]  # fmt: skip
    for owner, name, part in places:
        setattr(owner, name, watch.inside(part, getattr(owner, name)))


def measure(llm: Any, jobs: list, watch: Stopwatch, args: argparse.Namespace) -> dict:
    """Sample the jobs some rounds; a round's seconds, by part and in all, tokens, engine steps."""
    steps, step = [], llm.llm_engine.step
    llm.llm_engine.step = lambda: steps.append(1) or step()
    for number in range(args.rounds + 1):
        if number == 1:
            watch.seconds.clear()
            steps.clear()
        watch.switch("rest")
        drawn = list(problems.sample(llm, jobs, args))
        watch.switch()
    del llm.llm_engine.step
    told = {part: watch.seconds[part] / args.rounds for part in PARTS}
    told |= {"total": sum(told.values()), "steps": len(steps) / args.rounds}
    return told | {"tokens": sum(len(response["ids"]) for _, response in drawn)}


def table(name: str, told: dict[str, float]) -> list[str]:
    """Write a load's parts as text."""
    lines = [f"\n{name}: {told['tokens']} tokens in {told['steps']:.0f} engine steps",
             f"{'part':12}{'seconds':>9}{'share':>8}{'us a token':>12}"]  # fmt: skip
    for part in (*PARTS, "total"):
        share, each = told[part] / told["total"], told[part] / told["tokens"] * 1e6
        lines.append(f"{part:12}{told[part]:9.3f}{share:8.1%}{each:12.1f}")
    return lines


def main() -> None:
    """Measure both loads and write what they say."""
    args = parse_args()
    problems.check_args(args)
    rows = problems.load_problems(args.dataset, "train")
    rows = problems.split_gradable(args.dataset, rows, "is dropped")
    problems.check_context(args)
    problems.launch()
    options = {"logprobs_mode": "processed_logprobs", "enable_prefix_caching": False}
    llm = problems.start_engine(args, args.max_prompt_tokens, **options)
    args.chat_template = False
    problems.write_prompts(rows, llm, args)
    rows = [row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_tokens]
    watch_engine(llm, watch := Stopwatch())
    command = f"python -m experiments.engine {shlex.join(sys.argv[1:])}"
    lines = [command, describe()]
    results = dict(zip(("command", "device"), lines, strict=True))
    first, batch, n = rows[: args.prompts], rows[: args.batch_size], args.num_value_samples
    loads = {
        f"stage 1, {n * len(first)} responses": ([(row, i) for row in first for i in range(n)], {}),
        f"a step, {len(batch)} responses, log-probs of each token":
            ([(row, 0) for row in batch], {"logprobs": 0}),
    }  # fmt: skip
    for name, (asked, own) in loads.items():
        own["temperature"] = 1.0
        jobs = [(row, own | {"seed": problems.response_seed(args.seed, 0, row["id"], i)})
                for row, i in asked]  # fmt: skip
        results[name] = measure(llm, jobs, watch, args)
        lines += table(name, results[name])
    print(*lines, sep="\n")
    problems.write_whole(args.out.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    problems.write_whole(args.out.with_suffix(".txt"), "\n".join(lines) + "\n")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    problems.run(main)
