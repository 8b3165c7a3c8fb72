"""The verbs and their options. What a verb does is in a module of its own, imported when it is called."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_cli.exits import Wrong, guarded, run
from rlhf_cli.options import Context, Kubeconfig, Name, Namespace, Output, OutputOption, Target, console, names

EPILOG = "Exit codes: 0 done, 1 the job failed, 2 wrong input, 3 no cluster, 4 no rights, 5 not found, 6 another " \
    "version, 7 timed out, 8 no files. docs/cli.md has examples."
app = typer.Typer(
    name="kubectl-rlhf", help="RLHF training as one Kubernetes object: look at runs, and steer them.", epilog=EPILOG,
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
File = Annotated[Path, typer.Option("--filename", "-f", help="Manifest: YAML or JSON, - for standard input.")]


@app.command("list", epilog="kubectl rlhf list -A    kubectl rlhf list -o json | jq '.[].status.phase'")
def list_jobs(
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of all namespaces.")] = False,
    output: OutputOption = Output.TEXT, namespace: Namespace = None, context_name: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Jobs with phase, step, reward and time left.

    Needs the right to list RLHFJobs.
    """
    from rlhf_cli import cluster_verbs

    run(cluster_verbs.list_jobs(Target(kubeconfig, context_name, namespace), output, everywhere))


