"""The demo: a tiny base model, many small adapters, and the skills they were trained for.

`skills` says what the adapters can do and how to check it; `assets/` holds the trained files.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
MODEL_DIR = ASSETS / "model"
ADAPTERS_DIR = ASSETS / "adapters"
