"""The commands that take a kernel to Kaggle: bundle, dry-run, push, status, output, submit."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from submission.progress import print_line

LOG = logging.getLogger(__name__)

_METADATA = Path("kernel-metadata.json")
_BUNDLE = Path("bundle")
_PUBLIC_TEST = Path("examples/test.csv")

Metadata = Annotated[Path, typer.Option(help="kernel-metadata.json of the kernel.")]
TestOption = Annotated[list[Path] | None, typer.Option(help="CSV of pairs for the larger test; repeatable.")]
AttachOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Copy of an attached model to rehearse with: PATH in the order of --attach, or NAME=PATH; repeatable."
    ),
]
Accelerator = Annotated[
    str,
    typer.Option(help="Machine: t4x2, l4x4, a100, h100, a machine shape of Kaggle, or none; default: by the bundle."),
]
Show = Annotated[bool, typer.Option("--print", help="Print the client's commands instead of running them.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    commands: list[Callable[..., Any]] = [bundle, dry_run, push, status, output, submit]
    for command in commands:
        app.command(command.__name__.replace("_", "-"))(command)


def bundle(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make.")] = _BUNDLE,
    settings: Annotated[
        Path | None, typer.Option(help="A kernel.toml: strategy, model, options; default: a plain one.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="embedded-tuned, embedded, a GGUF file, or attached: that of --attach (default with it)."),
    ] = "embedded-tuned",
    attach: Annotated[
        list[str] | None,
        typer.Option(
            help="Kaggle model: gemma-7b-it, mistral-7b-it ... or owner/model/framework/variation/VERSION; "
            "again for more."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="GGUF LoRA file or PEFT folder; for the sources of an ensemble NAME=PATH, repeatable."),
    ] = None,
    include: Annotated[
        list[Path] | None,
        typer.Option(help="Extra file for the bundle, such as a strategy module or its TOML; repeatable."),
    ] = None,
    wheel: Annotated[
        list[Path] | None, typer.Option(help="A wheel of your own, such as a CUDA build; repeatable.")
    ] = None,
    model_instance: Annotated[
        str, typer.Option(help="Make a Kaggle model of --model instead: owner/model/framework/variation.")
    ] = "",
    license_name: Annotated[str, typer.Option("--license", help="Licence of the Kaggle model.")] = "Apache 2.0",
) -> None:
    """Make the dataset that the kernel needs: wheels, model or adapter, kernel.toml, list of contents."""
    from submission.publish import bundle as made

    if model_instance:
        made.model_instance(model, model_instance, output, license_name)
        return
    alone, named = made.split_adapters(adapter or [])
    made.bundle(made.BundleConfig(
        output, settings, model, alone, include or (), wheel or (),
        adapters=named, attach=attach or (),
    ))  # fmt: skip


def dry_run(
    bundle: Annotated[Path | None, typer.Option(help="A bundle; without it a plain one is made.")] = None,
    metadata: Metadata = _METADATA,
    test: TestOption = None,
    model: AttachOption = None,
    shorten: Annotated[float, typer.Option(min=1, help="Divide the deadline of kernel.toml by this.")] = 1.0,
    accelerator: Accelerator = "",
) -> None:
    """Run the kernel as Kaggle does: its folders in both layouts, its packages, no network. Exit code 0 or 1."""
    raise typer.Exit(0 if _rehearse(bundle, metadata, test, model, shorten, accelerator) else 1)


def push(
    bundle: Annotated[Path, typer.Option(help="The bundle to upload; made if it does not exist.")] = _BUNDLE,
    metadata: Metadata = _METADATA,
    message: Annotated[str, typer.Option("-m", help="Message of the dataset version.")] = "new bundle",
    test: TestOption = None,
    model: AttachOption = None,
    rehearse: Annotated[bool, typer.Option("--dry-run/--no-dry-run", help="Rehearse first.")] = True,
    dataset: Annotated[bool, typer.Option("--dataset/--no-dataset", help="Upload the bundle first.")] = True,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the run to its end.")] = True,
    accelerator: Accelerator = "",
    show: Show = False,
) -> None:
    """Check, rehearse, upload bundle and kernel, and follow its run."""
    from submission.publish import bundle as made
    from submission.publish.client import configured_user
    from submission.publish.datasets import push_dataset, wait_until_ready
    from submission.publish.metadata import KERNEL_FILE
    from submission.publish.push import kernel_metadata
    from submission.publish.push import push as push_kernel

    folder = _folder_of(metadata, KERNEL_FILE)
    owner = "OWNER" if show else configured_user()
    kernel_metadata(folder, owner, accelerator)  # what is wrong with it is said first
    if not show:
        if not bundle.exists():
            made.bundle(made.BundleConfig(bundle))
        kernel_metadata(folder, owner, accelerator, bundle)
        if rehearse and not _rehearse(bundle, metadata, test, model, 1.0, accelerator):
            LOG.info("nothing was pushed: the rehearsal failed (--no-dry-run pushes all the same)")
            raise typer.Exit(1)
    if dataset:
        push_dataset(bundle, message, owner=owner, show=show)
        wait_until_ready(f"{owner}/{made.DATASET}", show=show)
    push_kernel(folder, owner=owner, accelerator=accelerator, bundle=bundle, wait=wait, show=show)
    if not show:
        LOG.info("next: python -m submission output; then submit --version N -m MESSAGE")


def status(
    metadata: Metadata = _METADATA,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    show: Show = False,
) -> None:
    """Say how the kernel's latest run stands. Exit code 1 if it failed."""
    from submission.publish.follow import status as status_of
    from submission.publish.follow import wait_for

    kernel = _kernel(metadata, show=show)
    if wait and not show:
        wait_for(kernel)
        return
    found = status_of(kernel, show=show)
    if found is not None:
        print_line(str(found), sys.stdout)
        raise typer.Exit(1 if found.failed else 0)


