"""From a file's text to settings, or to an error that names file, line and field."""

import difflib
import hashlib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from appliance.config.policy import Policy
from appliance.config.policy_checks import find_first_mistake
from appliance.config.provider_settings import Provider
from appliance.config.settings import NodeConfig
from appliance.config.strict import StrictModel
from appliance.core import Target
from appliance.core.toml_positions import dotted, line_of
from appliance.errors import ConfigError

DEFAULT_POLICY_PATH = Path(__file__).with_name("policy.default.toml")

Document = TypeVar("Document", bound=StrictModel)


def load_config(path: Path | None) -> NodeConfig:
    """Read the node's configuration; None gives the defaults. Raises ConfigError."""
    return NodeConfig() if path is None else _validate(NodeConfig, _read(path), str(path))


def load_policy(path: Path | None, targets: Sequence[Target | str] | None = None) -> Policy:
    """Read a policy; None gives the one that comes with the appliance. Raises ConfigError.

    With `targets` (all there are; a plain name stands for an engine of this node) a route that names another one, or is
    bound to where none of them is, is an error too.
    """
    path = path or DEFAULT_POLICY_PATH
    return parse_policy(_read(path), str(path), targets)


def parse_policy(text: str, file: str, targets: Sequence[Target | str] | None = None) -> Policy:
    """As load_policy, from text; `file` is for messages."""
    policy = _validate(Policy, text, file)
    mistake = find_first_mistake(policy, targets)
    if mistake is not None:
        place = mistake.location
        raise ConfigError(mistake.message, file=file, line=line_of(text, place), field=dotted(place))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return policy.model_copy(update={"version": f"sha256:{digest}"})


def read_secret(provider: Provider) -> str | None:
    """The provider's API key, or None when it is configured to have none. Raises ConfigError when it is missing."""
    if provider.key_env:
        value = os.environ.get(provider.key_env, "").strip()
        if not value:
            raise ConfigError(
                f"the environment variable {provider.key_env} is empty: put provider {provider.name!r}'s key there",
                field=f"providers.{provider.name}.key_env",
            )
        return value
    if provider.key_file:
        path = Path(provider.key_file).expanduser()
        try:
            value = path.read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"cannot read the key of provider {provider.name!r} from {str(path)!r}: {error.strerror}",
                field=f"providers.{provider.name}.key_file",
            ) from error
        if not value:
            raise ConfigError(f"{str(path)!r} is empty", field=f"providers.{provider.name}.key_file")
        return value
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read it: {error.strerror}", file=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text (byte {error.start})", file=str(path)) from error


def _validate(model: type[Document], text: str, file: str) -> Document:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"at line (\d+)", str(error))
        raise ConfigError(f"is not TOML: {error}", file=file, line=int(found[1]) if found else None) from error
    try:
        return model.model_validate(_tuples(data))
    except ValidationError as error:
        first = error.errors()[0]
        location = first["loc"]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = _known_fields(model, location)
            near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.7)
            meant = f"did you mean {near[0]}? " if near else ""
            message = f"is not a known setting here; {meant}known are {', '.join(known)}"
        elif first["type"] != "value_error" and not isinstance(first["input"], dict | list | tuple):
            message = f"{message} (it is {first['input']!r})"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(
            message + more, file=file, line=line_of(text, location), field=dotted(location) or None
        ) from error


def _tuples(value: Any) -> Any:
    """TOML arrays become tuples, which is what strict frozen models hold."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _known_fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the table that holds the last part of `location`."""
    fields: Mapping[str, Any] = model.model_fields
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        inner = _models_in(fields[part].annotation) if part in fields else []
        if not inner:
            break
        fields = inner[0].model_fields
    return sorted(name for name in fields if name != "version")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]
