"""`python -m manual_ops` and `manual-ops`: the command line, which needs more packages than the library."""

import importlib.util
import sys

TOOLS = ("typer", "rich", "matplotlib", "sklearn")


def main() -> None:
    missing = [name for name in TOOLS if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'manual-ops needs {", ".join(missing)}: install with pip install "manual_ops[tools]"')
    from manual_ops.cli import app

    app()


if __name__ == "__main__":
    main()