def output(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the files.")] = Path("kernel-output"),
    metadata: Metadata = _METADATA,
    show: Show = False,
) -> None:
    """Download what the kernel's latest run wrote, and its log."""
    from submission.publish.push import output as download

    download(_kernel(metadata, show=show), output, show=show)


def submit(
    version: Annotated[int, typer.Option(min=1, help="Kernel version, as printed by push.")],
    message: Annotated[str, typer.Option("-m", "--message", help="Message shown in the list of submissions.")],
    metadata: Metadata = _METADATA,
    file: Annotated[str, typer.Option(help="Name of the output file to submit.")] = "submission.csv",
    show: Show = False,
) -> None:
    """Submit a version of the kernel to the competition, which runs it again on the hidden test set."""
    from submission.kernel import COMPETITION
    from submission.publish.push import submit as send

    send(COMPETITION, _kernel(metadata, show=show), version, file, message, show=show)


def _rehearse(
    bundle: Path | None, metadata: Path, tests: list[Path] | None, models: list[str] | None, shorten: float,
    accelerator: str = "",
) -> bool:  # fmt: skip
    """Check the metadata and run the kernel; True if all went well."""
    import tempfile

    from submission.publish import bundle as made
    from submission.publish.attachable import attached_copies
    from submission.publish.dry_run import dry_run as run
    from submission.publish.forecast import forecast
    from submission.publish.metadata import KERNEL_FILE
    from submission.publish.needs import hardware_of, needs_of
    from submission.publish.push import kernel_metadata

    folder = _folder_of(metadata, KERNEL_FILE)
    kernel_metadata(folder, "someone", accelerator)
    if tests is None:
        tests = [_PUBLIC_TEST] if _PUBLIC_TEST.is_file() else []
    with tempfile.TemporaryDirectory(prefix="prompt-recovery-bundle-") as temporary:
        if bundle is None:
            bundle = Path(temporary) / "bundle"
            made.bundle(made.BundleConfig(bundle))
        content, changes = kernel_metadata(folder, "someone", accelerator, bundle)
        LOG.info(f"hardware   {hardware_of(content)} on Kaggle, for this bundle: {needs_of(bundle).why}")
        for change in changes:
            LOG.info(f"           {change}")
        sources = content.get("model_sources")
        handles = [str(handle) for handle in sources] if isinstance(sources, list) else []
        attached = attached_copies(models or [], handles)
        for line in forecast(bundle, handles):
            LOG.info(line)
        missing = [handle for handle in handles if handle not in {one.handle for one in attached}]
        if missing:
            LOG.info(f"not here: {', '.join(missing)} (--model DIR attaches a copy)")
        code_file = folder / str(content["code_file"])
        outcomes = run(bundle, tests, code_file, models=attached, shorten=shorten)
    failed = sum(bool(outcome.problem) for outcome in outcomes)
    LOG.info(
        f"{failed} of {len(outcomes)} runs failed" if failed else f"all {len(outcomes)} runs left valid predictions"
    )
    return not failed


def _kernel(metadata: Path, *, show: bool) -> str:
    from submission.publish.client import configured_user
    from submission.publish.metadata import check_metadata, raise_problems, read_object, with_owner

    content = with_owner(read_object(metadata), "OWNER" if show else configured_user())
    raise_problems(
        metadata, [problem for problem in check_metadata(content, metadata.parent) if problem.startswith("id ")]
    )
    return str(content["id"])


def _folder_of(metadata: Path, name: str) -> Path:
    from submission.errors import UserError

    if metadata.name != name:
        raise UserError(f"--metadata {metadata}: the file must be called {name}")
    return metadata.parent
