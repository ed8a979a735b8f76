"""The values file, which stage 1 writes and stage 2 reads: its fields and their values are checked.

It is ordinary JSON, {"header": {...}, "prompts": [...]}, which a person may write or edit by hand.
A header needs "model", "beta1", "temperature", "max_prompt_tokens" and "max_tokens"; a prompt needs
"id", "prompt", "answer" and "rewards". The V* beside the rewards is for people: stage 2 computes it
again.
"""

import dataclasses
import math
from typing import Any

from apo import files, problems
from apo.command_line import LOWEST_TEMPERATURE
from apo.files import UserError
from apo.problems import Prompt, PromptStyle

# The fields of a prompt that training reads; the others are for people.
TRAINED_ON = ("id", "prompt", "question", "answer", "rewards", "row")
# The types of those fields of a header that a file written by hand may leave out.
KINDS = {
    "task": str,
    "dataset": str,
    "prompt_template": str,
    "chat_template": bool,
    "system_prompt": str | None,
    "chat_template_kwargs": dict | None,
}


@dataclasses.dataclass
class Values:
    """A values file, checked."""

    header: dict  # what was left out is filled in
    entries: list[dict]  # one for each prompt
    style: PromptStyle
    digest: str  # of the content, so that a run is not resumed with other values


def load_values(path: str) -> Values:
    """Read and check a values file. UserError names the field or the prompt that is wrong."""
    document = files.read_json(path)
    header = check_header(document, path)
    entries = check_entries(document, path)
    check_answers(entries, header["task"], path)
    style = PromptStyle.from_settings(header)
    # What training reads of the prompts, and the two settings of sampling that decide V*. A run's
    # config.json has all settings that matter by name as well.
    used = [{name: entry.get(name) for name in TRAINED_ON} for entry in entries]
    digest = files.content_digest([used, header["temperature"], header["max_tokens"]])
    return Values(header, entries, style, digest)


def check_header(document: dict, name: str) -> dict:
    """Check a values file's header, and fill in what a file written by hand may leave out."""
    given = document.get("header")
    if not isinstance(given, dict):
        raise UserError(f'{name} has no "header": is it a values file of stage 1?')
    header = {"task": "math", "dataset": name}
    header.update(given)
    # What stage 2 computes with, and what no default can replace.
    for field in ("beta1", "temperature", "max_prompt_tokens", "max_tokens"):
        value = header.get(field)
        highest = float("inf") if field == "beta1" else 1e9
        if not is_number(value) or not 0 < value <= highest:
            wanted = "a number above 0" if field == "beta1" else "a number above 0, up to 1e9"
            raise UserError(f'{name}: "{field}" in its header is {value!r}, not {wanted}')
    if header["temperature"] < LOWEST_TEMPERATURE:
        raise UserError(
            f'{name}: "temperature" in its header is {header["temperature"]}, less than '
            f"{LOWEST_TEMPERATURE}"
        )
    check_settings(header, f"{name}: its header")
    for field in ("max_prompt_tokens", "max_tokens"):
        # 256.0 is a whole number too.
        if header[field] != int(header[field]):
            raise UserError(
                f'{name}: "{field}" in its header is {header[field]}, not a whole number'
            )
        header[field] = int(header[field])
    check_task(header, name)
    check_reference(header, name)
    template = problems.DATASETS[header["task"]].template
    style = dataclasses.replace(problems.PLAIN, template=template)
    return style.settings() | header


def is_number(value: Any) -> bool:
    """Say whether a value from a JSON file is a number; infinity is one, 10^400 and nan are not."""
    if type(value) not in (int, float):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


def check_settings(settings: dict, where: str) -> None:
    """Raise UserError for a field of KINDS that is there and is of another kind."""
    for field, kind in KINDS.items():
        if field in settings and not isinstance(settings[field], kind):
            raise UserError(f'{where} cannot have {settings[field]!r} as its "{field}"')
    if "{question}" not in settings.get("prompt_template", "{question}"):
        raise UserError(f'{where} has a "prompt_template" without {{question}}')


