"""python -m rlhf_worker run|local|import-gguf: see run.py first."""

import argparse
import atexit
import faulthandler
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# Ray's default of 60 s is most of a driver's recovery from a lost head (read at import).
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
# Libraries' progress bars are for a terminal that somebody looks at; what is printed here is a log (read at import).
os.environ.setdefault("TQDM_DISABLE", "1")


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="rlhf_worker", description="The runtime of an RLHFJob.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="drive a run in a cluster (the driver container)")
    run.add_argument("config", type=Path, help="run.yaml")
    local = commands.add_parser("local", help="run an RLHFJob on this machine, without Kubernetes")
    local.add_argument("manifest", type=Path)
    local.add_argument("--steps", type=int, help="instead of spec.trainer.steps")
    local.add_argument("--volume", action="append", default=[], metavar="MOUNT=DIR", help="DIR of this machine stands "
        "for MOUNT in the pods, such as /checkpoints=./out")
    local.add_argument("--verbose", action="store_true", help="show what the actors print")
    gguf = commands.add_parser("import-gguf", help="turn a GGUF file into a bfloat16 Hugging Face checkpoint")
    gguf.add_argument("file", type=Path)
    gguf.add_argument("directory", type=Path)
    replay = commands.add_parser("replay", help="print the samples of a step, or score them anew")
    replay.add_argument("path", type=Path, help="a checkpoint.path, its directory rollouts, or a step-N.parquet")
    replay.add_argument("--step", type=int, help="default: the newest")
    replay.add_argument("--sort", choices=["reward"], help="best first; default: in the step's order")
    replay.add_argument("--limit", type=int, default=10, help="samples to print (10)")
    replay.add_argument("--job", type=Path, help="score the samples by this RLHFJob's rewards, and print what differs")
    if sys.__stderr__ is not None:  # the process's own: what stands in its place may be no file
        # a crash of native code leaves the stack that it happened in
        faulthandler.enable(sys.__stderr__, all_threads=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # inputs hold what no encoder takes, and errors quote them
    return _dispatch(parser.parse_args(arguments))


def _dispatch(given: argparse.Namespace) -> int:
    from rlhf_worker.run import guarded, run

    if given.command == "run":
        from rlhf_worker.pod.kept_log import kept_log

        with kept_log() as log:
            return guarded(lambda: run(given.config, log))
    if given.command == "local":
        from rlhf_worker.local import local, volume

        return guarded(lambda: local(given.manifest, dict(map(volume, given.volume)), given.steps, given.verbose))
    if given.command == "replay":
        from rlhf_worker.feed.replay import replay

        return guarded(lambda: replay(given.path, given.step, given.sort == "reward", given.limit, given.job))
    from rlhf_worker.gguf import import_gguf

    return guarded(lambda: import_gguf(given.file, given.directory))


def process() -> NoReturn:
    """`main`, and no more than Python's own part of an exit after it. Threads of Ray, gRPC and gloo outlive what they
    worked for, and at times one crashes while C++ takes its globals apart: that must not make a failed run of one that
    is done. """
    codes = [1]  # an exception that nobody caught
    atexit.register(_leave, codes)  # the first one, which is called last
    try:
        codes.append(main())
    except SystemExit as left:
        codes.append(left.code if isinstance(left.code, int) else 1)
        raise
    sys.exit(codes[-1])


def _leave(codes: list[int]) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(codes[-1])


if __name__ == "__main__":
    process()
