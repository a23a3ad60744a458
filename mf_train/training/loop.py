"""The steps of one phase of a run, and everything that happens between them."""

import math
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from mf_train.checkpoint.fence import Fence
from mf_train.checkpoint.load import load_checkpoint
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.save import Extras, Saver
from mf_train.config import Config
from mf_train.config.phases import phase_at
from mf_train.config.schedule import Rewarm, rate_of
from mf_train.errors import PeerError, TrainingError
from mf_train.exit_status import DONE, FAILED, STOPPED
from mf_train.model.attention.performer import PerformerAttention
from mf_train.parallel.agreement import any_rank, run_on_all, run_on_first
from mf_train.parallel.engine import Engine
from mf_train.parallel.exchange import Exchange
from mf_train.parallel.groups import Groups
from mf_train.parallel.recompute import recompute_blocks
from mf_train.parallel.tensor import build_model
from mf_train.parallel.watch import Watch
from mf_train.planning.devices import find_peak
from mf_train.planning.work import step_efficiency, step_tokens
from mf_train.training.bad_steps import Bad, BadSteps
from mf_train.training.batches import Batch, SharedBatches
from mf_train.training.evaluate import LiveTasks
from mf_train.training.folder import (
    check_same_run,
    describe_changes,
    describe_phase,
    find_rewarm,
    record_config,
    resolved_yaml,
)
from mf_train.training.garbage import GarbageCollection
from mf_train.training.inputs import PhaseInputs
from mf_train.training.metrics import Records, process_peak
from mf_train.training.probe import run_probe
from mf_train.training.ranks import RankTimes
from mf_train.training.stopping import StopRequest, find_deadline
from mf_train.training.summary import skipped_documents, summary
from mf_train.training.telemetry import TableTelemetry
from mf_train.training.validate import validation_loss, validation_metrics
from mf_train.training.warm_up import compile_kernels

if TYPE_CHECKING:
    from mf_train.training.profile import Part, Profile


@dataclass(frozen=True)
class Shared:
    """What the phases of a run have in common."""

    config: Config  # the run's, with its phases
    groups: Groups
    device: torch.device
    tasks: LiveTasks | None
    stop: StopRequest
    watch: Watch
    records: Records


def read_state(
    config: Config, opened: Mapping[str, PhaseInputs], rank: int, checkpoint: CheckpointReader
) -> dict[str, Any]:
    """A checkpoint's state, to which the stream of the next step's phase is set.

    Raises UserError, on rank 0 also where it is of another run.
    """
    step = checkpoint.manifest.step
    phase = phase_at(config, step + 1)
    inputs = opened[phase.name].inputs
    if rank == 0:
        check_same_run(config, inputs.tokenizer, checkpoint)
    state = checkpoint.state()
    if rank == 0:
        state["rewarm"] = find_rewarm(config, checkpoint)
    if inputs.stream is not None and state["stream"] is not None:
        if step + 1 == phase.first > 1:
            inputs.stream.follow(state["stream"])
        else:
            inputs.stream.load_state_dict(state["stream"])
    return state


