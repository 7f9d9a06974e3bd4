"""Where the answers stand in a rendered conversation, so that they can be put back as tokens."""

import re
import secrets
from collections.abc import Callable
from itertools import chain, zip_longest

from distkv.frontend.messages import Message


def text_around_answers(
    render: Callable[[list[Message]], str], end_tokens: tuple[str, ...], messages: list[Message]
) -> list[str] | None:
    """The text of a conversation before, between and behind the answers that carry `token_ids`, one or more.

    Args:
        render: the chat template: text of messages, up to where the assistant answers.
        end_tokens: texts of the tokens that end an answer.

    With the tokens in between, the first pieces are the prompt that the last of these answers was sampled for, if all
    prompts were made so. None when the template writes earlier answers in another way than the model wrote them, by
    dropping a part of them, say.
    """
    indexes = [index for index, message in enumerate(messages) if message.get("token_ids") is not None]
    texts = [messages[index]["content"].strip() for index in indexes]
    mark = f"answer{secrets.token_hex(16)}number"  # neither a template nor a user can know it, and nothing trims it
    marked, stripped = list(messages), list(messages)
    for number, index in enumerate(indexes):
        marked[index] = messages[index] | {"content": f"{mark}{number}."}
        stripped[index] = messages[index] | {"content": texts[number]}

    rendered = re.split(rf"{mark}(\d+)\.", render(marked))
    around, numbers = rendered[::2], rendered[1::2]
    if numbers != [str(number) for number in range(len(indexes))]:
        return None
    # a template may also treat an answer by its content; whether it trims it is all the same
    if "".join(chain(*zip_longest(around, texts, fillvalue=""))) != render(stripped):
        return None
    asked = re.sub(rf"{mark}\d+\.", "", render(marked[: indexes[-1]]))
    before = "".join(around[:-1])
    blank = before.removeprefix(asked)
    if asked + blank != before or blank.strip():
        return None
    # a blank that the template puts before or behind answers is not in the prompt; the model sampled its own or none
    for number in range(len(indexes)):
        around[number] = around[number].removesuffix(blank)
        behind = around[number + 1].lstrip()
        if behind.startswith(end_tokens):
            around[number + 1] = behind
    return around
