"""What is taken out of everything that leaves for a tracker: secrets always, names by option."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loaders.texts import misfit, read_json
from loaders.whole import write_text

SECRET = re.compile(r"api_?key|token|secret|passw|credential|private_?key", re.IGNORECASE)
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
REDACTED = "[redacted]"
KEY_BYTES = 32
# Options whose paths may name a person, as file names do.
PLACES = {
    *("root", "cache_dir", "out_dir", "mask"),
    *("init_from", "checkpoint", "vae", "latents", "condition"),
}


def redact(value: Any, name: str = "") -> Any:
    """The same configuration as plain data, with everything that looks like a secret blanked.

    Blanked are texts under a name like `api_key` or `token`, values of such variables of the
    environment wherever they occur, and logins inside URLs.
    """
    if isinstance(value, Mapping):
        return {str(key): redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if isinstance(value, (int, float, bool, type(None))):
        return value
    text = str(value)
    if SECRET.search(name):
        return REDACTED
    for key, secret in os.environ.items():
        if SECRET.search(key) and len(secret) >= 8:
            text = text.replace(secret, REDACTED)
    return URL_LOGIN.sub(f"{REDACTED}@", text)


def without_places(config: Mapping[str, object]) -> dict[str, object]:
    """The same configuration with the paths of the data blanked."""
    return {
        key: without_places(value)
        if isinstance(value, Mapping)
        else (REDACTED if key in PLACES and value is not None else value)
        for key, value in config.items()
    }


class Aliases:
    """Names of cases for eyes elsewhere: a hash that only who holds the key can repeat.

    The key is random and the same for all runs of a user, so that a case has one name in all of
    them; without it nobody can try names until a hash fits. `cases.json` says which is which.

    Args:
        out_dir: Run folder, in which `cases.json` lies.
        cases: Ids that will be asked for, where they are known: several processes may then share
            the folder.
    """

    def __init__(self, out_dir: Path | str, cases: Iterable[str] = ()):
        self.path, self.key = Path(out_dir) / "cases.json", users_key()
        self.known: dict[str, str] = {}
        if self.path.is_file():
            known = read_json(self.path)
            if found := misfit(known, {str: str}):
                raise ValueError(f"{self.path}: damaged ({found}); restore it, or delete it")
            self.known = known
        self._note({self._hash(case): case for case in cases})

    def __call__(self, case: str) -> str:
        """Return the other name of a case, the same each time."""
        alias = self._hash(case)
        self._note({alias: case})
        return alias

    def _hash(self, case: str) -> str:
        return f"case-{hmac.new(self.key, case.encode(), hashlib.sha256).hexdigest()[:10]}"

    def _note(self, cases: dict[str, str]) -> None:
        if cases.keys() - self.known.keys():
            self.known |= cases
            write_text(self.path, json.dumps(self.known, indent=1, ensure_ascii=False) + "\n")


def users_key() -> bytes:
    """Return the key that makes hashes of this user's cases; made at the first call."""
    folder = Path(os.environ.get("VAE3D_CACHE") or "~/.cache/vae3d").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "case_key"
    if not path.is_file():
        mine = folder / f"case_key.{secrets.token_hex(4)}"
        try:
            with open(mine, "x", encoding="ascii", opener=_private) as file:
                file.write(secrets.token_hex(KEY_BYTES))
            with suppress(FileExistsError):  # of several processes the first one's counts, whole
                os.link(mine, path)
        finally:
            mine.unlink(missing_ok=True)
    key = path.read_bytes()
    if len(key) != 2 * KEY_BYTES:  # names could be found by trying
        raise ValueError(f"{path}: holds no key; delete it, cases then get other names")
    return key


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
