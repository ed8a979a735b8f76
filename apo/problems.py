r"""The tasks: where rows come from, how a row becomes a prompt, and which function scores it.

A task is one entry of `DATASETS`. To train on another one, write at the end of this file an entry
and, unless it is mathematics, one reward function: README.md, "Fork it", has an example. Nothing
else changes in any stage. An entry that another module adds is known only to programs that import
the module: experiments/countdown.py therefore starts the stages itself.

In its row, the reward sees all columns of the source. Some are written here over the source's own:
"question" and "answer" are what the entry's functions returned, "_task" is the name of the entry,
and "id" is a number after the name, unless a local file has an "id".
"""

import copy
import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import Future
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import UUID

from apo import files, math_reward
from apo.files import UserError

BOXED_TEMPLATE = "{question}\nLet's think step by step, and put the final answer in \\boxed{}.\n"


def score_mathematics(response: str, row: dict) -> float:
    """Score a response by the answer in its last box: 1.0 if it equals the row's, else 0.0.

    Another reward may call this function. Changing it here would change no run: `submit_reward`
    has the workers of math_reward do the same. Write a function of your own for the entry.
    """
    return math_reward.reward(response, row["answer"])


# ---------------------------------------------------------------------------------------------
# How an answer is read from the columns of the mathematical sets


def boxed_solution(row: dict) -> str | None:
    """MATH has worked solutions; the answer is in the last box."""
    return math_reward.last_box(str(row["solution"]))


def after_hashes(row: dict) -> str:
    """GSM8K has worked solutions; the answer follows `####`."""
    return str(row["answer"]).split("####")[-1].strip()


def only_answer(row: dict) -> Any:
    """OlympiadBench has a list with one answer."""
    answers = row["final_answer"]
    return answers[0] if answers else None


def problem_column(row: dict) -> str:
    """Read the question of sets that call it "problem"."""
    return row["problem"]


def question_column(row: dict) -> str:
    """Read the question of sets that call it "question"."""
    return row["question"]


def answer_column(row: dict) -> Any:
    """Read the answer of sets that call it "answer"."""
    return row["answer"]


