"""The main job in one go: from a model and a budget to a verified checkpoint, step by step.

Each step leaves a file in one folder and is skipped where that is there: `policy.toml`,
`calibration.safetensors`, `checkpoint/`, `trials.sqlite`, `summary.md`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

import fp4graph
from fp4graph import (
    Calibration,
    ModelError,
    Policy,
    Scheme,
    StudyError,
)
from fp4graph.budget.file import write_policy
from fp4graph.budget.find import Request, search
from fp4graph.budget.plan import Budget, dense_plan
from fp4graph.budget.summary import summary
from fp4graph.checkpoints.export import export
from fp4graph.files import read_text, write_text
from fp4graph.loading import load_packed
from fp4graph.models import local_folder
from fp4graph.skeleton import checkpoint_skeleton
from fp4graph.study import ablate
from fp4graph.study.outliers import input_ranges
from fp4graph.study.plan import read_mix
from fp4graph.study.progress import duration

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fp4graph.budget.summary import Wish
    from fp4graph.linears.tags import LinearTag
    from fp4graph.models import LoadedModel
    from fp4graph.study.evaluate import Windows
    from fp4graph.study.progress import Progress
    from fp4graph.study.trial import Row

# Runs of the dense model over as many tokens that a step takes: guesses, for the forecast alone.
_SENSITIVITY, _CALIBRATION, _TRIAL = 30.0, 10.0, 1.5


class Fit:
    """One run of all steps.

    Args:
        wish: what is asked for.
        loaded: the model.
        texts: windows to estimate on, to calibrate with, and to measure on.
        out: the folder.
        progress: is told how far each step is.
        say: is told what each step came to.

    Raises:
        ModelError: the folder is of another wish, or cannot be written.
        StudyError: the model's weights are random.
    """

    def __init__(
        self,
        wish: Wish,
        loaded: LoadedModel,
        texts: tuple[Windows, Windows, Windows],
        out: Path,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        if loaded.is_random:
            raise StudyError(f"{loaded.name} has random weights: its accuracy means nothing")
        self.wish, self.loaded, self.out = wish, loaded, out
        self._estimate, self._calibrate, self._measure = texts
        self._progress, self._say = progress, say
        self._check_folder()

    def _check_folder(self) -> None:
        file = self.out / "fit.json"
        texts = [each.digest() for each in (self._estimate, self._calibrate, self._measure)]
        about = {**asdict(self.wish), "revision": self.loaded.revision(), "texts": texts}
        mine = json.loads(json.dumps(about))
        if file.is_file():
            known = json.loads(read_text(file))
            other = sorted(key for key in mine if known.get(key) != mine[key])
            if other:
                was = ", ".join(f"{key} {known.get(key)!r}" for key in other)
                raise ModelError(f"{self.out} is of another wish ({was}): give a new folder")
            return
        try:
            write_text(file, json.dumps(mine, indent=2) + "\n")
        except OSError as error:
            raise ModelError(f"cannot write {self.out}: {error}") from None

    def forecast(self) -> str:
        """Return what all steps are going to take, from one window's time."""
        windows = (self._estimate, self._calibrate, self._measure)
        ids = self._estimate.ids[:1].to(self.loaded.device)
        with torch.no_grad():
            self.loaded.model(input_ids=ids, use_cache=False)
            start = time.perf_counter()
            self.loaded.model(input_ids=ids, use_cache=False)
            token = (time.perf_counter() - start) / ids.numel()
        shares = (_SENSITIVITY * len(self.wish.formats), _CALIBRATION, 4 * _TRIAL)
        seconds = [
            token * each.ids.numel() * share for each, share in zip(windows, shares, strict=True)
        ]
        model = sum(each.nbytes for each in self.loaded.model.parameters())
        return (
            f"about {duration(sum(seconds))} in all: sensitivity {duration(seconds[0])}, "
            f"calibration {duration(seconds[1])}, verification {duration(seconds[2])}; "
            f"{2 * model / 1e9:.1f} GB of memory, {model / 1e9:.1f} GB on disk at most"
        )

    def run(self) -> str:
        """Go through all steps, and return the summary.

        Raises:
            OptionError: a budget that cannot be met.
            RefusalError: what engines cannot load.
            as the steps' own functions.
        """
        self._say(f"forecast: {self.forecast()}")
        policy = self._policy()
        codes = self._codes(policy)
        self._checkpoint(policy.calibrated((codes,)) if codes else policy)
        rows = self._verify()
        facts = json.loads(read_text(self.out / "plan.json"))
        texts = self._estimate, self._calibrate, self._measure
        text = summary(self.wish, policy, facts, rows, texts, self.out)
        write_text(self.out / "summary.md", text)
        return text

    def _policy(self) -> Policy:
        file = self.out / "policy.toml"
        if not file.is_file():
            budget = Budget(self.wish.kind, self.wish.value)
            request = Request(
                budget, self.wish.schemes, self.wish.serve, timed=self.loaded.device.type == "cpu"
            )
            found = search(self.loaded, self._estimate, request, self._progress)
            best = found.plans[0]
            facts = {
                "bits": best.bits,
                "bytes": best.nbytes,
                "bytes_dense": dense_plan(found.items).nbytes,
                "predicted_kl": best.kl,
                "predicted_se": best.kl_se,
            }
            write_text(self.out / "plan.json", json.dumps(facts, indent=2) + "\n")
            about = f"fp4graph fit {self.wish.model}, {budget}"
            write_policy(best.policy(found.tags), file, f"{budget}", about)
        policy = Policy.read(read_mix(file)[0], Scheme())
        self._say(f"policy: {file}: {policy}")
        return policy

    def _codes(self, policy: Policy) -> Calibration | None:
        if not any(scheme.quantizer.needs_data for scheme in policy.schemes):
            return None
        file = self.out / "calibration.safetensors"
        if file.is_file():
            found = Calibration.load(file)
        else:
            found = fp4graph.calibrate(
                self.loaded.model,
                self._calibrate.ids.to(self.loaded.device).split(1),
                policy,
                serve=self.wish.serve,
                out=file,
                about={"model": self.wish.model, "corpus": self.wish.corpus},
                progress=self._progress.counted("blocks"),
            )
        self._say(f"codes: {file}: {len(found.packed)} linears")
        return found

    def _checkpoint(self, policy: Policy) -> None:
        out = self.out / "checkpoint"
        if not out.is_dir():
            folder = local_folder(self.wish.model)
            inputs = None
            if any(
                s.activations == "same" and s.format.has_per_tensor_scale for s in policy.schemes
            ):
                inputs = input_ranges(self.loaded, self._calibrate)

            def card(policy: Policy, tags: Sequence[LinearTag]) -> str:
                return f"# {self.wish.model}\n\nWhat runs how: `{policy}`. See `../summary.md`.\n"

            export(
                folder, checkpoint_skeleton(folder), policy, self.wish.to, out,
                inputs=inputs, card=card,
            )  # fmt: skip
        size = sum(file.stat().st_size for file in out.iterdir())
        self._say(f"checkpoint: {out}: {size / 1e6:.1f} MB")

    def _verify(self) -> list[Row]:
        """Return the rows of the checkpoint as it lies there, and of every uniform format."""
        packed = load_packed(
            str(self.out / "checkpoint"), next(self.loaded.model.parameters()).dtype,
            self.loaded.device,
        )  # fmt: skip
        rows = ablate(
            self.loaded,
            self._measure,
            "all",
            self.wish.formats,
            self.wish.activations,
            out=self.out,
            packed=packed,
            corpus=self.wish.verify_corpus,
            progress=self._progress,
        )
        return [row for row in rows if not row.is_dense]