def check_task(header: dict, name: str) -> None:
    """Check that the task and its reward are the ones of stage 1."""
    task = header["task"]
    if task not in problems.DATASETS:
        raise UserError(
            f"{name} is for the task {task!r}, which apo/problems.py does not list: if a module of "
            "yours adds it, that module must start the stage"
        )
    reward = problems.reward_name(task)
    header.setdefault("reward", reward)
    files.refuse_difference(name, header, {"reward": reward})


def check_reference(header: dict, name: str) -> None:
    """Check that the model at the header's path is the one that sampled.

    A file written by hand has no fingerprint, and gets the one of the model that is there.
    """
    model = header.get("model")
    if not isinstance(model, str):
        raise UserError(f'{name}: its header does not say which "model" is the reference')
    folder = files.model_folder(model)
    fingerprint = files.model_fingerprint(folder)
    header.setdefault("model_fingerprint", fingerprint)
    what = f"{model} has changed: {name}"
    files.refuse_difference(what, header, {"model_fingerprint": fingerprint})
    if header["max_prompt_tokens"] + header["max_tokens"] > files.context_length(folder):
        raise UserError(
            f"{name}: max_prompt_tokens {header['max_prompt_tokens']} + max_tokens "
            f"{header['max_tokens']} is more than {model} can read"
        )


def check_entries(document: dict, name: str) -> list[dict]:
    """Check the prompts of a values file, and name the row in which something is wrong.

    Prompts may have different numbers of rewards.
    """
    entries = document.get("prompts")
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{name} has no "prompts": is it a values file of stage 1?')
    seen = set()  # two prompts with one id would share their seeds
    for number, entry in enumerate(entries, start=1):
        where = f"{name}, prompt {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is not an object: {entry!r:.60}")
        for field in ("id", "prompt"):
            if not isinstance(entry.get(field), str):
                raise UserError(f'{where} has no text "{field}"')
        if "answer" not in entry:
            raise UserError(f'{where} has no "answer"')
        if not isinstance(entry.get("question", ""), str):
            raise UserError(f'{where}: its "question" is not a text')
        if not isinstance(entry.get("row", {}), dict):
            raise UserError(f'{where}: its "row" is not an object')
        if entry["id"] in seen:
            raise UserError(f"{where}: an earlier prompt has the same id, {entry['id']!r}")
        seen.add(entry["id"])
        # One reward is enough for a V*.
        rewards = entry.get("rewards")
        if not isinstance(rewards, list) or not rewards:
            raise UserError(f'{where} ({entry["id"]}) has no list "rewards"')
        for reward in rewards:
            if not is_number(reward) or abs(reward) > problems.LARGEST_REWARD:
                raise UserError(
                    f"{where} ({entry['id']}): the reward {reward!r} is not a number, or beyond "
                    f"{problems.LARGEST_REWARD:g}"
                )
    return entries


def check_answers(entries: list[dict], task: str, name: str) -> None:
    """Raise UserError for an answer of mathematics that cannot be graded: it could earn 0 only."""
    rows = [entry | {"_task": task} for entry in entries]
    _, reasons = problems.keep_gradable(name, rows)
    if reasons:
        raise UserError(f"{name}: {reasons[0]}")


def make_prompts(entries: list[dict], values: Values, tokenizer: Any) -> list[Prompt]:
    """Make the prompts of some entries of a values file, as stage 1 wrote them.

    Raises UserError for one that is longer than the header allows.
    """
    longest = values.header["max_prompt_tokens"]
    prompts = []
    for entry in entries:
        row = dict(entry.get("row", {}))
        row["id"] = entry["id"]
        row["question"] = entry.get("question", "")
        row["answer"] = entry["answer"]
        row["_task"] = values.header["task"]
        prompt = problems.make_prompt(row, values.style, tokenizer, entry["prompt"])
        if len(prompt.ids) > longest:
            raise UserError(
                f"the prompt {entry['id']!r} of the values file has {len(prompt.ids)} tokens, more "
                f"than its max_prompt_tokens {longest}"
            )
        prompts.append(prompt)
    return prompts