# ---------------------------------------------------------------------------------------------
# The tasks


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One task: its rows, its prompt and its reward."""

    # A hub id, or the path of a local file with {split} in its name, as seen from the folder in
    # which a stage is started.
    source: str
    # From our name of a split to the source's own. Stage 1 takes "train", stages 2 and 3 evaluate
    # on "test". Many sources call the only split of a benchmark "train": {"test": "train"}.
    splits: dict[str, str]
    # From a row of the source to the text of its question, and to its answer in the form that the
    # reward wants.
    question: Callable[[dict], str]
    answer: Callable[[dict], Any]
    # Which configuration of a hub set, if it has several.
    config: str | None = None
    # {question} is replaced by the row's question.
    template: str = BOXED_TEMPLATE
    # From the text of a response, without its end token, and its row to a number. In
    # training, a response that does not end within --max-tokens earns 0 and is not seen here. It
    # must be a function of a module, not a lambda: files name it, to say what was rewarded.
    reward: Callable[[str, dict], float] = score_mathematics
    # On which entry of DATASETS stage 2 evaluates by default when it trains on this one; "none":
    # it does not evaluate.
    test_set: str = "none"

    def __post_init__(self) -> None:
        # Python calls any lambda "<lambda>", and a function in a function "outer.<locals>.inner".
        if "<" in getattr(self.reward, "__qualname__", "<no function>"):
            raise TypeError(f"the reward of a task must be a function of a module: {self.reward}")
        if "{question}" not in self.template:
            raise ValueError(f"the template of a task needs {{question}}: {self.template!r}")


DATASETS = {
    "math": Dataset(
        source="DigitalLearningGmbH/MATH-lighteval",
        splits={"train": "train"},
        question=problem_column,
        answer=boxed_solution,
        test_set="math500",
    ),
    "gsm8k": Dataset(
        source="openai/gsm8k",
        config="main",
        splits={"train": "train", "test": "test"},
        question=question_column,
        answer=after_hashes,
        test_set="gsm8k",
    ),
    "math500": Dataset(
        source="HuggingFaceH4/MATH-500",
        splits={"test": "test"},
        question=problem_column,
        answer=answer_column,
    ),
    "minerva": Dataset(
        source="math-ai/minervamath",
        splits={"test": "test"},
        question=question_column,
        answer=answer_column,
    ),
    "amc23": Dataset(
        source="math-ai/amc23",
        splits={"test": "test"},
        question=question_column,
        answer=answer_column,
    ),
    "aime24": Dataset(
        source="HuggingFaceH4/aime_2024",
        splits={"test": "train"},
        question=problem_column,
        answer=answer_column,
    ),
    "aime25": Dataset(
        source="math-ai/aime25",
        splits={"test": "test"},
        question=problem_column,
        answer=answer_column,
    ),
    "hmmt_feb_2024": Dataset(
        source="MathArena/hmmt_feb_2024",
        splits={"test": "train"},
        question=problem_column,
        answer=answer_column,
    ),
    "hmmt_feb_2025": Dataset(
        source="MathArena/hmmt_feb_2025",
        splits={"test": "train"},
        question=problem_column,
        answer=answer_column,
    ),
    "olympiadbench": Dataset(
        source="Hothan/OlympiadBench",
        config="OE_TO_maths_en_COMP",
        splits={"test": "train"},
        question=question_column,
        answer=only_answer,
    ),
}

FILE_TYPES = (".jsonl", ".json", ".parquet")
LARGEST_REWARD = 1e15  # the square of a much larger one would overflow in float32
# Types in tables or on the hub that JSON lacks, and that a text can give in full.
WRITTEN_AS_TEXT = (Decimal, Fraction, date, time, timedelta, UUID, bytes)


def find_task(name: str) -> str:
    """Return the name of the task that scores the rows of `name`; `find_dataset` checks it.

    A local file given by its path is mathematics. Files of another task need an entry with
    {split} in its source.
    """
    return "math" if is_file(name) else name


def is_file(name: str) -> bool:
    """Say whether `name` is meant as a local file."""
    return Path(name).suffix.lower() in FILE_TYPES


def describe(serves: str) -> str:
    """List what can be asked for by --dataset or --benchmarks, for --help."""
    names = [name for name, dataset in DATASETS.items() if serves in dataset.splits]
    return ", ".join(names) + ", or a .jsonl, .json or .parquet file with question and answer"


# ---------------------------------------------------------------------------------------------
# Rows


def load_problems(name: str, serves: str | None = None) -> list[dict]:
    """Load the rows of a registered dataset, or of a .jsonl, .json or .parquet file.

    Each row keeps its columns and gets "id", "question", "answer" and "_task", the entry of
    DATASETS that scores it. A file has columns "question" and "answer", and may have "id".

    `serves` is "train" or "test"; None takes the first that the dataset has. Raises UserError if
    the rows cannot be loaded. An answer that cannot be graded is kept: `keep_gradable` finds it.
    """
    if is_file(name):
        sources = read_rows(Path(name))
        check_columns(sources, name)
        task = "math"
        question = question_column
        answer = answer_column
        default_id = Path(name).stem
    else:
        dataset = find_dataset(name, serves)
        sources = read_split(dataset, name, serves)
        task = name
        question = dataset.question
        answer = dataset.answer
        default_id = name
    rows = []
    for number, source in enumerate(sources, start=1):
        rows.append(make_row(source, task, question, answer, f"{name}, row {number}"))
    if not rows:
        raise UserError(f"{name} has no rows")

    # A file's own ids are kept. Hub sets are numbered, so that the ids of all sets look alike.
    local = is_file(name) or "{split}" in dataset.source
    seen = set()
    for i, row in enumerate(rows):
        if not local or row.get("id") is None:
            row["id"] = f"{default_id}/{i}"
        row["id"] = clean_text(str(row["id"]))
        if row["id"] in seen:
            raise UserError(f"{name}, row {i + 1}: an earlier row has the same id, {row['id']!r}")
        seen.add(row["id"])
        if not row["question"].strip():
            raise UserError(f"{name}, row {i + 1}: its question is empty")
    return rows


def find_dataset(name: str, serves: str | None) -> Dataset:
    """Look up a registered dataset; UserError lists the names that would do."""
    dataset = DATASETS.get(name)
    if dataset is not None and (serves is None or serves in dataset.splits):
        return dataset
    known = [n for n, d in DATASETS.items() if serves is None or serves in d.splits]
    purpose = f" to {serves} on" if serves else ""
    raise UserError(
        f"no dataset {name!r}{purpose}: give a .jsonl, .json or .parquet file, or one of "
        f"{', '.join(sorted(known))}"
    )


def read_split(dataset: Dataset, name: str, serves: str | None) -> list[dict]:
    """Read the rows of a registered dataset, from a local file or from the hub."""
    split = dataset.splits[serves or next(iter(dataset.splits))]
    if "{split}" in dataset.source:
        path = Path(dataset.source.replace("{split}", split))
        if not path.exists():
            raise UserError(f"cannot read the rows of {name}: there is no {path.absolute()}")
        return read_rows(path)
    import datasets  # here, as it takes a second

    try:
        loaded = datasets.load_dataset(dataset.source, dataset.config, split=split)
    except Exception as error:  # the hub and the library raise a dozen unrelated types
        reason = files.one_line(error)
        what = f"cannot load {name} from the hub ({dataset.source})"
        raise UserError(f"{what}: {reason}") from error
    return list(loaded)


def read_rows(path: Path) -> list[dict]:
    """Read the rows of a local file; UserError says what is wrong and where."""
    if path.suffix.lower() == ".jsonl":
        return files.read_jsonl(path)
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet  # here, as it takes a second

        try:
            return parquet.read_table(path).to_pylist()
        except Exception as error:  # pyarrow raises a dozen unrelated types
            raise UserError(f"cannot read {path}: {error}") from error
    try:
        rows = json.loads(files.read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: it is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"cannot read {path}: it is not a list of rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number} is not an object: {row!r:.60}")
    return rows


def check_columns(rows: list, name: str) -> None:
    """Raise UserError for the first row without a text "question", or with no short "answer".

    Not short is one that has its solution before it, as in OpenAI's file of GSM8K.
    """
    hint = "(a file is mathematics; give another task by its name in apo/problems.py)"
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("question"), str):
            raise UserError(f'{name}, row {number} has no text "question": {row!r:.60} {hint}')
        if "answer" not in row:
            raise UserError(f'{name}, row {number} has no "answer": {row!r:.60} {hint}')
        if "####" in str(row["answer"]):
            raise UserError(
                f"{name}, row {number}: its answer is a solution of GSM8K. Keep only what follows "
                "####, or use --dataset gsm8k"
            )


class MissingColumnError(KeyError):
    """A row lacks a column that its task reads."""


class Columns(dict):
    """A row that raises MissingColumnError for a missing column.

    So a KeyError from another dict, in the task's own functions, is not mistaken for it.
    """

    def __missing__(self, name: str) -> Any:
        """Raise the error; Python calls this for a key that is not there."""
        raise MissingColumnError(name)


def make_row(
    source: dict,
    task: str,
    question: Callable[[dict], str],
    answer: Callable[[dict], Any],
    where: str,
) -> dict:
    """Add to a source's row what all stages need; its other columns stay.

    Raises UserError if a column is missing or the question is not text. Any other error of the
    task's own functions keeps its traceback. `where` names the row in both.
    """
    row = dict(source)
    try:
        columns = Columns(source)
        row["question"] = question(columns)
        row["answer"] = answer(columns)
    except MissingColumnError as error:
        raise UserError(f"{where} has no column {error}: {source!r:.60}") from error
    except Exception as error:
        raise RuntimeError(f"{where}: its question or answer cannot be read") from error
    if not isinstance(row["question"], str):
        raise UserError(f"{where}: its question is not text: {row['question']!r:.60}")
    row["question"] = clean_text(row["question"])
    row["_task"] = task
    return as_json(row, where)


def as_json(row: dict, where: str) -> dict:
    """Return a row as it comes back from a JSON file.

    Stage 2 reads its rows from one, and the reward function must get the same row in every stage: a
    list in place of a tuple, and text in place of an exact decimal or a date. Raises UserError for
    what cannot be written, such as a set or a picture.
    """

    def write(value: Any) -> str:
        if isinstance(value, WRITTEN_AS_TEXT):
            return str(value)
        raise TypeError(f"no JSON for {type(value).__name__} {value!r:.60}")

    try:
        return json.loads(json.dumps(row, default=write))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be written to a file: {error}") from error


def clean_text(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode(errors="replace").decode()


def keep_gradable(name: str, rows: list[dict]) -> tuple[list[dict], list[str]]:
    """Split off the rows of mathematics whose answer cannot be graded.

    Returns the other rows, whose answers become text without a box around it, and for each row that
    was split off a sentence with its id and reason. Raises UserError if no row is left.
    """
    gradable = []
    reasons = []
    for row in rows:
        # Any other reward function knows itself what it can score.
        if DATASETS[row["_task"]].reward is not score_mathematics:
            gradable.append(row)
            continue
        try:
            answer = math_reward.check_answer(row["answer"])
        except ValueError as error:
            reasons.append(f"{row['id']}: its answer is {error}")
            continue
        gradable.append(row | {"answer": answer})
    if not gradable:
        raise UserError(f"{name}: no row has an answer that can be graded ({reasons[0]})")
    return gradable, reasons


# ---------------------------------------------------------------------------------------------
# Prompts


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How a question becomes a prompt. Every header has it: V* holds for these prompts only."""

    template: str = BOXED_TEMPLATE
    chat_template: bool = False
    system_prompt: str | None = None
    chat_template_kwargs: dict | None = None

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "PromptStyle":
        """Read a style from a header or a config.json; what is missing is as for base models."""
        return cls(
            template=settings.get("prompt_template", BOXED_TEMPLATE),
            chat_template=settings.get("chat_template", False),
            system_prompt=settings.get("system_prompt"),
            chat_template_kwargs=settings.get("chat_template_kwargs"),
        )

    def settings(self) -> dict[str, Any]:
        """Return the fields by the names that they have in headers and in config.json."""
        return {
            "prompt_template": self.template,
            "chat_template": self.chat_template,
            "system_prompt": self.system_prompt,
            "chat_template_kwargs": self.chat_template_kwargs,
        }


