"""The command line of `train_3d.py` in a process of its own."""

import os
import resource
import signal
import sys

import torch
from troubles import Trouble, note_samples, obey_modes

import vae3d.losses.adversarial
import vae3d.training.trainer  # noqa: F401 - what a run imports late, imported once for all
from train_3d import train_3d
from vae3d.config import main


def train_command(
    argv: list[str],
    environ: dict[str, str],
    output: str,
    max_file_bytes: int = -1,
    troubles: list[Trouble] | None = None,
) -> None:
    """Run `train_3d.py argv` with its output in a file, and end this process with its code.

    With troubles, even an empty list of them, the samples of each step are told in the output.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    with open(output, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environ)
    torch.set_num_threads(1)
    if troubles is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's `&`
        obey_modes()
        note_samples()
        for trouble in troubles:
            trouble.arm()
    code = 1
    try:
        main(train_3d, argv)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
