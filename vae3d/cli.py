"""The `vae3d` command: one sub-command per task, each the signature of one function."""

from __future__ import annotations

import sys
from importlib import import_module

from vae3d.stop import Stopped, listening, say

COMMANDS = {
    # command: (module.function of vae3d.commands, what it does)
    "demo-data": ("demo_data.demo_data", "write a small set of brain-like volumes"),
    "check-data": ("check_data.check_data", "list every broken file of a data set and why"),
    "prepare": ("prepare.prepare", "build the volume cache ahead of training"),
    "patches": ("patches.patches", "write a contact sheet of random training patches"),
    "plan": ("plan.plan", "propose a recipe for data, or tell what one costs"),
    "train": ("train.train_3d", "train a VAE"),
    "evaluate": ("evaluate.evaluate", "reconstruct volumes with a trained VAE and measure them"),
    "anomaly": ("anomaly.anomaly", "map what is unlike the healthy volumes of a training"),
    "report": ("report.report", "write one HTML page on one or several runs"),
    "convert": ("convert.convert", "bring weights in from other libraries, or out to them"),
    "export": ("export.export", "write encoder and decoder for torch.export and ONNX"),
    "encode": ("encode.encode", "write the latents of volumes"),
    "decode": ("decode.decode", "turn latents back into volumes"),
    "train-ldm": ("train_ldm.train_ldm", "train a latent diffusion model on encoded latents"),
    "sample": ("sample.sample", "draw new volumes"),
    "compare": ("compare.compare", "judge drawn volumes against real ones"),
}


def main(argv: list[str] | None = None) -> None:
    """Run `vae3d COMMAND ...`; `vae3d COMMAND --help` tells a command's options."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: vae3d COMMAND [options]      (vae3d COMMAND --help tells the options)\n")
        print("\n".join(f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items()))
        sys.exit(0)
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        print(f"error: no command {name!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    run(name, rest, prog=f"vae3d {name}")


def run(name: str, argv: list[str] | None = None, prog: str | None = None) -> None:
    """Run one command and exit with its code; the scripts do no more than this.

    Args:
        name: One of `COMMANDS`.
        argv: Its arguments; None for those of this process.
        prog: Name of the program in the help; None for that of the script.
    """
    try:
        with listening():  # the libraries take seconds to import, in which Ctrl-C may come
            from vae3d import config

            module, function = COMMANDS[name][0].split(".")
            command = getattr(import_module(f"vae3d.commands.{module}"), function)
            config.main(command, argv, prog)
    except Stopped as stopped:
        say(f"{stopped}: nothing was begun")
        sys.exit(stopped.code)
