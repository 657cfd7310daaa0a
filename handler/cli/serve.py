"""Serves a model with TorchServe until Ctrl-C.

    vivit serve google/vivit-b-16x2-kinetics400 --labels kinetics400     a checkpoint on the Hugging Face hub
    vivit serve DIRECTORY                                                a checkpoint
    vivit serve model.mar                                                an archive of `vivit build`
    vivit serve                                                          the demo model

Builds the archive if it is missing or outdated, finds Java, configures TorchServe for this machine and waits until the
model is ready. Then it prints where the server listens and how to use it. The environment variable TS_CONFIG_FILE can
name a config.properties that replaces the package's.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from handler.assets import DEMO_CHECKPOINT, SERVER_CONFIG
from handler.cli.archives import Archive, build_if_outdated, read_archive
from handler.cli.build import add_build_arguments, check_url_part
from handler.cli.client import DEFAULT_MODEL, DEFAULT_URL
from handler.cli.command import CommandError, run_command
from handler.cli.java import find_java_home
from handler.cli.keys import find_key, state_directory
from handler.cli.properties import (
    PORT_KEYS,
    Properties,
    default_settings,
    on_free_ports,
    on_ports,
    read_models,
    read_properties,
)
from handler.cli.server import Server, exit_on_sigterm_or_sighup
from handler.threads import available_cores

DEMO = "demo"
DEFAULT_VERSION = "1.0"
HIGHEST_PORT = 65535
CGROUP_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
# Measured with the demo model: the libraries and decoder processes of a worker, without weights.
WORKER_BYTES = 10**9
# Memory per byte of the archive: the weights as read, as converted, and activations.
MEMORY_PER_ARCHIVE_BYTE = 3
TORCHSERVE_TOKEN_MINUTES = "60"  # its default
CPU_WORKERS = 2  # one decodes while the other computes
WORKERS_PER_GPU = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vivit serve ARGV` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vivit serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=DEMO,
        metavar="MODEL",
        help="checkpoint (directory or hub id), archive (.mar) or `demo` (default: demo)",
    )
    parser.add_argument("--name", help=f"name of the model in URLs (default: the archive's, or {DEFAULT_MODEL})")
    parser.add_argument("--version", help=f"version of the model (default: the archive's, or {DEFAULT_VERSION})")
    add_build_arguments(parser)
    parser.add_argument("--rebuild", action="store_true", help="build the archive even if it seems up to date")
    add_server_arguments(parser)
    parser.add_argument(
        "--print-java-home", action="store_true", help="print the home of the Java that TorchServe would use, and exit"
    )
    arguments = parser.parse_args(argv)
    if arguments.print_java_home:
        return run_command("serve", print_java_home)
    exit_on_sigterm_or_sighup()
    return run_command("serve", lambda: serve(arguments))


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `vivit serve` and `vivit demo` share."""
    parser.add_argument(
        "--port",
        type=_integer(0, HIGHEST_PORT - len(PORT_KEYS) + 1),
        help="REST port on the loopback interface; management, metrics and gRPC use the four ports above it; 0 chooses "
        "free ports (default: the addresses in config.properties)",
    )
    parser.add_argument(
        "--workers",
        type=_integer(1, 1024),
        metavar="N",
        help="worker processes (default: chosen by GPUs, cores and memory)",
    )
    parser.add_argument(
        "--enable-model-api", action="store_true", help="allow registering and removing models while the server runs"
    )
    parser.add_argument(
        "--exit-when-unhealthy",
        type=_integer(1, 86400),
        default=60,
        metavar="SECONDS",
        help="exit with status 1 when /ping has failed for this long, so that a process supervisor can restart the "
        "server (default: %(default)s)",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="directory for the keys, logs and configuration (default: ~/.local/state/vivit/NAME)",
    )
    parser.add_argument(
        "--model-store",
        type=Path,
        metavar="DIR",
        help="directory for an archive that is built (default: model_store in --directory)",
    )


def serve(arguments: argparse.Namespace) -> int:
    """Serves a checkpoint, an archive or the demo model until Ctrl-C."""
    if arguments.model.endswith(".mar"):
        archive = find_archive(arguments)
        directory = server_directory(arguments, name=archive.name)
    else:
        is_demo = arguments.model == DEMO
        name = arguments.name or DEFAULT_MODEL
        directory = server_directory(arguments, name=DEMO if is_demo else name)
        archive = build_if_outdated(
            checkpoint=str(DEMO_CHECKPOINT) if is_demo else arguments.model,
            name=name,
            version=arguments.version or DEFAULT_VERSION,
            model_store=arguments.model_store or directory / "model_store",
            rebuild=arguments.rebuild,
            config=arguments.config,
            labels=arguments.labels,
            revision=arguments.revision,
        )
    with running(archive, directory=directory, arguments=arguments) as server:
        print_usage(server, archive)
        wait_for_interrupt(server, max_unhealthy_s=arguments.exit_when_unhealthy)
    return 0


def find_archive(arguments: argparse.Namespace) -> Archive:
    """Reads the archive that is to be served.

    Raises:
        CommandError: there is no such archive, or an argument only applies to checkpoints.
    """
    archive = read_archive(Path(arguments.model), name=arguments.name)
    if arguments.version not in (None, archive.version):
        raise CommandError(f"{archive.path} has version {archive.version}, but --version is {arguments.version}")
    if arguments.labels or arguments.revision:
        raise CommandError("--labels and --revision apply to checkpoints: build the archive again to change them")
    check_url_part("--name", archive.name)
    return archive