@dataclasses.dataclass
class Prompt:
    """A prompt, ready for the engine, with the row that the reward will need."""

    row: dict
    text: str
    ids: list[int]


PLAIN = PromptStyle()  # as for base models: the template alone


def prompt_style(
    template: str, chat_template: bool, system_prompt: str | None, chat_template_kwargs: str | None
) -> PromptStyle:
    """Read the prompt flags; UserError if they do not fit together."""
    kwargs = None
    if chat_template_kwargs is not None:
        try:
            kwargs = json.loads(chat_template_kwargs)
        except (ValueError, RecursionError):
            kwargs = None
        if not isinstance(kwargs, dict):
            raise UserError(
                f"--chat-template-kwargs {chat_template_kwargs!r} is not a JSON object such as "
                "'{\"enable_thinking\": false}'"
            )
    if not chat_template and (system_prompt is not None or kwargs is not None):
        raise UserError("--system-prompt and --chat-template-kwargs need --chat-template")
    return PromptStyle(template, chat_template, system_prompt, kwargs)


def style_of_task(style: PromptStyle, task: str, trained_reward: str | None) -> PromptStyle:
    """Return the style of a task's prompts, for a model that was trained with `style`.

    If the task has the reward function of the training (`trained_reward`; None for a model that was
    not trained here), its prompts use the template of training, else the task's own.
    """
    if reward_name(task) == trained_reward:
        return style
    return dataclasses.replace(style, template=DATASETS[task].template)


