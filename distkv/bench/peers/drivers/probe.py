"""Tells in a JSON object what version of a module an environment has, without the seconds that importing it takes:
`probe.py MODULE`."""

import importlib.util
import json
import platform
import sys
from importlib import metadata


def version(module):
    """Of the distribution that brings the module, whatever it is called."""
    names = metadata.packages_distributions().get(module, [])
    return metadata.version(names[0]) if names else None


module = sys.argv[1]
if importlib.util.find_spec(module) is None:
    answer = {"error": f"{sys.executable} has no module {module}; install it there"}
else:
    answer = {"version": version(module), "torch": version("torch"), "python": platform.python_version()}
print(json.dumps(answer))
