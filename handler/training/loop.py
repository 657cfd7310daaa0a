"""The training loop: fit trains a model on clips, evaluates it after each epoch and keeps the best weights.

It is written by hand. accelerate or lightning would replace the thirty lines about autocast, gradient scaling and
DistributedDataParallel, and hide what this loop is exact about:

- Every random number derives from the seed and a position: the order of an epoch from (seed, epoch), a clip's
  augmentation from (seed, epoch, position in the epoch), dropout from (seed, step, rank). So the result does not
  depend on the timing of decoders, and a run that was killed continues with the same numbers from its last saved step.
- The clips of a step are the same for any number of processes and any size of micro-batches, and so is the loss: the
  mean over the clips of the step that could be decoded. Those that could not be decoded have the weight 0.

B  clips of a step      T  frames of a clip     h, w  height and width of the model's frames, in pixels
b  clips of a micro-batch of one process
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from handler.models.vivit import VivitForVideoClassification
from handler.processing.image_processor import VivitImageProcessor
from handler.training.augmentation import mix_pairs, smooth_targets
from handler.training.data import Clips
from handler.training.distributed import Group
from handler.training.evaluation import Evaluation, evaluate
from handler.training.examples import DROPOUT, Example, training_examples
from handler.training.forward import Answers, ClipModel, classify_clips
from handler.training.optimization import checkpoint_layers, learning_rate, make_optimizer
from handler.training.options import Recipe
from handler.training.state import Progress, load_state, save_checkpoint, save_state, write_log
from handler.validation import ConfigError

SAVE_INTERVAL_S = 600.0  # within an epoch; the state is also saved after each epoch


def fit(
    model: VivitForVideoClassification,
    processor: VivitImageProcessor,
    *,
    train: Clips,
    evaluation: Clips,
    out: Path,
    recipe: Recipe,
    group: Group,
    arguments: Mapping[str, Any],
    threads: int,
    resume: bool,
) -> Progress:
    """Trains a model and writes the best weights, the state and the log to `out`.

    Args:
        model: with its initial weights, float32; changed in place.
        processor: for clips of this model; its normalization is used, and it is saved beside the weights.
        train: clips to train on.
        evaluation: clips to evaluate on after each epoch; may be empty.
        out: folder for config.json, model.safetensors and preprocessor_config.json of the best epoch, skipped.csv, and
            training/ with the state and the log.
        recipe: see Recipe.
        group: the processes of this run.
        arguments: what must be the same when the run is resumed, in addition to the recipe.
        threads: calls of `train.load` and `evaluation.load` at the same time.
        resume: whether a run in `out` is continued, if there is one.

    Returns:
        The finished run.

    Raises:
        ConfigError: the recipe does not fit the processes, `out` has another run, or no clip could be made.
        KeyboardInterrupt: SIGINT or SIGTERM arrived. The state is saved.
    """
    progress, tensors = load_state(out, {**recipe.to_dict(), **arguments}, resume=resume)
    trainer = _Trainer(model, processor, recipe, group, train, evaluation, out, threads, progress)
    if tensors:
        trainer.load_tensors(tensors)
    with _StopSignal() as stop:
        trainer.run(stop)
    return progress


class _StopSignal:
    """Records SIGINT and SIGTERM in a `with` block. A second one has its usual effect."""

    def __enter__(self) -> _StopSignal:
        self.is_set = False
        self._former = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.is_set = True
        signal.signal(number, self._former[signal.Signals(number)])


class _Trainer:
    def __init__(
        self,
        model: VivitForVideoClassification,
        processor: VivitImageProcessor,
        recipe: Recipe,
        group: Group,
        train: Clips,
        evaluation: Clips,
        out: Path,
        threads: int,
        progress: Progress,
    ) -> None:
        self.recipe, self.group, self.progress, self.processor = recipe, group, progress, processor
        self.train, self.evaluation, self.out, self.threads = train, evaluation, out, threads
        if recipe.batch_size % group.size:
            raise ConfigError(f"batch_size {recipe.batch_size} cannot be divided among {group.size} processes")
        self.process_batch = recipe.batch_size // group.size
        self.micro_batch = min(recipe.micro_batch_size or self.process_batch, self.process_batch)
        if recipe.mixup and (self.process_batch % 2 or self.micro_batch % 2):
            raise ConfigError(f"mixup needs an even number of clips per process, got {self.process_batch}")
        self.steps_per_epoch = math.ceil(len(train.names) / recipe.batch_size)
        if recipe.freeze_backbone:
            model.vivit.requires_grad_(False)
        if recipe.checkpoint_activations:
            checkpoint_layers(model)
        self.model, self.clip_model = model, ClipModel(model, processor, group, precision=recipe.precision)
        self.optimizer = make_optimizer(model, recipe)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=self.clip_model.dtype is torch.float16)

    def load_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Continues with the weights and the optimizer of a saved state."""
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.scaler.load_state_dict(tensors["scaler"])

    def run(self, stop: _StopSignal) -> None:
        """Trains and evaluates the remaining epochs."""
        progress, size = self.progress, self.recipe.batch_size
        total = self.recipe.epochs * self.steps_per_epoch * size
        with tqdm(
            total=total,
            initial=progress.step * size,
            unit="video",
            disable=not self.group.is_main,
            mininterval=0.1 if sys.stderr.isatty() else 10,
        ) as bar:
            while len(progress.log) < self.recipe.epochs:
                bar.set_description(f"epoch {len(progress.log) + 1}/{self.recipe.epochs}")
                self._train_epoch(stop, bar)
                bar.set_description("evaluating")
                description = self._finish_epoch(stop)
                if self.group.is_main:
                    bar.write(description, file=sys.stderr)

    def _train_epoch(self, stop: _StopSignal, bar: tqdm[Any]) -> None:
        """Runs the remaining steps of the current epoch."""
        progress, epoch = self.progress, len(self.progress.log)
        self.model.train()
        if self.recipe.freeze_backbone:
            self.model.vivit.eval()
        done = progress.step - epoch * self.steps_per_epoch
        if done == 0:
            progress.loss_sum = progress.correct = progress.count = progress.train_s = 0.0
        saved_s = started_s = time.monotonic()
        with contextlib.closing(self._examples(epoch, first_step=done)) as examples:
            for _ in range(done, self.steps_per_epoch):
                must_stop = self._step(list(islice(examples, self.process_batch)), stop)
                now_s = time.monotonic()
                progress.train_s, started_s = progress.train_s + now_s - started_s, now_s
                count = max(progress.count, 1)
                shown = {"loss": f"{progress.loss_sum / count:.3f}", "accuracy": f"{progress.correct / count:.1%}"}
                bar.set_postfix(shown, refresh=False)
                bar.update(self.recipe.batch_size)
                if must_stop:
                    self._stop()
                if now_s - saved_s > SAVE_INTERVAL_S:
                    self._save_state()
                    saved_s = now_s
        if not progress.count:
            reasons = {f"{code}: {message}" for code, message in progress.skipped.values()}
            raise ConfigError(f"none of the training videos could be decoded: {'; '.join(sorted(reasons)[:3])}")

    def _examples(self, epoch: int, *, first_step: int) -> Generator[Example]:
        """Makes this process's part of an epoch's steps."""
        size, first = self.recipe.batch_size, self.group.rank * self.process_batch
        steps = range(first_step, self.steps_per_epoch)
        positions = [step * size + first + offset for step in steps for offset in range(self.process_batch)]
        return training_examples(self.train, positions, epoch=epoch, recipe=self.recipe, threads=self.threads)

    def _step(self, examples: Sequence[Example], stop: _StopSignal) -> bool:
        """Runs one optimizer step. Returns whether a process is to stop after it."""
        recipe, progress = self.recipe, self.progress
        progress.skipped |= {example.name: list(example.error) for example in examples if example.error}
        batch = self.clip_model.stack(examples)
        count, stops = self.group.sum([float(batch.weights.sum()), float(stop.is_set)])
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(progress.step, recipe, steps_per_epoch=self.steps_per_epoch)
        torch.manual_seed(_seed(DROPOUT, recipe.seed, progress.step, self.group.rank))
        loss_sum = correct = 0.0
        for start in range(0, self.process_batch, self.micro_batch):
            part = slice(start, start + self.micro_batch)
            labels, weights = batch.labels[part], batch.weights[part]  # (b,)
            targets = smooth_targets(
                labels, num_labels=self.model.config.num_labels, smoothing=recipe.label_smoothing
            )  # (b, labels)
            pixels = self.clip_model.normalize(batch.clips[part])  # (b, T, 3, h, w)
            if recipe.mixup:
                pixels, targets = mix_pairs(pixels, targets, weights, batch.shares[part])
            with self.clip_model.accumulation(is_last=start + self.micro_batch >= self.process_batch):
                logits = self.clip_model.logits(pixels)  # (b, labels)
                loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
                # DistributedDataParallel divides the sum of the gradients by the number of processes.
                self.scaler.scale(loss * self.group.size / max(count, 1)).backward()  # type: ignore[no-untyped-call]
            loss_sum += float(loss.detach())
            correct += float(((logits.argmax(1) == labels) * weights).sum())
        if count:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, correct = self.group.sum([loss_sum, correct])
        if not math.isfinite(loss_sum):
            raise ConfigError(f"the loss of step {progress.step} is {loss_sum}: try a lower learning rate")
        progress.loss_sum += loss_sum
        progress.correct += correct
        progress.count += count
        progress.step += 1
        return stops > 0

    def _finish_epoch(self, stop: _StopSignal) -> str:
        """Evaluates, keeps the best weights, saves log and state, and returns a description of the epoch."""
        progress, epoch = self.progress, len(self.progress.log) + 1
        evaluation, loss = self._evaluate(stop)
        for skipped in self.group.gather(progress.skipped):
            progress.skipped |= skipped
        rate = learning_rate(progress.step - 1, self.recipe, steps_per_epoch=self.steps_per_epoch)
        progress.log.append(
            {
                "epoch": epoch,
                "train_loss": progress.loss_sum / progress.count,
                "train_accuracy": progress.correct / progress.count,
                "eval_loss": loss if evaluation else None,
                "eval_top1": evaluation.top1 if evaluation else None,
                "eval_top5": evaluation.top5 if evaluation else None,
                "learning_rate": rate,
                "videos_per_s": self.steps_per_epoch * self.recipe.batch_size / max(progress.train_s, 1e-9),
            }
        )
        is_best = progress.keep_best(evaluation, epoch=epoch, loss=loss)
        if self.group.is_main:
            if is_best:
                save_checkpoint(self.model, self.processor, self.out)
            write_log(self.out, progress)
        self._save_state()
        return _describe(progress.log[-1], is_best=is_best)

    def _evaluate(self, stop: _StopSignal) -> tuple[Evaluation | None, float]:
        """Evaluates the model on the clips that serving would make.

        Returns:
            The evaluation, None without clips, and the mean loss.
        """
        mine = classify_clips(
            self.clip_model,
            self.evaluation,
            self.group,
            batch_size=self.micro_batch,
            threads=self.threads,
            is_stopped=lambda: stop.is_set,
        )
        if self.group.sum([float(stop.is_set)])[0]:
            self._stop()
        answers: list[Answers] = self.group.gather(mine)
        logits, labels = torch.cat([each.logits for each in answers]), torch.cat([each.labels for each in answers])
        errors = {name: error for each in answers for name, error in each.errors.items()}
        self.progress.skipped |= {name: list(error) for name, error in errors.items()}
        if not len(labels):
            return None, 0.0
        messages = {name: message for name, (_, message) in errors.items()}
        evaluation = evaluate(logits, labels, num_labels=self.model.config.num_labels, errors=messages)
        return evaluation, float(F.cross_entropy(logits, labels))

    def _stop(self) -> None:
        """Saves the state and raises KeyboardInterrupt."""
        self._save_state()
        raise KeyboardInterrupt

    def _save_state(self) -> None:
        if self.group.is_main:
            states = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            save_state(self.out, self.progress, states)


def _seed(*entropy: int) -> int:
    """Returns 64 bits for torch's generator."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _describe(line: Mapping[str, Any], *, is_best: bool) -> str:
    """Formats an entry of the log as a line of text."""
    text = f"epoch {line['epoch']}: loss {line['train_loss']:.3f}, accuracy {line['train_accuracy']:.1%}"
    if line["eval_top1"] is not None:
        text += f"; evaluation: loss {line['eval_loss']:.3f}, top-1 {line['eval_top1']:.1%}"
    return text + (", best so far" if is_best else "")
