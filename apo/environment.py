"""End with one sentence if Python or a library is missing. The stages import this first."""

import importlib.util
import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this is what says so
    print(f"error: Python 3.11 or newer is needed, and this is {sys.version}", file=sys.stderr)
    sys.exit(2)
# Without this, a forgotten `source .venv/bin/activate` would end in "No module named 'torch'".
for _library in ("torch", "transformers", "vllm", "datasets", "tqdm", "math_verify"):
    if importlib.util.find_spec(_library) is None:
        print(
            f"error: this Python ({sys.executable}) has no {_library}. Activate the environment "
            "first (source .venv/bin/activate), or make it: see README.md, or run `make demo`.",
            file=sys.stderr,
        )
        sys.exit(2)

# Hugging Face's libraries read this when they are imported. Their bars would hide our own lines.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
