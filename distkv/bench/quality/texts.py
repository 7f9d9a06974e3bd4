"""What the models read: long texts that lie on the machine."""

from pathlib import Path

from distkv.bench.prompts import STDLIB, Prompts, read_text
from distkv.errors import ConfigError
from distkv.frontend.tokenizer import Tokenizer

LICENCES = Path("/usr/share/common-licenses")


def long_texts(model: Path, count: int, given: Path | None, least: int) -> tuple[dict[str, list[int]], list[str]]:
    """Texts of `count` tokens by what they are, and what is missing on this machine, in sentences.

    Args:
        given: a file that is read in place of them, as far as it goes.
        least: how many tokens it must have.

    Raises ConfigError when there is none, or the model has no tokenizer.
    """
    tokenizer = Tokenizer(model)
    if given is not None:
        token_ids = tokenizer.encode(read_text(given))[:count]
        if len(token_ids) < least:
            raise ConfigError(
                f"--text {str(given)!r} has {len(token_ids)} tokens; name a text of {least} at least, or lower "
                "--read-tokens"
            )
        short = f"{given.name} has {len(token_ids)} tokens of text and {count} are wanted; they are all that is read"
        return {given.name: token_ids}, [short] if len(token_ids) < count else []
    licences: list[int] = []
    for path in licence_files():
        licences += tokenizer.encode(read_text(path) + "\n", special=not licences)
    texts = {"licences": licences[:count], "sources": Prompts(model).text(count)}
    missing = [
        f"{what} has {len(texts[name])} tokens of text and {count} are wanted; {cure}"
        for name, what, cure in (
            ("licences", str(LICENCES), "it is of Debian's base-files"),
            ("sources", STDLIB, "install them, or name a file with --text"),
        )
        if len(texts[name]) < count
    ]  # fmt: skip
    texts = {name: token_ids for name, token_ids in texts.items() if len(token_ids) == count}
    if not texts:
        raise ConfigError(f"no text to read: {'; '.join(missing)}")
    return texts, missing


def licence_files() -> list[Path]:
    """The licence texts of this machine, each once, in the order of their names."""
    return [path for path in sorted(LICENCES.glob("*")) if path.is_file() and not path.is_symlink()]
