"""`kubectl-rlhf`, which kubectl finds as `kubectl rlhf`."""

from typing import NoReturn

from rlhf_cli.exits import Exit, end


def process() -> NoReturn:
    from rlhf_cli.app import app

    try:
        app()
    except KeyboardInterrupt:
        end(Exit.INTERRUPTED, "")
    raise SystemExit(int(Exit.OK))


if __name__ == "__main__":
    process()