def server_directory(arguments: argparse.Namespace, *, name: str) -> Path:
    """Returns the directory of a server: `--directory`, or one below the user's state directory."""
    check_url_part("--name", name)
    directory: Path = arguments.directory or state_directory() / name
    return directory


@contextlib.contextmanager
def running(archive: Archive, *, directory: Path, arguments: argparse.Namespace) -> Iterator[Server]:
    """Runs a server until the context ends; inside, the model is ready.

    Args:
        archive: of the model.
        directory: of the server.
        arguments: those of `add_server_arguments`.

    Raises:
        CommandError: the server cannot be started, or the model cannot be loaded.
    """
    properties = read_properties(Path(os.environ.get("TS_CONFIG_FILE", SERVER_CONFIG)))
    properties = configure(properties, archive, workers=arguments.workers)
    if arguments.enable_model_api:
        properties["enable_model_api"] = "true"
    if arguments.port == 0:
        properties = on_free_ports(properties)
    elif arguments.port is not None:
        properties = on_ports(properties, list(range(arguments.port, arguments.port + len(PORT_KEYS))))
    server = Server(config=properties, model_store=archive.path.parent, directory=directory)
    print(f"starting TorchServe (log: {server.log_file}) ...", file=sys.stderr, flush=True)
    with server:
        server.wait_until_ready(archive.name)
        yield server


def configure(properties: Mapping[str, str], archive: Archive, *, workers: int | None = None) -> Properties:
    """Returns the properties for serving one archive on this machine.

    Args:
        properties: of a config.properties file. Its settings for this name and version, if any, are kept.
        archive: to be served.
        workers: number of worker processes; None: chosen for this machine.
    """
    versions = read_models(properties).get(archive.name, {})
    settings = {**versions.get(archive.version, default_settings()), "defaultVersion": True}
    settings["marName"] = archive.path.name
    count = workers or min(settings.get("minWorkers", CPU_WORKERS), affordable_workers(archive))
    if workers is None and (gpus := count_gpus()):
        count = max(count, WORKERS_PER_GPU * gpus)
    settings.update(minWorkers=count, maxWorkers=max(count, settings.get("maxWorkers", count)))
    return {
        **properties,
        "load_models": archive.load_entry,
        "models": json.dumps({archive.name: {archive.version: settings}}),
    }


def affordable_workers(archive: Archive) -> int:
    """Returns how many workers this machine has cores and memory for, at least 1."""
    available_bytes = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # the file may be missing, or contain "max"
        available_bytes = min(available_bytes, int(CGROUP_MEMORY_LIMIT.read_text()))
    worker_bytes = WORKER_BYTES + MEMORY_PER_ARCHIVE_BYTE * archive.path.stat().st_size
    return max(1, min(available_cores(), available_bytes // worker_bytes))


def count_gpus() -> int:
    """Returns the number of NVIDIA GPUs; asks nvidia-smi, as TorchServe does."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def print_usage(server: Server, archive: Archive, *, sample: str = "YOUR_VIDEO.mp4") -> None:
    """Prints where the server listens, its key, how to classify a video and how to stop.

    Args:
        server: that runs.
        archive: that it serves.
        sample: the video in the `curl` line.
    """
    url = f"{server.inference_url}/predictions/{archive.name}"
    minutes = server.properties.get("token_expiration_min", TORCHSERVE_TOKEN_MINUTES)
    header = "".join(f" -H {shlex.quote(f'{key}: {value}')}" for key, value in server.headers("inference").items())
    print(
        f"""
{archive.name} {archive.version} is ready.

  REST   {url}
  gRPC   {server.grpc_inference}
  key    {server.token("inference") or "none required"}  (from {server.key_file}; expires after {minutes} minutes)
  log    {server.log_file}

Classify a video of your own, in another terminal:

  {classify_command(server, archive)} YOUR_VIDEO.mp4

or without this package:

  curl{header} -H 'X-Top-K: 3' -T {shlex.quote(sample)} {url}

Ctrl-C stops the server.""",
        flush=True,
    )


def classify_command(server: Server, archive: Archive) -> str:
    """Returns the `vivit classify` command for a server, with the flags that it needs."""
    command = [_program(), "classify"]
    if server.inference_url != DEFAULT_URL:
        command += ["--url", server.inference_url]
    if archive.name != DEFAULT_MODEL:
        command += ["--model", shlex.quote(archive.name)]
    if find_key("inference") != server.token("inference"):
        command.insert(0, f"VIVIT_KEY_FILE={shlex.quote(str(server.key_file))}")
    return " ".join(command)


def wait_for_interrupt(server: Server, *, max_unhealthy_s: float) -> None:
    """Waits for Ctrl-C.

    Raises:
        ServerError: TorchServe has exited by itself, or has been unhealthy for too long.
    """
    try:
        server.wait(max_unhealthy_s=max_unhealthy_s)
    except KeyboardInterrupt:
        print("\nstopping TorchServe ...", file=sys.stderr)


def print_java_home() -> int:
    """Prints the home of the Java that TorchServe would use."""
    print(find_java_home())
    return 0


def _program() -> str:
    """How a shell calls this installation: `vivit` if it is the one on the PATH."""
    program = Path(sys.executable).with_name("vivit")
    if shutil.which("vivit") == str(program):
        return "vivit"
    return shlex.quote(str(program)) if program.exists() else f"{shlex.quote(sys.executable)} -m handler.cli"


def _integer(minimum: int, maximum: int) -> Callable[[str], int]:
    """Returns a type for argparse: an integer in a range."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"must be an integer from {minimum} to {maximum}, got {text!r}")
        return int(text)

    return parse


if __name__ == "__main__":
    sys.exit(main())
