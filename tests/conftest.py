"""Fixtures for every test: seeds, one thread, no process group left; real volumes, a command."""

import itertools
import os
import signal
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before the first import of Triton, whose kernels then run here
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # also for fixtures of a module, which come before `clean_torch`

REAL_VOLUMES = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def clean_torch():
    """Same seed, float32, one thread for each test; no process group outlives its test."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    assert torch.get_default_dtype() == torch.float32
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="session")
def real_volumes() -> Path:
    """Folder with real scans (ixi_t1_2mm, mouse_ct, ct); they are not part of this repository."""
    if not REAL_VOLUMES.is_dir():
        pytest.skip(f"no real volumes at {REAL_VOLUMES}")
    return REAL_VOLUMES


@pytest.fixture
def vae3d(capfd):
    """Run a command in this process; return its exit code and what it wrote."""

    def run(*args) -> SimpleNamespace:
        from vae3d.cli import main

        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=caught.value.code, stdout=out, stderr=err)

    return run


@pytest.fixture
def signal_at(monkeypatch):
    """Let a function send this process a signal in one of its calls, before it does its work."""

    def hook(owner, name, call=1, number=signal.SIGTERM) -> None:
        real, calls = getattr(owner, name), itertools.count(1)

        def signalling(*args, **kwargs):
            if next(calls) == call:
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, signalling)

    return hook
