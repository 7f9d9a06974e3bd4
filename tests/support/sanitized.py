"""A plugin of pytest: builds the native kernels with the compiler's sanitizers, which must be loaded before others."""

from pathlib import Path

from distkv.kernels.native import build

build.FLAGS += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
build.BUILT = Path("nowhere")
