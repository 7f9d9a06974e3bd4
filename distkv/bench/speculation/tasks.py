"""What is asked about a long real text: to quote it, which a draft by prompt lookup can foresee, and to write freely.

A question ends the prompt, with the first tokens of what is to be written, so that a small model knows as well as a
large one what is asked. No chat template is needed.
"""

from dataclasses import dataclass
from pathlib import Path

from distkv.bench.prompts import Prompts
from distkv.errors import ConfigError
from distkv.frontend.tokenizer import Tokenizer

LEAD = 48  # tokens of a passage that a quotation has begun with
QUOTING, FREE, OTHER = "quoting", "free", "other"  # kinds of tasks
TARGETS = {QUOTING: 2.0, FREE: 0.95}  # times as many tokens a second as without drafts


@dataclass(frozen=True)
class Task:
    """One question."""

    name: str
    kind: str
    question: str
    depth: float | None = None  # of the quoted passage, from 0 to 1 of the text; None for one that quotes none
    temperature: float = 0.0


TASKS = (
    Task("quote", QUOTING, "\n\n\nThe same passage once more:\n\n", depth=0.1),
    Task("quote at 0.8", QUOTING, "\n\n\nThe same passage once more:\n\n", depth=0.1, temperature=0.8),
    Task("quote the end", QUOTING, "\n\n\nThe same passage once more:\n\n", depth=0.9),
    Task("summary", OTHER, "\n\n\nQuestion: What are the sources above about?\nAnswer: They"),
    Task("chat", FREE, "\n\n\nNow something else.\nQuestion: What shall we cook for four friends?\nAnswer: I would"),
    Task("story at 0.8", FREE, "\n\n\nA story of a fox who wanted to swim\n\nOnce upon a time", temperature=0.8),
    Task("story at 1.2", FREE, "\n\n\nA story of a fox who wanted to swim\n\nOnce upon a time", temperature=1.2),
)
QUICK_TASKS = tuple(task for task in TASKS if task.name in ("quote", "chat"))


@dataclass(frozen=True)
class Prompt:
    """A task as tokens."""

    task: Task
    token_ids: list[int]
    passage: list[int]  # what follows in the text behind the tokens that a quotation begins with

    def quoted(self, answer: list[int]) -> float | None:
        """The share of an answer, from its first token on, that is the passage word for word; None where none is
        asked for."""
        if self.task.depth is None:
            return None
        pairs = zip(answer, self.passage, strict=False)
        same = next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), len(answer))
        return same / len(answer)


def make_prompts(model: Path, context: int, answer: int, tasks: tuple[Task, ...]) -> list[Prompt]:
    """The tasks about the first `context` tokens of the sources of Python's standard library.

    Raises ConfigError when the model has no tokenizer, or the text is too short for the passages.
    """
    tokenizer, text = Tokenizer(model), Prompts(model).text(context)
    prompts = []
    for task in tasks:
        token_ids, passage = text + tokenizer.encode(task.question, special=False), list[int]()
        if task.depth is not None:
            start = int(task.depth * context)
            token_ids, passage = token_ids + text[start : start + LEAD], text[start + LEAD :]
            if len(passage) < answer:
                raise ConfigError(
                    f"the passage of {task.name!r} has {len(passage)} tokens and new-tokens is {answer}; lower it or "
                    "raise the context"
                )
        prompts.append(Prompt(task, token_ids, passage[:answer]))
    return prompts