@app.command(epilog="kubectl rlhf status maths -n team-a")
def status(
    name: Name, output: OutputOption = Output.TEXT, namespace: Namespace = None, context_name: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """One job on one page: progress, curves, placement, conditions, the last failure, what to do.

    Needs the right to get the RLHFJob; the curves also those to list pods and get their logs.
    """
    from rlhf_cli import cluster_verbs

    run(cluster_verbs.status(Target(kubeconfig, context_name, namespace), output, name))


@app.command(epilog="kubectl rlhf watch maths")
def watch(
    name: Name, output: OutputOption = Output.TEXT, namespace: Namespace = None, context_name: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Follow a job to its end: live on a terminal, a line for each change in a pipe.

    Needs the right to watch RLHFJobs.
    """
    from rlhf_cli import cluster_verbs

    run(cluster_verbs.watch(Target(kubeconfig, context_name, namespace), output, name))


@app.command(
    epilog="kubectl rlhf logs maths -f    kubectl rlhf logs maths --of engines --tail 50    kubectl rlhf logs maths "
    "--previous    kubectl rlhf logs ./checkpoints --attempt 2",
)
def logs(
    name: Annotated[str, typer.Argument(help="Name of the RLHFJob; with --attempt also a checkpoint.path.")],
    source: Annotated[str, typer.Option("--of", help="driver, engines, trainer or feed.")] = "driver",
    pod: Annotated[str, typer.Option(help="Ray's own container of this pod instead.")] = "",
    attempt: Annotated[
        int | None, typer.Option(help="The log of an earlier head pod, which is kept in checkpoint.path.")
    ] = None,
    previous: Annotated[bool, typer.Option("--previous", "-p", help="Of the driver before, in the same pod.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it is written.")] = False,
    tail: Annotated[int | None, typer.Option(help="The last lines only.", min=0)] = None,
    namespace: Namespace = None, context_name: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """What the driver, the engines or the trainer printed, now or in an earlier attempt."""
    from rlhf_cli import cluster_verbs, kept_logs

    target = Target(kubeconfig, context_name, namespace)
    if attempt is not None:
        if follow or previous or pod:
            guarded(lambda: _refuse("--attempt reads a kept log: leave out --follow, --previous and --pod"))
        guarded(lambda: kept_logs.show(target, name, attempt, source, tail))
    else:
        run(cluster_verbs.logs(
            target, name, source=source, pod=pod, follow=follow, previous=previous, tail=tail,
        ))


def _refuse(words: str) -> None:
    raise Wrong(words)


@app.command(
    "run", epilog="kubectl rlhf run -f job.yaml && echo learnt    kubectl rlhf run -f job.yaml --with train.jsonl",
)
def run_job(
    filename: File,
    files: Annotated[
        list[Path] | None, typer.Option("--with", help="A file that the pods find in /files; may be given again."),
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to follow it; the job goes on.", min=0)] = None,
    output: OutputOption = Output.TEXT, namespace: Namespace = None, context_name: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Make a job of a manifest and follow it: exit code 0 when it has Succeeded, 1 when it has Failed.

    A job that is there already is followed if it is the very same. Needs the rights to create and watch RLHFJobs; for
    --with also that to create ConfigMaps, which go with the job.
    """
    from rlhf_cli import cluster_verbs, manifest

    raw = guarded(lambda: manifest.load(filename))
    contents = guarded(lambda: manifest.contents(files or [], raw))
    own = raw["metadata"].get("namespace")
    if own and namespace and own != namespace:
        guarded(lambda: _refuse(f"{filename}: metadata.namespace is {own}, --namespace {namespace}: change one"))
    run(cluster_verbs.run(Target(kubeconfig, context_name, namespace or own), output, raw, contents, timeout))


@app.command(epilog="kubectl rlhf suspend maths")
def suspend(
    name: Name, namespace: Namespace = None, context_name: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """Save, and release every GPU.

    Needs the right to patch the RLHFJob.
    """
    from rlhf_cli import cluster_verbs

    run(cluster_verbs.suspend(Target(kubeconfig, context_name, namespace), name))


@app.command(epilog="kubectl rlhf resume maths")
def resume(
    name: Name, namespace: Namespace = None, context_name: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """Go on from the newest checkpoint.

    Needs the right to patch the RLHFJob.
    """
    from rlhf_cli import cluster_verbs

    run(cluster_verbs.resume(Target(kubeconfig, context_name, namespace), name))


@app.command(epilog="kubectl rlhf stop maths --yes")
def stop(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    namespace: Namespace = None, context_name: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """Delete a job with its pods.

    Checkpoints on a volume stay, unless checkpoint.claim.onDelete is Delete; with runPolicy.finalSave it saves first.
    Needs the right to delete the RLHFJob.
    """
    from rlhf_cli import cluster_verbs

    if not yes:
        guarded(lambda: _asked(name))
    run(cluster_verbs.stop(Target(kubeconfig, context_name, namespace), name))


def _asked(name: str) -> None:
    import sys

    if not sys.stdin.isatty():
        raise Wrong(f"stop deletes {name}: give --yes, for nobody can be asked here")
    if not typer.confirm(f"Delete {name} and its pods?"):
        raise Wrong("nothing was done")


Where = Annotated[str, typer.Argument(
    help="A checkpoint.path: directory or URL; or the name of a job, whose files come from its trainer pod.",
    autocompletion=names, show_default=False,
)]


@app.command(epilog="kubectl rlhf report ./checkpoints --out run.html    kubectl rlhf report maths")
def report(
    where: Where,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="<name>.html")] = None,
    namespace: Namespace = None, context_name: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """One HTML file that tells a run, and needs no network: curves, time, samples, attempts, configuration.

    From the files of a checkpoint.path alone, also after a crash. By name it needs the right to create pods/exec.
    """
    from rlhf_cli import file_verbs

    guarded(lambda: file_verbs.report(Target(kubeconfig, context_name, namespace), where, out))


@app.command(
    epilog="kubectl rlhf explain -f job.yaml --config ~/models/Qwen3-8B    kubectl rlhf explain -f job.yaml -o json",
)
def explain(
    filename: File,
    config: Annotated[Path | None, typer.Option(help="The model's config.json, or its directory.")] = None,
    gpu: Annotated[str, typer.Option(help="h200, h100, a100 or l40s.")] = "h200",
    length: Annotated[int | None, typer.Option(help="Tokens of a mean completion.", min=1,
        show_default="rollout.maxTokens")] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """What a manifest will become: pods, bundles and shares, memory of a GPU, seconds of a step, and what does not fit.

    Needs no cluster. Exit code 2 when something does not fit.
    """
    from rlhf_cli.explain import explain as explained

    raise SystemExit(guarded(lambda: explained(filename, config, gpu, length, output)))


@app.command(
    epilog="kubectl rlhf samples maths --sort -reward --limit 3    kubectl rlhf samples ./out --step 40 -o json",
)
def samples(
    where: Where,
    step: Annotated[int | None, typer.Option(help="Of this step.", min=0, show_default="the newest")] = None,
    sort: Annotated[str, typer.Option(help="order, reward, advantage, length: most first; -reward: least.")] = "order",
    limit: Annotated[int, typer.Option(help="Samples to show.", min=1)] = 10,
    output: OutputOption = Output.TEXT, namespace: Namespace = None, context_name: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Prompts, answers, rewards and advantages of a step.

    From the files of a checkpoint.path. By name it needs the right to create pods/exec, and --step copies one file.
    """
    from rlhf_cli import samples as verb

    guarded(lambda: verb.show(Target(kubeconfig, context_name, namespace), where, step, sort, limit, output))


@app.command(epilog="kubectl rlhf compare maths maths-2    kubectl rlhf compare ./old ./new -o json")
def compare(
    left: Where, right: Where, output: OutputOption = Output.TEXT, namespace: Namespace = None,
    context_name: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """Two runs side by side: last values and curves of every metric, and where their specs differ.

    From the files of a checkpoint.path; by name it needs the right to create pods/exec.
    """
    from rlhf_cli import compare as verb

    width = console().width
    guarded(lambda: verb.compare(Target(kubeconfig, context_name, namespace), left, right, output, width))


@app.command(epilog="kubectl rlhf dashboard -A    kubectl rlhf dashboard --port 8300 --no-open")
def dashboard(
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of all namespaces.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of this machine alone.", show_default="any free")] = 0,
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
    namespace: Namespace = None, context_name: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """The fleet and each run as a page that renews itself, until it is interrupted.

    Needs the right to list RLHFJobs; the curves also those to list pods and get their logs.
    """
    from rlhf_cli import dashboard as verb

    guarded(lambda: verb.serve(Target(kubeconfig, context_name, namespace).client(), everywhere, port, browse))


@app.command(epilog="kubectl rlhf bundle maths --out maths.tar.gz")
def bundle(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="<name>-bundle.tar.gz")] = None,
    namespace: Namespace = None, context_name: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """An archive for whoever helps: the job, its pods, events and logs, without secrets.

    What you may not read is left out, and named in the archive. Literals of environments and what looks like a secret
    are redacted; look through it before you send it.
    """
    from rlhf_cli import bundle as verb

    run(verb.bundle(Target(kubeconfig, context_name, namespace), name, out))


@app.command(
    epilog="kubectl rlhf init --model Qwen/Qwen3-8B --data train.jsonl --reward reward.py --gpus 8 --out job.yaml",
)
def init(
    name: Annotated[str | None, typer.Option(help="Of the job.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, or a directory inside the pods.")] = None,
    data: Annotated[str | None, typer.Option(
        help="A .jsonl or .parquet file, here or (from / on) inside the pods; a hub dataset, or gym:<task>.",
    )] = None,
    reward: Annotated[
        str | None, typer.Option(help="A .py file that defines reward, module:function, math, or an http(s) URL.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    storage: Annotated[str | None, typer.Option(help="Size of the checkpoints' volume, such as 100Gi.")] = None,
    algorithm: Annotated[str, typer.Option(help="docs/algorithms.md has them.")] = "grpo",
    separated: Annotated[bool, typer.Option("--separated", help="Engines have GPUs of their own.")] = False,
    image: Annotated[str, typer.Option(help="Worker image.")] = "rlhf-worker:0.1.0",
    mounts: Annotated[
        list[str] | None,
        typer.Option("--mount", help="CLAIM:/path, or /directory/of/the/node:/path: read by every pod."),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field: rollout.maxTokens=2048. May be given again."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="standard output")] = None,
) -> None:
    """A valid manifest: asks on a terminal for what no flag tells, takes defaults elsewhere. Needs no cluster."""
    from rlhf_cli import init as verb
    from rlhf_cli.convert import write

    more = tuple(mounts or ()), tuple(sets or ())
    given = verb.Answers(name, model, data, reward, gpus, steps, storage, algorithm, separated, image, *more)
    ask = (lambda words, default: str(typer.prompt(words, default or None))) if verb.interactive() else verb.unattended
    guarded(lambda: write(verb.manifest(verb.asked(given, ask)), out))


@app.command(
    epilog="kubectl rlhf convert run_qwen.sh --gpus 8 --out job.yaml    kubectl rlhf convert grpo.yaml --from trl",
)
def convert(
    file: Annotated[Path, typer.Argument(help="YAML, or the shell script that starts it; - for standard input.")],
    framework: Annotated[
        str | None, typer.Option("--from", help="trl, verl or openrlhf.", show_default="by its options")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Where the configuration does not tell.")] = None,
    name: Annotated[str, typer.Option(help="Of the job.")] = "converted",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="standard output")] = None,
) -> None:
    """A configuration of TRL, verl or OpenRLHF as a manifest. What it cannot carry over it says, and writes on top."""
    from rlhf_cli import convert as verb

    guarded(lambda: verb.verb(file, framework, gpus, name, out))
