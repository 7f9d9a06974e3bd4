"""The tasks' questions as tokens of a model, and how well an engine answers them."""

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean

from distkv.bench.harness import Row
from distkv.bench.quality.answers import Answers
from distkv.bench.quality.tasks import Question, Task, split_sentences
from distkv.errors import ConfigError
from distkv.frontend.tokenizer import Tokenizer
from distkv.workers.model.model_config import ModelConfig

ANSWER_TOKENS = 16
SEED = 1


@dataclass(frozen=True)
class Tokens:
    """A question as tokens."""

    question: Question
    prompt: list[int]
    lead: list[int]

    @property
    def num_tokens(self) -> int:
        """With its answer."""
        return len(self.prompt) + len(self.lead) + ANSWER_TOKENS


def make_questions(model: Path, texts: dict[str, list[int]], tasks: tuple[Task, ...]) -> tuple[list[Tokens], list[str]]:
    """All questions that the model has positions for, about texts that are made of the sentences of the first text; and
    in sentences which tasks are left out. Raises ConfigError when all are, or where a text would be far too short."""
    positions = ModelConfig.load(model).max_position_embeddings
    tokenizer = Tokenizer(model)
    [token_ids, *_] = texts.values()
    text = tokenizer.decode(token_ids)
    sentences = split_sentences(text)
    per_word = len(token_ids) / len(text.split())
    found: list[Tokens] = []
    too_long = []
    for task in tasks:
        asked = [_tokens(tokenizer, question) for question in task.questions(sentences, per_word, SEED)]
        least, most = (bound(one.num_tokens for one in asked) for bound in (min, max))
        if least < task.num_tokens / 2:
            raise ConfigError(
                f"the text's sentences are too long for {task.name}, which wants texts of {task.num_tokens} tokens and "
                f"would have one of {least}; name another file with --text"
            )
        if most <= positions:
            found += asked
        else:
            too_long.append(f"{task.name} takes {most} tokens, and the model has {positions} positions")
    if not found:
        raise ConfigError(f"no task is left: {'; '.join(too_long)}; use another model")
    return found, too_long


def _tokens(tokenizer: Tokenizer, question: Question) -> Tokens:
    """Cut where the tokens of the whole and those of the prompt alone part, since a token may lie across."""
    whole, prompt = tokenizer.encode(question.prompt + question.lead), tokenizer.encode(question.prompt)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, prompt, strict=False)))
    return Tokens(question, whole[:same], whole[same:])


def answer(engine: Answers, model: Path, questions: list[Tokens]) -> Row:
    """The mean score of each task."""
    tokenizer = Tokenizer(model)
    answers = engine.continue_all([(one.prompt, one.lead) for one in questions], ANSWER_TOKENS)
    scores: dict[str, list[float]] = {}
    for one, token_ids in zip(questions, answers, strict=True):
        scores.setdefault(one.question.task, []).append(one.question.score(tokenizer.decode(token_ids)))
    return {f"score_{task}": fmean(of) for task, of in scores.items()} | {
        "score": fmean(fmean(of) for of in scores.values()),
        "num_questions": {task: len(of) for task, of in scores.items()},
    }
