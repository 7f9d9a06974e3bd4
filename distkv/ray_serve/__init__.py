"""distkv on Ray Serve: replicas of an engine behind the server, see docs/ray_serve.md.

In a Serve config file: `import_path: distkv.ray_serve:build_openai_app`. The names below are loaded on first use, since
the command line knows the options of this package without Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for type checkers
    from distkv.ray_serve.app import build_openai_app as build_openai_app
    from distkv.ray_serve.config import LLMConfig as LLMConfig
    from distkv.ray_serve.config import ModelLoadingConfig as ModelLoadingConfig

_HOME = {"build_openai_app": "app", "LLMConfig": "config", "ModelLoadingConfig": "config"}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distkv.ray_serve' has no attribute {name!r}")
    return getattr(import_module(f"distkv.ray_serve.{_HOME[name]}"), name)
