"""Options that several verbs share, and what they are given to: a cluster and a console."""

import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf_client.client import Client

PIPED_COLUMNS = 10_000  # a pipe has no width: nothing is cut or wrapped


class Output(StrEnum):
    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Target:
    """Which cluster and namespace a verb is about."""

    kubeconfig: str | None = None
    context: str | None = None
    namespace: str | None = None

    def client(self) -> "Client":
        """Raises NoConnection."""
        from rlhf_client.client import Client
        from rlhf_client.kubeconfig import connect

        return Client(connect(self.kubeconfig, self.context, self.namespace))

    def kubectl(self) -> list[str]:
        """The same for kubectl, for what needs a stream into a pod."""
        given = {"--kubeconfig": self.kubeconfig, "--context": self.context, "--namespace": self.namespace}
        return [word for name, value in given.items() if value for word in (name, value)]


def names(context: typer.Context, incomplete: str) -> list[str]:
    """Of jobs, for the shell's completion. Nothing where the cluster gives none: a shell is no place for an error."""
    import asyncio

    given = context.params

    async def ask() -> list[str]:
        target = Target(*(given.get(name) for name in ("kubeconfig", "context_name", "namespace")))
        async with target.client() as client, asyncio.timeout(3.0):
            return [job.name for job in await client.jobs() if job.name.startswith(incomplete)]

    try:
        return asyncio.run(ask())
    except Exception:
        return []


Name = Annotated[str, typer.Argument(help="Name of the RLHFJob.", autocompletion=names, show_default=False)]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace.", show_default="the context's")
]
Context = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig.", show_default="current")]
Kubeconfig = Annotated[
    str | None, typer.Option("--kubeconfig", help="Kubeconfig file.", show_default="KUBECONFIG, then ~/.kube/config"),
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="For people, or for programs.")]


def console() -> "Console":
    """Standard output: of a terminal's width and colours, or plain and unwrapped where it is piped. NO_COLOR is
    rich's own.
    """
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPED_COLUMNS
    return Console(width=width, highlight=False, soft_wrap=not sys.stdout.isatty())
