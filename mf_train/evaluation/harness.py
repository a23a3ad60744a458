"""lm-evaluation-harness: its tasks, their requests and their metrics. The only file that knows its API."""

import contextlib
import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mf_train.errors import UserError
from mf_train.text import did_you_mean

ANSWERED = ("loglikelihood", "multiple_choice")  # output types whose requests a model in training answers
_FEW_SHOT_SEED = 1234  # lm-eval's own


@dataclass(frozen=True)
class Keys:
    """How the user names what is given here, for errors."""

    tasks: str
    include_path: str


@dataclass(frozen=True)
class Request:
    """How likely is `continuation` after `context`? Token ids."""

    context: list[int]
    continuation: list[int]


def evaluate_folder(
    model: Path,
    tasks: Sequence[str],
    include_path: Path | None,
    keys: Keys,
    *,
    device: str,
    batch_size: int,
    limit: int | None,
    bootstrap_iterations: int,
) -> dict[str, Any]:
    """What lm-eval returns of a converted model, which its own `hf` model runs. Its progress goes to standard error.

    Raises UserError for an unknown task and where lm-eval is not installed.
    """
    manager = _task_manager(tasks, include_path, keys)
    import lm_eval

    with contextlib.redirect_stdout(sys.stderr):
        results: dict[str, Any] | None = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "trust_remote_code": True},
            tasks=list(tasks),
            device=device,
            batch_size=batch_size,
            limit=limit,
            bootstrap_iters=bootstrap_iterations,
            task_manager=manager,
            log_samples=True,
        )
    assert results is not None, "lm-eval returns results on rank 0, and there is one rank"
    return results


class AskedTasks:
    """Tasks whose requests somebody else answers: `requests`, once, and `metrics` of each set of answers to them.

    Texts become tokens as they do for a converted model: by lm-eval, with `encode`; an empty context is `end_of_text`.

    Raises UserError for an unknown task, one whose data cannot be loaded, one whose requests are of another kind than
    ANSWERED, and where lm-eval is not installed.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        include_path: Path | None,
        keys: Keys,
        limit: int | None,
        encode: Callable[[str], list[int]],
        end_of_text: int,
    ) -> None:
        manager = _task_manager(tasks, include_path, keys)
        self._limit = limit
        with _refused(tasks, keys), _quiet():
            self._loaded = manager.load(list(tasks))
        for name, task in self._loaded["tasks"].items():
            if task.OUTPUT_TYPE not in ANSWERED:
                raise UserError(
                    f"{keys.tasks} {name}: its requests are {task.OUTPUT_TYPE}, and a model in training answers "
                    f"{' and '.join(ANSWERED)}: leave it out, and run it on the converted model with 'memoryformer "
                    "evaluate --tasks'"
                )
            if task.get_config("num_fewshot") is None:  # as lm-eval's simple_evaluate sets both
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
        self.requests: list[Request] = []

        def record(requests: list[Request]) -> list[tuple[float, bool]]:
            self.requests = requests
            return [(0.0, False)] * len(requests)

        with _refused(tasks, keys):
            self._ask(_answering(encode, end_of_text, record))
        self._encode, self._end_of_text = encode, end_of_text

    def metrics(self, answers: Sequence[tuple[float, bool]]) -> dict[str, dict[str, float | None]]:
        """Of each task and group its metrics by name; None where one is not finite.

        An answer to each of `requests`, in their order: log-likelihood in nats, whether each token is the likeliest.
        """
        given = list(answers)
        results = self._ask(_answering(self._encode, self._end_of_text, lambda _: given))
        found = {**results["results"], **results.get("groups", {})}
        return {
            name: {
                metric: value if math.isfinite(value) else None
                for metric, (value, _) in sorted(metric_values(values).items())
                if isinstance(value, int | float)
            }
            for name, values in sorted(found.items())
        }

    def _ask(self, model: Any) -> dict[str, Any]:
        from lm_eval import evaluator

        with _quiet():
            results: dict[str, Any] = evaluator.evaluate(
                model, self._loaded, limit=self._limit, bootstrap_iters=0, log_samples=False
            )
        return results


def _answering(
    encode: Callable[[str], list[int]],
    end_of_text: int,
    answer: Callable[[list[Request]], list[tuple[float, bool]]],
) -> Any:
    """A model as lm-eval sees it whose requests go to `answer`, all at once."""
    from lm_eval.api.model import TemplateLM

    class Answering(TemplateLM):  # type: ignore[misc]
        eot_token_id = end_of_text

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return encode(string)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return answer([Request(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError

    return Answering()


def metric_values(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Value and standard error (None where lm-eval has none) of each metric; "acc,none" becomes "acc"."""
    found: dict[str, list[Any]] = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else key
            found[name] = [value, error if isinstance(error, float) else None]
    return found


def _task_manager(tasks: Sequence[str], include_path: Path | None, keys: Keys) -> Any:
    """lm-eval's TaskManager that knows all of `tasks`."""
    try:
        from lm_eval.models import huggingface  # noqa: F401 - its own extra is easily forgotten
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UserError(
            f"{keys.tasks} needs lm-evaluation-harness ({error}): pip install 'mf-train[evaluation]'"
        ) from None
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"{keys.include_path} {include_path}: no such folder")
    own = (
        None if include_path is None else TaskManager(include_path=str(include_path), include_defaults=False)
    )
    if own is not None and set(tasks) <= set(own.all_tasks):
        return own  # to read lm-eval's ten thousand task files takes longer than a small task
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            hint = did_you_mean(task, manager.all_tasks, "'lm_eval ls tasks' lists them")
            raise UserError(
                f"{keys.tasks} {task}: no such task; {hint} {keys.include_path} names a folder of task files"
            )
    return manager


@contextlib.contextmanager
def _refused(tasks: Sequence[str], keys: Keys) -> Iterator[None]:
    """Within it whatever lm-eval, datasets or a task's own code raises is a UserError."""
    try:
        yield
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{keys.tasks} {list(tasks)}: cannot be loaded ({words}): mend the task, or leave it out"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it nothing is shown: a run has a line of its own."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