def format_prompt(question: str, style: PromptStyle = PLAIN, chat_tokenizer: Any = None) -> str:
    """Write the prompt for a question, in the tokenizer's chat template if the style says so."""
    # Not str.format: questions and templates are full of braces.
    prompt = style.template.replace("{question}", question)
    if not style.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    if style.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": style.system_prompt})
    try:
        return chat_tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            **(style.chat_template_kwargs or {}),
        )
    except Exception as error:  # a template is a program of the model's author: it raises anything
        raise UserError(f"--chat-template: the tokenizer's template fails ({error})") from error


def make_prompt(row: dict, style: PromptStyle, tokenizer: Any, text: str | None = None) -> Prompt:
    """Make the prompt of a row; `text` is given where stage 1 has already written it."""
    if text is None:
        text = format_prompt(row["question"], style, tokenizer)
    text = clean_text(text)  # what a user wrote by hand may hold halves of surrogate pairs, too
    # A chat template has already written the special tokens, such as BOS.
    ids = tokenizer.encode(text, add_special_tokens=not style.chat_template)
    return Prompt(row, text, ids)


def load_tokenizer(folder: Path) -> Any:
    """Load a model's tokenizer, without an engine. UserError if its files are damaged."""
    from transformers import AutoTokenizer  # here, as it takes seconds

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the library raises a dozen unrelated types, and a Rust exception
        reason = files.one_line(error)
        raise UserError(f"cannot load the tokenizer of {folder}: {reason}") from error