class PhaseRun:
    """A run in one phase: its state and its loop. `continued`: these processes have trained the phase before."""

    def __init__(
        self,
        shared: Shared,
        opened: Mapping[str, PhaseInputs],
        fence: Fence,
        checkpoint: CheckpointReader | None,
        *,
        continued: bool,
    ) -> None:
        self.whole = shared.config
        self.groups = groups = shared.groups
        self.degrees = groups.degrees
        self.device = device = shared.device
        self.tasks = shared.tasks
        self.stop = stop = shared.stop
        self.watch = watch = shared.watch
        self.records = shared.records
        self.fence = fence
        self.continued = continued
        state: dict[str, Any] = {}
        if checkpoint is not None:
            state = run_on_all(lambda: read_state(self.whole, opened, self.degrees.rank, checkpoint), device)
        self.phase = phase_at(self.whole, state.get("step", 0) + 1)
        self.config = config = self.phase.config
        self.inputs, self.validation = inputs, _ = opened[self.phase.name]
        self.probed = next(iter(self.validation.values()), None)
        self.rewarm: Rewarm | None = run_on_first(lambda: state.get("rewarm"), device)
        self.step: int = state.get("step", 0)
        self.tokens: int = state.get("tokens", 0)
        self.skipped: int = state.get("skipped_steps", 0)
        # what the steps of another phase are like says nothing of those of this one
        begins = self.step + 1 == self.phase.first
        self.bad_steps = BadSteps(config, {} if begins else state.get("bad_steps", {}))
        self.progress: dict[str, Any] = state.get("metrics", {})
        self.started_at = self.step
        self.batches = SharedBatches(
            inputs.stream,
            config,
            groups,
            device,
            first=self.phase.first,
            stop=self._should_stop,
            before_failing=lambda: self.saver.finish(),  # of an earlier step
            entering=watch.entering,
        )
        watch.entering("building the model")
        self.exchange = Exchange(groups.tensor) if self.degrees.tensor > 1 else None
        end_of_text = inputs.tokenizer.end_of_text_id if config.data.document_attention else None
        model = build_model(config.model, self.exchange, config.training.seed, device)
        if config.training.recompute == "block":
            recompute_blocks(model, self.exchange)
        self.engine = Engine(model, config, groups, device, end_of_text)
        watch.entering("compiling kernels")
        compile_kernels(self.engine, config, stop.requested, watch.still_alive)
        self.peak = find_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.telemetry = TableTelemetry(self.engine, self.exchange, self.probed, config.logging)
        self.saver = Saver(
            self.engine,
            fence,
            config.checkpoint,
            last=checkpoint.checkpoint if checkpoint is not None else None,
            step=self.step,
            seconds=self.progress.get("checkpoint_seconds", 0.0),
            entering=watch.entering,
            still_alive=watch.still_alive,
        )
        self._draw_features(self.step)
        if checkpoint is not None:
            watch.entering(f"restoring {checkpoint.checkpoint.name}")
            load_checkpoint(self.engine, checkpoint, watch.still_alive)
            run_on_all(partial(self.telemetry.resume, checkpoint), device)
            checkpoint.close()  # `checkpoint.keep` will delete it
        beside = config.checkpoint.interval and config.checkpoint.asynchronous
        self.deadline = find_deadline(os.environ, saves=2 if beside else 1)
        self.ranks = RankTimes(config.logging.ranks_interval, device)
        self.profile: Profile | None = None
        self.garbage = GarbageCollection(config.training.gc_interval)

    def run(self) -> int:
        """To the phase's last step, or until a signal; returns the exit status."""
        config = self.config
        run_on_all(self._open_folder, self.device)
        self._open_profile()
        self.garbage.start()
        while self.step < self.phase.last:
            if self.profile is not None:
                self.profile.turn(self.step + 1)
            started = time.perf_counter()
            self.ranks.begin()
            batch = self.batches.next(self.step + 1)
            if batch is None:
                if self.step > self.saver.step:
                    self._save(last=True)
                self.saver.finish()
                return self._stopped()
            self.watch.entering(f"training step {self.step + 1}")
            metrics = self._train_step(batch)
            self._finish_metrics(metrics, time.perf_counter() - started)
            self._compare_ranks(metrics)
            last = self.step == self.phase.last
            if self._due(config.training.validation_interval, last) and self.validation:
                metrics |= self._validate()
                found = {key: metrics[key] for key in ("validation_loss", "validation")}
                self.progress |= found | {"validation_step": self.step}
            end = self.step == config.training.steps
            if self.tasks is not None and (end or self._due(config.training.evaluate_interval, end)):
                metrics |= self._evaluate(self.tasks)
                self.progress |= {"evaluate": metrics["evaluate"], "evaluate_step": self.step}
            if "skipped" not in metrics:
                self.progress |= {"loss": metrics["loss"]}
            self._report(metrics)
            self.saver.advance()
            self.deadline.note_step(time.perf_counter() - started)
            if self._due(config.checkpoint.interval, last) or last:
                self._save(last=last)
            self.garbage.after(self.step)
        if self.profile is not None:
            self.profile.turn(self.step + 1)
        if self.step < config.training.steps:
            # the next phase would ask after its first batch only
            (stop,) = any_rank([self._should_stop()], self.device)
            return self._stopped() if stop else DONE
        self.records.say(
            f"done: {self.step} steps, {self.tokens:,} tokens; last checkpoint {self.saver.last}"
        )
        return DONE

    def _stopped(self) -> int:
        self.records.say(f"stopped on request after step {self.step}; run the same command again to go on")
        return STOPPED

    def close(self) -> None:
        self.garbage.close()
        if self.profile is not None:
            self.profile.close()
        self.batches.close()

    # one step

    def _draw_features(self, step: int) -> None:
        """Give attention by random features those of a step."""
        if not self.config.model.attention_redraw:
            return
        seed = self.config.model.after(step).attention_seed
        for module in self.engine.model.modules():
            if isinstance(module, PerformerAttention):
                module.seed = seed

    def _train_step(self, batch: Batch) -> dict[str, Any]:
        config, step, digest = self.config, self.step + 1, batch.digest
        self._draw_features(step)
        sent = self.exchange.bytes_sent if self.exchange else 0
        trained = not self.bad_steps.is_listed(step)
        loss, gradient_norm = torch.full((2,), math.nan, device=self.device)
        if trained:
            loss = self._backward(batch)
            gradient_norm = self.engine.gradient_norm()
        if step < self.phase.last:
            self.batches.look_ahead(step + 1, self.records.failure)
        # the only wait for the device in a step: what comes after it goes on beside the update
        loss_sum, norm = self.batches.agree(loss.view(1), gradient_norm.view(1))
        mean = loss_sum / self.degrees.tensor  # every tensor-parallel rank has the loss
        self.watch.entering(f"training step {step}")
        rate = rate_of(self.phase, step, self.rewarm)
        bad = self.bad_steps.judge(step, mean, norm)  # on all ranks the same: they have the same numbers
        if bad is None:
            self.engine.update(rate)
        elif bad.ends:
            self._fail(bad, step, digest)
        elif trained:
            self.engine.drop()
        self.step = step
        local_tokens = batch.rows.shape[0] * config.model.sequence_length
        self.tokens += step_tokens(config)
        metrics: dict[str, Any] = {
            "step": step,
            **({"phase": self.phase.name} if self.whole.phases else {}),
            "tokens": self.tokens,
            "loss": mean if math.isfinite(mean) else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "learning_rate": rate,
            "batch_digest": digest,
            "tensor_parallel_bytes_per_token": (self.exchange.bytes_sent - sent) / local_tokens
            if self.exchange
            else 0,
        }
        if bad is not None:
            self.skipped += 1
            metrics |= {"skipped": bad.reason, "skipped_steps": self.skipped}
        waited = {"data_wait_seconds": batch.wait_seconds, "epochs": batch.epochs}
        return metrics | self.telemetry.report(step) | waited

    def _backward(self, batch: Batch) -> Tensor:
        """The step's backward passes; this rank's share of the batch's mean loss, float64 []."""
        micro_batches = batch.rows.tensor_split(self.engine.micro_batches)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, rows in enumerate(micro_batches):
            share = rows.shape[0] / self.config.training.global_batch_size
            # a rank with a row less than others may have none left for the last micro-batch, in which it takes part
            counted = self.telemetry.counting() if share else nullcontext()
            rows = rows if share else batch.rows[:1]
            with counted:
                loss += self.engine.backward(
                    rows[:, :-1], rows[:, 1:], share=share, last=index == len(micro_batches) - 1
                )
            self.watch.still_alive()
        return loss

    def _validate(self) -> dict[str, Any]:
        losses, size = {}, self.config.training.micro_batch_size
        for name, blocks in self.validation.items():
            self.watch.entering(f"validating on {name} after step {self.step}")
            losses[name] = validation_loss(self.engine, blocks, size, self.watch.still_alive)
        return validation_metrics(
            losses, self.validation, [each.weight for each in self.config.data.validation]
        )

    def _evaluate(self, tasks: LiveTasks) -> dict[str, Any]:
        self.watch.entering(f"evaluating tasks after step {self.step}")
        size = self.config.training.micro_batch_size
        return {"evaluate": tasks.evaluate(self.engine, size, self.watch.still_alive)}

    def _fail(self, bad: Bad, step: int, digest: str) -> NoReturn:
        """All ranks raise, and rank 0 says why."""
        self.saver.finish()  # of an earlier step
        if self.degrees.rank != 0:
            raise PeerError(FAILED)
        before = self.bad_steps.in_a_row - 1
        after = f" after {before} skipped in a row" if before else ""
        good = self.saver.last or "none"
        raise TrainingError(
            f"step {step}: {bad.reason} (batch {digest}){after}; last good checkpoint: {good}; resume from it with a "
            "lower optimizer.learning_rate, look at the batch with 'memoryformer data inspect', or leave it out with "
            "data.skip_steps or training.skip_nonfinite"
        )

    def _finish_metrics(self, metrics: dict[str, Any], seconds: float) -> None:
        metrics["step_seconds"] = seconds
        listed = self.bad_steps.is_listed(self.step)  # nothing was computed, so its time tells no speed
        metrics["tokens_per_second"] = 0.0 if listed else step_tokens(self.config) / seconds
        peak = None if listed else self.peak
        metrics |= step_efficiency(self.config, self.degrees.world_size, peak, seconds)
        if self.device.type == "cuda":
            metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        else:
            metrics["peak_memory_bytes"] = process_peak()

    def _compare_ranks(self, metrics: dict[str, Any]) -> None:
        found, line = self.ranks.end(self.step, metrics["data_wait_seconds"])
        metrics |= found
        if line:
            self.records.say(line)

    def _should_stop(self) -> bool:
        """Whether this rank was asked to stop, or, as rank 0, finds that the job's time limit is near."""
        if self.stop.requested() or self.degrees.rank != 0:
            return self.stop.requested()
        if warning := self.deadline.warning(self.saver.seconds):
            self.records.say(warning)
        return self.deadline.passed(self.saver.seconds)

    def _due(self, interval: int, last: bool) -> bool:
        return interval > 0 and (self.step % interval == 0 or last)

    # set-up, saving, showing

    def _open_profile(self) -> None:
        """Where steps are to be profiled; without, nothing of it is imported."""
        wanted = self.config.training.profile
        if wanted.steps and not (self.continued and wanted.start < self.phase.first):
            from mf_train.training.profile import Profile

            parts: list[Part] = [  # methods, and what the profile calls the time in them
                (self.batches, "read", "read batch"),
                (self.batches, "agree", "agree on batch"),
                (self.batches, "share", "share batch"),
                (self.telemetry, "report", "telemetry"),
                (self, "_validate", "validate"),
                (self, "_evaluate", "evaluate"),
                (self, "_report", "report"),
                (self, "_save", "save"),
                (self.saver, "advance", "save"),
            ]
            self.profile = Profile(
                self.config, self.engine, self.step, parts, self.records.line.say, self.watch.still_alive
            )

    def _open_folder(self) -> None:
        """On rank 0, which alone reads what the summary says of a checkpoint."""
        if self.degrees.rank != 0:
            return
        self.fence.check()  # a newer start's files are not this one's to replace
        lines = []
        if not self.continued:
            record_config(self.whole)
            self.records.open(self.step)
            lines += summary(self.config, self.degrees, self.device, self.inputs, self.validation, self.saver)
        lines += describe_phase(self.whole, self.saver.last)
        if self.saver.last is not None:
            lines += describe_changes(self.whole, self.saver.last)
        if lines:
            self.records.say("\n".join(lines))

    def _save(self, *, last: bool) -> None:
        """Save beside the steps, or wait for it if this is the `last` time."""
        self.saver.finish()
        # a run that continues from here needs this step's metrics
        run_on_all(self.records.check, self.device)
        self.watch.entering(f"starting to save step {self.step}")
        began = time.perf_counter()
        extras = self._extras()
        wait = last or not self.config.checkpoint.asynchronous
        self.saver.start(self.step, extras, wait=wait, began=began)

    def _extras(self) -> Extras | None:
        """The checkpoint's contents beside the tensors, on rank 0; None elsewhere. Collective."""
        stream = self.batches.state(self.step)
        probe = run_probe(self.engine, self.exchange, self.probed)
        self.telemetry.note_checkpoint(self.step, probe)
        if self.degrees.rank != 0:
            return None
        return Extras(
            state={
                "step": self.step,
                "tokens": self.tokens,
                "skipped_steps": self.skipped,
                "bad_steps": self.bad_steps.state(),
                "rewarm": self.rewarm,
                "device": self.device.type,
                # a copy: it is written while later steps change it
                "metrics": self.progress | {"checkpoint_seconds": self.saver.seconds},
                "stream": stream,
            },
            config_yaml=resolved_yaml(self.whole),
            tokenizer=self.inputs.tokenizer.files,
            probe=probe,
        )

    def _report(self, metrics: dict[str, Any]) -> None:
        if self.step == self.started_at + 1 and (skipped := skipped_documents(self.inputs)):
            metrics["skipped_documents"] = skipped
        if self.step == self.started_at + 1 and self.started_at and not self.continued:
            metrics["resumed_after"] = self.started_at
        self.records.write(metrics | self.saver.take_metrics())
