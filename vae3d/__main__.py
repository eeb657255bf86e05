"""`python -m vae3d COMMAND ...`, for where the command itself is not on the path."""

from vae3d.cli import main

if __name__ == "__main__":
    main()
