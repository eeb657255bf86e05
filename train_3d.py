"""Train a VAE on volumes, cut into patches or whole.

    python train_3d.py --config configs/train/demo.yaml --data.root DIR --out_dir runs/a
    torchrun --nproc_per_node=2 train_3d.py --config ... --data.root DIR --out_dir runs/a

The same command again resumes. Runs on CPU (gloo) and CUDA GPUs (nccl). From Python:

    from vae3d import train_3d
    train_3d("DIR", "runs/a", patching=None, max_steps=1000)  # whole volumes

Several nodes: the same `torchrun` line on each, with --nnodes, --node_rank and --rdzv_endpoint.
What happens, from top to bottom: vae3d/commands/train.py.
"""

if __name__ == "__main__":
    from vae3d.cli import run  # which hears signals while the libraries are imported

    run("train")
else:
    from vae3d.commands.train import train_3d

    __all__ = ["train_3d"]
