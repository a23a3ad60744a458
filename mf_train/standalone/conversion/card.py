"""README.md of a standalone model: the card that the Hugging Face hub shows, with its metadata in front.

The metadata's keys are the hub's (https://huggingface.co/docs/hub/model-cards). They are written here and not by
`huggingface_hub`, whose versions may write them otherwise: `convert --check` compares bytes.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from mf_train.checkpoint.layout import AVERAGE
from mf_train.config import Config
from mf_train.config.groups import group_rules, groups_of
from mf_train.config.phases import Phase
from mf_train.config.sections import SourceConfig
from mf_train.errors import UserError
from mf_train.model.counts import count_parameters
from mf_train.standalone.exported.names import INT8

LICENSE = "license"  # a key of the certificate, where one was given
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_WILDCARDS = re.compile(r"[*?\[]")
_TASK = "text-generation"


def check_license(name: str) -> None:
    """Raises UserError for what cannot be a licence's identifier on the hub."""
    if not _LICENSE.fullmatch(name):
        raise UserError(
            f"--license is {name!r}: give the hub's identifier in small letters, such as apache-2.0, mit, "
            "cc-by-4.0 or other"
        )


def model_card(phases: Sequence[Phase], certificate: Mapping[str, Any]) -> bytes:
    """README.md, from the run's phases up to the checkpoint and the certificate (`certificate_tree`'s and LICENSE; its
    hashes are not read).

    Raises KeyError, TypeError, ValueError or AttributeError for a certificate that lacks figures.
    """
    import jinja2

    config = phases[-1].config
    weights, shares = certificate["dtype"], certificate["probe"]["changed_codes"]
    if weights == INT8:
        weights = "int8 in tables and LM head, with a float32 scale for each row, and bfloat16 elsewhere"
    average = certificate["source"].get("weights") == AVERAGE
    if average:
        weights += f", the exponential average of the run's (decay {config.training.average_decay:g})"
    environment = jinja2.Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    try:
        card = template.render(
            **vars(config),
            **{part: certificate[part] for part in ("source", "probe", "replay")},
            license=certificate.get(LICENSE),
            name=_name(config),
            data_lists=list(_data_lists(phases)),
            counts=count_parameters(config.model),
            settings={key: value for key, value in asdict(config.model).items() if value is not None},
            weights=weights,
            rates=_rates(config),
            before="checkpoint's average" if average else "trainer",
            worst=max(shares, key=lambda name: shares[name], default=None),
        )
    except jinja2.UndefinedError as error:
        raise KeyError(str(error)) from None
    metadata = yaml.safe_dump(_metadata(phases, certificate), sort_keys=False, allow_unicode=True)
    return f"---\n{metadata}---\n{card}".encode()


def shown_source(source: SourceConfig) -> str:
    """A source's name for the public: what says nothing of the machine that it was read on.

    Of an absolute path that is its last part, with wildcards also the folder that they are in, but for one that is
    called as its user is; a URL goes without user, password and query, which may be a key to it.
    """
    if source.hub:
        return source.hub
    path = str(source.path)
    scheme, is_url, rest = path.partition("://")
    if not is_url or scheme in ("file", "local"):
        return _shown_path(rest if is_url else path)
    host, slash, name = rest.partition("/")
    if scheme in ("http", "https"):
        name = re.split("[?#]", name)[0]
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{name}"


def _shown_path(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not path.startswith("/") and ".." not in parts:
        return path
    if parts[:1] == ("/",):
        parts = parts[1:]
    if parts[:1] in (("home",), ("Users",)):
        parts = parts[2:] or ("*",)
    first = next((at for at, part in enumerate(parts) if _WILDCARDS.search(part)), len(parts))
    return "/".join(part for part in parts[max(0, first - 1) :] if part != "..")


def _name(config: Config) -> str:
    model = config.model
    if model.layer_kinds == {"memory"} and not model.residual_rank and not model.rotation:
        return "MemoryFormer"
    if "memory" in model.layer_kinds:
        return f"MemoryFormer with other layers ({model.description})"
    others = {"low_rank": "layers of low rank", "product_key": "product-key memories"}
    found = [words for kind, words in others.items() if kind in model.layer_kinds]
    return "Dense peer of a MemoryFormer" + (f" with {' and '.join(found)}" if found else "")


def _rates(config: Config) -> dict[str, float]:
    """The tables' learning rate, and those of groups that have an unusual one, as multiples of the whole rate."""
    rules = group_rules(config.optimizer, config.model.hidden_size)
    usual = dict.fromkeys(rules, 1.0) | {"ffn_tables": rules["tables"].multiplier}
    others = [group for group in groups_of(config.model) if group != "tables"]
    return {"tables": rules["tables"].multiplier} | {
        group: rules[group].multiplier for group in others if rules[group].multiplier != usual[group]
    }


def _data_lists(phases: Sequence[Phase]) -> Iterator[tuple[str, list[str]]]:
    """Titles, and a line for each source."""
    before: tuple[SourceConfig, ...] = ()
    for phase in phases:
        sources = phase.config.data.train
        if sources != before and sources:
            since = f" from step {phase.first:,} on" if phase.first > 1 else ""
            yield f"Trained on{since}", list(map(_describe, sources))
        before = sources
    if validation := phases[-1].config.data.validation:
        yield "Validated on", list(map(_describe, validation))


def _describe(source: SourceConfig) -> str:
    shown = f"`{shown_source(source)}`"
    if source.hub:
        shown = f"[{source.hub}](https://huggingface.co/datasets/{source.hub})"
        shown += f", configuration `{source.hub_config}`" if source.hub_config else ""
        shown += f", split `{source.split}`"
    return f"{shown}, weight {source.weight:g}"


def _metadata(phases: Sequence[Phase], certificate: Mapping[str, Any]) -> dict[str, Any]:
    """The hub's keys; those that nothing is known of are left out."""
    license_name = certificate.get(LICENSE)
    hub = [source.hub for phase in phases for source in phase.config.data.train if source.hub]
    results = list(_results(phases[-1].config, certificate["source"]))
    return {
        **({"license": license_name} if license_name else {}),
        "library_name": "transformers",
        "pipeline_tag": _TASK,
        "tags": ["memoryformer"],
        **({"datasets": list(dict.fromkeys(hub))} if hub else {}),
        **({"model-index": [{"name": _name(phases[-1].config), "results": results}]} if results else {}),
    }


def _results(config: Config, origin: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the run measured, as the hub's model-index has it: a result for each validation set and task."""
    metrics = origin["metrics"]
    step = metrics.get("validation_step", origin["step"])
    sets = {source.name or str(index): source for index, source in enumerate(config.data.validation)}
    found = metrics.get("validation") or {}
    if not found and "validation_loss" in metrics:
        found = {"validation": {"loss": metrics["validation_loss"]}}
    for name, values in found.items():
        source = sets.get(name)
        # a set without a name is known by its source
        title = shown_source(source) if source is not None and not source.name else name
        dataset = {"name": title, "type": (source.hub if source is not None else None) or "text"}
        yield from _result(dataset, values, f"in validation after step {step}")
    for task, values in (metrics.get("evaluate") or {}).items():
        dataset = {"name": task, "type": task}
        yield from _result(dataset, values, f"in training after step {metrics['evaluate_step']}")


def _result(dataset: dict[str, str], values: Mapping[str, Any], when: str) -> Iterator[dict[str, Any]]:
    named = [
        {"type": name, "value": value, "name": f"{name.replace('_', ' ')} {when}"}
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    ]
    if named:
        yield {"task": {"type": _TASK}, "dataset": dataset, "metrics": named}
