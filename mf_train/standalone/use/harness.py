"""`memoryformer evaluate --tasks`: tasks of lm-evaluation-harness on a standalone model, with versions and hashes.

The model is run by lm-eval's own `hf` model, as the `lm_eval` command runs it; this file adds only what names the
model, the software and the questions that a score belongs to.
"""

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mf_train.errors import UserError
from mf_train.evaluation.harness import Keys, evaluate_folder, metric_values
from mf_train.files import write_whole
from mf_train.standalone.folder import CERTIFICATE, read_config

SOFTWARE = ("lm_eval", "transformers", "torch", "tokenizers", "datasets")
# Of the standard error of metrics that are no means, such as perplexity; lm-eval's own 100,000 take a minute.
_BOOTSTRAP = 1000


def evaluate_tasks(
    model: Path,
    tasks: Sequence[str],
    include_path: Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    output: Path | None = None,
) -> Iterator[str]:
    """Yield a line a metric of each task or group, and write everything to `output` as JSON.

    `include_path` is a folder of task files that come before lm-eval's own; `limit` takes only a task's first items.
    Raises UserError for a folder that is no model, an unknown task and where lm-eval is not installed.
    """
    for option, value in (("--batch-size", batch_size), ("--limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}: it must be at least 1")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output {output}: {output.parent} is no folder")
    read_config(model)
    results = evaluate_folder(
        model,
        tasks,
        include_path,
        Keys(tasks="--tasks", include_path="--include-path"),
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=batch_size,
        limit=limit,
        bootstrap_iterations=_BOOTSTRAP,
    )
    record: dict[str, Any] = {
        "model": _model_tree(model),
        "versions": {name: version(name) for name in SOFTWARE},
        "settings": {
            "batch_size": batch_size,
            "limit": limit,
            "device": results["config"]["device"],
            "dtype": str(results["config"].get("model_dtype", "")),
            "bootstrap_iterations": _BOOTSTRAP,
        },
        "tasks": {name: _task_tree(name, results) for name in sorted(results["samples"])},
        "groups": {name: metric_values(values) for name, values in results.get("groups", {}).items()},
    }
    if output is not None:
        write_whole(output, (json.dumps(record, indent=1) + "\n").encode(), secrets.token_hex(4))
    for name, metrics in [
        *record["groups"].items(),
        *((n, t["metrics"]) for n, t in record["tasks"].items()),
    ]:
        for metric, (value, error) in metrics.items():
            yield f"{name:24} {metric:16} {value:12.4f}" + ("" if error is None else f" +- {error:.4f}")
    for name, tree in record["tasks"].items():
        yield f"{name:24} {tree['items']} items, version {tree['version']}, requests {tree['requests_sha256'][:16]}"
    yield " ".join(f"{name} {number}" for name, number in record["versions"].items())


def _model_tree(model: Path) -> dict[str, str | None]:
    """The folder, and the SHA-256 of its certificate, which has one of every tensor and file."""
    certificate = model / CERTIFICATE
    digest = hashlib.sha256(certificate.read_bytes()).hexdigest() if certificate.is_file() else None
    return {"folder": str(model), "certificate_sha256": digest}


def _task_tree(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    source = results["configs"][name].get("metadata", {}).get("config_source")
    samples = sorted(results["samples"][name], key=lambda sample: (sample["doc_id"], sample["filter"]))
    asked = [[sample["arguments"], sample["target"], sample["doc_hash"]] for sample in samples]
    return {
        "version": results["versions"][name],
        "items": results["n-samples"][name]["effective"],
        "few_shot": results["n-shot"][name],
        "file_sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None,
        "requests_sha256": hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest(),
        "metrics": metric_values(results["results"][name]),
    }
