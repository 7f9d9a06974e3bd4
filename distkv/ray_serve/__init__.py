"""distkv on Ray Serve: replicas of an engine behind the server, see docs/ray_serve.md.

In a Serve config file: `import_path: distkv.ray_serve:build_openai_app`.
"""

from distkv.ray_serve.app import build_openai_app as build_openai_app
from distkv.ray_serve.config import LLMConfig as LLMConfig
from distkv.ray_serve.config import ModelLoadingConfig as ModelLoadingConfig