def check_prompts(prompts: list[Prompt], vocabulary_size: int, tokenizer: Any) -> None:
    """Raise UserError for a prompt that the model cannot continue.

    `vocabulary_size` is the number of tokens that the model has an embedding for.
    """
    for prompt in prompts:
        if not prompt.ids:
            raise UserError(f"the prompt of {prompt.row['id']} has no tokens")
        if max(prompt.ids) >= vocabulary_size:
            raise UserError(
                f"the prompt of {prompt.row['id']} has the token {max(prompt.ids)}, and the model "
                f"has an embedding for {vocabulary_size} only: resize it for the added tokens"
            )
        # Some tokenizers append EOS to whatever they encode.
        ends = prompt.ids[-1] == tokenizer.eos_token_id
        if ends and not prompt.text.endswith(tokenizer.eos_token):
            raise UserError(
                f"the tokenizer appends {tokenizer.eos_token} to prompts, so that a response would "
                'begin after the end: set "add_eos_token" to false in its tokenizer_config.json'
            )


def cut_prompts(name: str, prompts: list[Prompt], longest: int, tokenizer: Any) -> str | None:
    """Cut the beginning of prompts of more than `longest` tokens. `name` is their dataset's.

    Returns a sentence that says how many were cut, None if none was. Raises UserError if they are
    more than half: then the model would be asked something else.
    """
    num_cut = 0
    for prompt in prompts:
        if len(prompt.ids) > longest:
            prompt.ids = prompt.ids[-longest:]
            prompt.text = tokenizer.decode(prompt.ids)
            num_cut += 1
    if num_cut == 0:
        return None
    sentence = f"{name}: {num_cut} of {len(prompts)} prompts have more than {longest} tokens"
    if num_cut > len(prompts) / 2:
        raise UserError(f"{sentence}, too many to cut their beginnings off: leave {name} out")
    return f"{sentence}, whose beginnings are cut off"


# ---------------------------------------------------------------------------------------------
# Rewards


def reward(response: str, row: Any) -> float:
    """Score a response to a row. A text in place of a row is the answer of a math problem.

    Raises what the task's reward function raises: that is a fault in its code, not in the response.
    """
    if not isinstance(row, dict):
        return math_reward.reward(response, row)
    dataset = DATASETS[row.get("_task", "math")]
    # A copy: all responses to a prompt share the row, and a reward function may change its own.
    value = dataset.reward(response, copy.deepcopy(row))
    if isinstance(value, str | bytes):  # float() would read the text
        raise TypeError(f"the reward is the text {value!r:.60}, not a number")
    return float(value)


def submit_reward(response: str, row: dict) -> Future:
    """Start scoring a response; the future's result is the reward.

    Mathematics that takes algebra is scored in worker processes, since algebra can hang. Any other
    reward function is called here and now, and should take milliseconds. If it raises, or returns
    no finite number, the run stops with the traceback and the row's id.
    """
    try:
        if DATASETS[row.get("_task", "math")].reward is score_mathematics:
            return math_reward.submit(response, row["answer"])
        value = reward(response, row)
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"the reward function failed on row {row['id']!r}") from error
    if not abs(value) <= LARGEST_REWARD:  # this is true for nan, too
        raise RuntimeError(
            f"the reward function gave {value} on row {row['id']!r}: it must return a number, at "
            f"most {LARGEST_REWARD:g} in size"
        )
    future = Future()
    future.set_result(value)
    return future


def reward_name(task: str) -> str:
    """Name the reward function of a task, for the headers of values and results."""
    function = DATASETS[task].reward
    return f"{function.__module__}.{function.__qualname__}"
