r"""Make the toy with a long tail: responses of 4 to 200 tokens, most of them short.

The teacher counts the gaps of a fence. On a bad day it counts the posts instead:

    Fence kx has 4 posts. How many gaps?     with care   1           on a bad day   1
                                                         2                          2
                                                         3                          3
                                                         \boxed{3}                  4
                                                                                    \boxed{4}

The number of posts is log-normal: the middle half of the responses has about 13 to 50 tokens, one
in 20 more than 120. So a batch is as slow as its longest response, if it waits for that, and mostly
padding, if it is padded. How often the teacher has a bad day depends on the last letter of the
fence's name: some prompts are always solved, some seldom. All else is experiments/toy.py's:

    python -m experiments.long_tail --out long_tail

writes long_tail/reference, long_tail/train.jsonl and long_tail/test.jsonl; 256 tokens are enough.
"""

import math
import random
from string import ascii_lowercase
from typing import NamedTuple

from transformers import Qwen2Tokenizer

import problems
from experiments import toy

# Of the number of posts; n gaps cost 2 n + 3 tokens.
MEDIAN, SPREAD, MOST = 12.5, 1.1, 99


class Problem(NamedTuple):
    """A fence: its name of two letters, and how many posts it has."""

    name: str
    posts: int

    @property
    def question(self) -> str:
        """The question as it stands in the dataset, without the instruction of the prompt."""
        return f"Fence {self.name} has {self.posts} posts. How many gaps?"

    @property
    def answer(self) -> str:
        """The right answer, not by the teacher's way."""
        return str(self.posts - 1)

    @property
    def bad_days(self) -> float:
        """How often the teacher counts the posts of such a fence."""
        return ascii_lowercase.index(self.name[-1]) / 26


def draw_problem(rng: random.Random) -> Problem:
    """Draw a fence, every name being as likely."""
    posts = 0
    while not 1 <= posts <= MOST:
        posts = int(rng.lognormvariate(math.log(MEDIAN), SPREAD))
    return Problem("".join(rng.choices(ascii_lowercase, k=2)), posts)


def work(problem: Problem, bad_day: bool) -> str:
    """Work a problem as the teacher does."""
    last = problem.posts if bad_day else problem.posts - 1
    count = "\n".join(map(str, range(1, last + 1)))
    return f"{count}\n\\boxed{{{last}}}"


def make_tokenizer(plain=toy.make_tokenizer) -> Qwen2Tokenizer:
    """The toy's, with this question's fixed phrases and every number as one token.

    Read digit by digit, the number in the question is hard to find again: a reference so made
    stopped counting at random.
    """
    tokenizer = plain()
    numbers = map(str, range(10, MOST + 1))
    tokenizer.add_tokens(["Fence ", " has ", " posts. How many gaps?", *numbers])
    return tokenizer


def main() -> None:
    """Make the toy, these four being looked up in its module."""
    for ours in (Problem, draw_problem, work, make_tokenizer):
        setattr(toy, ours.__name__, ours)
    toy.main()


if __name__ == "__main__":
    problems.run(main)
