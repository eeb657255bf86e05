"""A model's recipe as plain data: which classes, with which arguments. Needs no torch.

`{"class_path": "vae3d.models.custom_vae.CustomVAE", "init_args": {...}}`, nested for sockets: the
arguments typed `Callable[..., Base]`. What a class may be is known by the base before its module is
imported; the same two keys at any other argument are plain data.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Self, get_type_hints

from vae3d.models.classes import buildable, import_class

# One argument in a docstring: its name, and its lines with the line break before them.
ARGUMENT = re.compile(r"(?=\n    (\w+): )(\n    \S.*(?:\n     +\S.*)*)")


class Described:
    """Base of objects that remember what they were built from; see `spec`."""

    # Arguments that say where initial weights come from, not what the object is.
    not_in_spec: tuple[str, ...] = ()
    __signature__: ClassVar[inspect.Signature]  # without `self`
    _arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = inspect.signature(cls.__init__)
        cls.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])
        cls.__doc__ = complete_doc(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember the arguments of `__init__`."""
        self = super().__new__(cls)
        # copy and pickle call this without arguments and restore the dictionary afterwards.
        self.__dict__["_arguments"] = cls.__signature__.bind_partial(*args, **kwargs).arguments
        return self

    @property
    def spec(self) -> dict[str, Any]:
        """What `build` needs to make this object again, as JSON-able data."""
        given = {k: v for k, v in self._arguments.items() if k not in self.not_in_spec}
        return describe(partial(type(self), **given))


def complete_doc(cls: type) -> str:
    """Docstring of a class with what its bases tell of arguments that it shares and does not tell.

    Args:
        cls: Its docstring may have `Args:` at the end, for what is its own.
    """
    doc = inspect.cleandoc(cls.__doc__ or "")
    told = {name for name, _ in ARGUMENT.findall(doc)}
    for base in cls.__mro__[1:]:
        for name, lines in ARGUMENT.findall(inspect.cleandoc(base.__doc__ or "")):
            if name in inspect.signature(cls).parameters and name not in told:
                doc += ("" if told else "\n\nArgs:") + lines
                told.add(name)
    return doc


def describe(factory: Any) -> Any:
    """Turn a class, or a partial of one, into JSON-able data with every default spelled out.

    Args:
        factory: A class, a `functools.partial` of a class, or a plain value.

    Returns:
        `{"class_path": ..., "init_args": {...}}`; plain values come back as they are.
    """
    if isinstance(factory, partial) and isinstance(factory.func, type):
        given = inspect.signature(factory.func).bind_partial(*factory.args, **factory.keywords)
        return _describe_class(factory.func, given.arguments)
    if inspect.isclass(factory):
        return _describe_class(factory, {})
    if isinstance(factory, dict):
        return {key: describe(value) for key, value in factory.items()}
    if isinstance(factory, (list, tuple)):
        return [describe(value) for value in factory]
    if factory is None or isinstance(factory, (str, int, float, bool)):
        return factory
    raise ValueError(
        f"{factory!r} cannot be saved with the model; pass a class, a partial of a class or a"
        " plain value"
    )


def _describe_class(cls: Callable[..., object], given: dict[str, Any]) -> dict[str, Any]:
    """Name of the class and its arguments, defaults included so that later versions agree."""
    parameters = inspect.signature(cls).parameters.values()
    args = {p.name: p.default for p in parameters if p.default is not p.empty} | given
    path = f"{cls.__module__}.{cls.__qualname__}"
    return {"class_path": path, "init_args": {name: describe(v) for name, v in args.items()}}


def build(spec: dict[str, Any], trust: Sequence[str] = ()) -> Any:
    """Build the object that `spec` describes; sockets inside become factories.

    Args:
        spec: What `describe` returned.
        trust: Prefixes of modules beside `vae3d` that may be imported, such as `my_lab`.
    """
    try:
        make = factory(spec, trust, (Described,))
    except RecursionError as error:
        raise ValueError("the model's recipe is nested too deeply; is it damaged?") from error
    return make()


def factory(
    spec: Any, trust: Sequence[str] = (), bases: tuple[type, ...] = (object,)
) -> Callable[..., Any]:
    """Turn a description back into a partial of its class.

    Args:
        spec: What `describe` returned.
        trust: Prefixes of modules beside `vae3d` that may be imported.
        bases: What the class must derive from, one of them.
    """
    if not _is_spec(spec):
        raise ValueError("the model's recipe is damaged: no class_path and init_args in a part")
    cls = _import_class(spec["class_path"], trust, bases)
    args = spec["init_args"]
    sockets = _sockets(cls) if any(map(_holds_spec, args.values())) else {}
    return partial(cls, **{k: _revive(v, trust, sockets.get(k, ())) for k, v in args.items()})


def _is_spec(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"class_path", "init_args"}:
        return False
    return isinstance(value["init_args"], dict)


def _holds_spec(value: Any) -> bool:
    return any(map(_holds_spec, value)) if isinstance(value, (list, tuple)) else _is_spec(value)


def _sockets(cls: type) -> dict[str, tuple[type, ...]]:
    """Bases of what each socket of a class takes; where there is no socket, a recipe is data."""
    try:
        hints = get_type_hints(inspect.getattr_static(cls, "__init__"))
    except (NameError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the types of the arguments of {cls.__module__}.{cls.__qualname__}: {error}"
        ) from error
    return {name: tuple(buildable(hint)) for name, hint in hints.items()}


def _revive(value: Any, trust: Sequence[str], bases: tuple[type, ...]) -> Any:
    if bases and _is_spec(value):
        return factory(value, trust, bases)
    if isinstance(value, (list, tuple)):
        return tuple(_revive(v, trust, bases) for v in value)
    return value


def _import_class(path: str, trust: Sequence[str], bases: tuple[type, ...]) -> type:
    """Import `module.Class`, if its module is ours or trusted by name and it is of a base."""
    module = str(path).rpartition(".")[0]
    if not any(module == p or module.startswith(f"{p}.") for p in ("vae3d", *trust)):
        prefix = module.split(".")[0]
        raise ValueError(
            f"the model uses {path}, which is not part of vae3d; if you trust that code, allow it"
            f" with --trust {prefix}"
        )
    try:
        return import_class(path, bases)
    except ImportError as error:
        what = " or ".join(sorted(base.__name__ for base in bases))
        refused = f"the model uses {path}, which cannot be imported as a class of {what}"
        raise ValueError(f"{refused}: {error}") from error
