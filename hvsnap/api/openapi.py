"""The machine-readable form of the API, made from the routes themselves.

``python -m hvsnap.api.openapi docs`` writes ``docs/openapi.json`` (OpenAPI 3.1), which the daemon also hands out at
``/openapi.json``. A test fails when it is not up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

from hvsnap.api.app import create_app
from hvsnap.service.service import Service


def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    # Routes touch the service only when they are called, so none is needed to describe them.
    return create_app(cast(Service, None)).openapi()


def files() -> dict[str, str]:
    """Return what is written: paths below docs/, and texts."""
    return {"openapi.json": json.dumps(document(), indent=2, ensure_ascii=False) + "\n"}


def main(directory: str) -> None:
    """Write the files below ``directory``."""
    for path, text in files().items():
        (Path(directory) / path).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
