"""Evaluate a trained model: metrics, reconstructions, pictures and a report per volume.

    python evaluate.py --checkpoint runs/a --data.root DIR --mode patch --out_dir out
    torchrun --nproc_per_node=4 evaluate.py --checkpoint runs/a --data.root DIR --out_dir out

The same command again continues: finished volumes are kept. Runs on CPU and GPU, by one process or
by many under torchrun (volumes are shared out; the numbers are the same). From Python:

    from vae3d import evaluate
    evaluate("runs/a", "DIR", "out", mode="exact")

What happens, from top to bottom: vae3d/commands/evaluate.py.
"""

if __name__ == "__main__":
    from vae3d.cli import run  # which hears signals while the libraries are imported

    run("evaluate")
else:
    from vae3d.commands.evaluate import EvaluationData, evaluate

    __all__ = ["EvaluationData", "evaluate"]
