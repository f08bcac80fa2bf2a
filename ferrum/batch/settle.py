"""What a job does with its rows: what is given, and where a job is resumed what it began with."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ferrum.batch.rows import Asked
from ferrum.errors import OptionError
from ferrum.options import settings_of
from ferrum.sampling import SamplingParams

FORMATS = ("ferrum", "openai")


@dataclass(frozen=True)
class Given:
    """What a caller gives of `Asked`; None, and a field of params that is not there, stands for what is not given."""

    params: Mapping[str, Any]
    format: str | None = None
    chat: bool | None = None
    system: str | None = None
    template_options: Mapping[str, Any] | None = None
    prompt_field: str | None = None
    template: str | None = None

    @classmethod
    def of(cls, params: SamplingParams | Mapping[str, Any] | None, **given: Any) -> Given:
        """Raises OptionError and TypeError for what cannot be."""
        if isinstance(params, SamplingParams):
            params = {name: getattr(params, name) for name in settings_of(SamplingParams)}
            if params["seed"] is None:
                del params["seed"]
        elif params is not None and not isinstance(params, Mapping):
            raise TypeError(f"params is {type(params).__name__}: give SamplingParams(...), or a dict of its fields.")
        params = dict(params or {})
        SamplingParams(**params)
        self = cls(params, **given)
        if self.format is not None and self.format not in FORMATS:
            raise OptionError(f"format is {self.format!r}: expected {' or '.join(FORMATS)}.")
        if self.prompt_field is not None and self.template is not None:
            raise OptionError("A template makes the prompt of all fields of a row, prompt_field takes one: give one of them.")
        for name in ("system", "template_options"):
            if getattr(self, name) and not self.chat:
                raise OptionError(f"{name} goes with chat: without it a prompt is continued as it is.")
        return self

    def manifest(self) -> dict[str, Any]:
        """What is given, as a manifest has it."""
        given = {name: value for name, value in asdict(self).items() if value is not None and name != "params"}
        params = plain_params(SamplingParams(**self.params))
        given["params"] = {name: params[name] for name in self.params if name != "seed"}
        if self.params.get("seed") is not None:
            given["seed"] = self.params["seed"]
        return given


def settled(given: Given) -> Asked:
    """What a new job does; without a seed it draws one."""
    params = SamplingParams(**{name: value for name, value in given.params.items() if name != "seed"})
    seed = given.params.get("seed")
    return Asked(params, secrets.randbits(32) if seed is None else seed, given.format or "ferrum", bool(given.chat), given.system,
                 given.template_options, given.prompt_field, given.template)


def plain_params(params: SamplingParams) -> dict[str, Any]:
    """Params as JSON has them, without the seed."""
    values = json.loads(json.dumps(asdict(params)))
    del values["seed"]
    return values


def key_job(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What of a job its rows' keys are made of: all that changes the results but the seed, which may have been drawn."""
    names = ("options", "params", "format", "chat", "system", "template_options", "prompt_field", "template")
    return {"model": manifest["model"]["fingerprint"], **{name: manifest[name] for name in names}}


def manifest_of(asked: Asked) -> dict[str, Any]:
    return {**asdict(asked), "params": plain_params(asked.params)}


def asked_of(manifest: Mapping[str, Any]) -> Asked:
    """What the job of a manifest does."""
    params = dict(manifest["params"])
    params["logit_bias"] = {int(id): value for id, value in params["logit_bias"].items()}
    rest = {name: manifest[name] for name in ("seed", "format", "chat", "system", "template_options", "prompt_field", "template")}
    return Asked(SamplingParams(**params), **rest)
