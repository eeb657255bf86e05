"""Whether a script can start processes where these run it from its first line again."""

from __future__ import annotations

import ast
import multiprocessing
import sys


def require_guard(way: str | None = None) -> None:
    """Refuse a script whose processes would start processes: it lacks its `__main__` guard.

    Args:
        way: How they are started; None for the way that Python takes.

    Raises:
        ValueError: The way of starting processes runs the script again (spawn, forkserver), and
            the line that is running now stands in no `if __name__ == "__main__":`.
    """
    way = way or multiprocessing.get_start_method(allow_none=True)  # without setting one
    way = way or multiprocessing.get_all_start_methods()[0]  # the first is the default
    main = sys.modules["__main__"]
    path, frame = getattr(main, "__file__", None), sys._getframe()
    while frame.f_back and not (
        frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"
    ):
        frame = frame.f_back
    if way == "fork" or path is None or frame.f_globals is not vars(main):
        return  # a notebook or another thread: nothing is run again, or nobody knows
    line = frame.f_lineno
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    if not any(
        isinstance(node, ast.If)
        and "__name__" in ast.unparse(node.test)
        and node.lineno <= line <= (node.end_lineno or line)
        for node in ast.walk(tree)
    ):
        raise ValueError(
            f"{path}, line {line}: augmentation starts processes, and by {way} each runs this "
            'script again: put what the script does under `if __name__ == "__main__":` '
            "(or threads=0)"
        )
